"""A finished store of latents as a training source.

B batch   C channels   H x W grid
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffussm_cli.data.images import coins
from diffussm_cli.data.latents.manifest import SKIPPED, read_manifest
from diffussm_cli.data.latents.shard import map_shard
from diffussm_cli.data.listing import LeftOut, left_out_line
from diffussm_cli.errors import DataError


class LatentStore:
    """A finished store as a training source: image i is the i-th readable one. Only pages that are read use memory."""

    def __init__(self, root: Path, flip: bool, text_tokens: int = 0):
        self.root, self.flip, self.text_tokens = root, flip, text_tokens
        manifest = read_manifest(root, "data.path")
        self.settings = manifest.settings
        if not manifest.complete:
            raise DataError(f"data.path: {str(root)!r} is not finished; run the same diffussm encode command again")
        if flip and not self.settings.flip:
            raise DataError(f"data.flip: true, but {str(root)!r} was made with --no-flip; --set data.flip=false")
        self.class_names = self.settings.class_names
        self._shards: dict[int, dict[str, np.ndarray]] = {}
        shards = [self._shard(i) for i in range(self.settings.shards)]
        self.places = np.flatnonzero(np.concatenate([s["readable"] for s in shards]))
        self.labels = torch.from_numpy(np.concatenate([s["label"] for s in shards])[self.places])
        if not len(self.places):
            raise DataError(f"data.path: {str(root)!r} holds no readable images; see {SKIPPED}")
        if not 0 <= int(self.labels.min()) <= int(self.labels.max()) < max(1, len(self.class_names)):
            raise DataError(f"data.path: {str(root)!r} holds labels without a class; run diffussm encode --verify")
        self.scale, self.shift = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.settings.scale, self.settings.shift))

    def __len__(self) -> int:
        return len(self.places)

    @property
    def left_out(self) -> str:
        """One line that counts the images that could not be encoded; empty if there are none."""
        missing = self.settings.images - len(self.places)
        parts = [LeftOut(missing, "image", f"not encoded; reasons in {SKIPPED}")] if missing else []
        return left_out_line(self.root, parts)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}  # another process creates its own memory maps

    def _shard(self, i: int) -> dict[str, np.ndarray]:
        if i not in self._shards:
            self._shards[i] = map_shard(self.root, self.settings, i)
        return self._shards[i]

    def moments(self, indices: Sequence[int], mirrored: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of images, flipped horizontally where `mirrored` (B,) is true: (B, C, H, W)
        float16 in the VAE's units."""
        places = self.places[np.asarray(indices)]
        mean, std = (np.empty((len(places), *self.settings.latent), np.float16) for _ in range(2))
        suffixes = ("", "_mirrored") if self.settings.flip else ("",)
        which = np.zeros(len(places), int) if mirrored is None else np.asarray(mirrored, int)
        shards, rows = np.divmod(places, self.settings.shard_size)
        for k, (shard, row, m) in enumerate(zip(shards.tolist(), rows.tolist(), which.tolist())):
            tensors = self._shard(shard)
            mean[k], std[k] = tensors["mean" + suffixes[m]][row], tensors["std" + suffixes[m]][row]
        return torch.from_numpy(mean), torch.from_numpy(std)

    def text(self, indices: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
        """One of the stored captions of each image, drawn with its generator, (B, 1 + K, E) float32."""
        found = []
        for place, generator in zip(self.places[np.asarray(indices)].tolist(), generators):
            shard, row = divmod(place, self.settings.shard_size)
            tensors = self._shard(shard)
            which = int(torch.randint(int(tensors["captions"][row]), (), generator=generator))
            found.append(tensors["text"][row, which, : 1 + self.text_tokens])
        return torch.from_numpy(np.stack(found)).float()

    def read(self, indices: Sequence[int], generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Samples of the posterior in model space, (B, C, H, W) float32, and labels (B,)."""
        mirrored = coins(self.flip, generators)
        mean, std = self.moments(indices, mirrored.numpy() if self.flip else None)
        z = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators]).mul_(std).add_(mean)
        return z.sub_(self.shift).mul_(self.scale), self.labels[torch.as_tensor(np.asarray(indices))]
