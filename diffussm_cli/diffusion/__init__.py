"""The diffusion process, its losses and its samplers. They work with any denoiser and know nothing
of the network.
"""
