"""A small classifier of 28x28 digits, whose features make every metric work without a download.

It classifies 98.4% of the held-out tenth of the built-in MNIST digits correctly. `tools/train_digits.py` trained it.

B batch   pool features (B, 64)   spatial features (B, 392): 7 x 7 x 8 channels in NHWC order   logits (B, 10)
"""

import hashlib
from importlib import resources

import torch.nn.functional as F
from safetensors.torch import load
from torch import Tensor, nn

from diffussm_cli.errors import ConfigError

WEIGHTS = "digits.safetensors"
SPATIAL_CHANNELS = 8
POOL_SCALE = 11.2  # scale of the pool features on the training digits; they are divided by it


class DigitsNet(nn.Module):
    """uint8 (B, 1, 28, 28) -> pool, spatial, logits. Raises ConfigError for another size."""

    channels = 1

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.features = nn.Linear(64 * 3 * 3, 64)
        self.classify = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if images.shape[2:] != (28, 28):
            raise ConfigError(f"--extractor: digits takes 28x28 images, not {images.shape[2]}x{images.shape[3]}")
        h = images.float() / 127.5 - 1
        h = F.max_pool2d(F.relu(self.conv1(h)), 2)  # (B, 16, 14, 14)
        h = F.max_pool2d(F.relu(self.conv2(h)), 2)  # (B, 32, 7, 7)
        h = F.relu(self.conv3(h))  # (B, 64, 7, 7)
        spatial = h[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (B, 392)
        pool = self.features(F.max_pool2d(h, 2).flatten(1))  # (B, 64)
        return pool / POOL_SCALE, spatial, self.classify(F.relu(pool))


def load_digits() -> tuple[DigitsNet, str]:
    """The trained network, in eval mode, on the CPU, and its identity with the hash of its weights."""
    content = (resources.files("diffussm_cli.evaluation") / WEIGHTS).read_bytes()
    network = DigitsNet()
    network.load_state_dict(load(content))
    return network.eval().requires_grad_(False), f"digits-{hashlib.sha256(content).hexdigest()[:16]}"
