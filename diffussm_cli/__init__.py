"""DiffuSSM: image diffusion on bidirectional state space layers, without attention (arXiv
2311.18257).
"""

__version__ = "0.2.0"
