"""The diffusion process, its losses and samplers. Knows nothing of the network: takes any denoiser."""
