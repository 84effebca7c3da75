"""Encode a folder of images into latents of a VAE, and verify every file that was written.

    python examples/encode.py photos/ latents/ VAE

VAE is a hub name, such as stabilityai/sd-vae-ft-ema, or a folder with its config.json and
safetensors weights.
"""

import sys

from diffussm_cli.data.latents import encode_images, verify_store
from diffussm_cli.events import finish

if __name__ == "__main__":  # needed with workers > 0: these processes import this file
    source, target, vae = sys.argv[1:]
    finish(encode_images(source, target, resolution=(32, 32), vae=vae, workers=0))
    finish(verify_store(target))
    print(f"all files in {target} are intact")
