"""Latents of a VAE on disk: encoded once, checked, repaired, and read by training."""

from diffussm_cli.data.latents.encoding import encode_images
from diffussm_cli.data.latents.reading import LatentStore
from diffussm_cli.data.latents.repair import repair_store, verify_store

__all__ = ["LatentStore", "encode_images", "repair_store", "verify_store"]
