"""Encode a folder of images into latents of a VAE, at 256 pixels or another size.

    python examples/encode.py photos/ latents/ VAE
    python examples/encode.py photos/ latents/ VAE 512

VAE is a hub name, such as stabilityai/sd-vae-ft-ema, or a folder with its config.json and
safetensors weights.
"""

import sys

import diffussm as ds

source, target, vae, *side = sys.argv[1:]
# This process decodes all images. With more workers, which import this file, the call must stand
# below `if __name__ == "__main__":`.
ds.encode(source, target, resolution=int(side[0]) if side else 256, vae=vae, workers=0)
print(f"the latents of {source} are in {target}")
