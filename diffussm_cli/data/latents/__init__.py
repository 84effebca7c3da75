"""Latents of a VAE on disk: encoded once, checked, repaired, and read by training."""
