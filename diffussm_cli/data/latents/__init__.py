"""Latents of a VAE on disk: encoded once, checked, and read by training."""

from diffussm_cli.data.latents.convert import convert_store
from diffussm_cli.data.latents.encoding import encode_images
from diffussm_cli.data.latents.reading import LatentStore
from diffussm_cli.data.latents.store import verify_store

__all__ = ["LatentStore", "convert_store", "encode_images", "verify_store"]
