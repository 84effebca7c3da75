"""A finished store of latents as a training source.

B batch   C channels   H x W grid
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffussm_cli.config import DataConfig
from diffussm_cli.data.images import coins
from diffussm_cli.data.latents.shard import map_shard, shard_name
from diffussm_cli.data.latents.store import Store, read_store
from diffussm_cli.data.listing import LeftOut, left_out_line
from diffussm_cli.data.vae_facts import space_of
from diffussm_cli.errors import DataError

# Means and deviations of a channel that are no cause for a warning; those of Stable Diffusion's VAE
# lie well inside.
MOST_MEAN, LEAST_STD, MOST_STD = 1.5, 0.4, 2.5
LEAST_VARYING = 1e-6  # the least deviation of a channel by which it can be divided


class LatentStore:
    """A complete store as a training source: image i is the i-th readable one.

    Only pages that are read use memory.
    """

    def __init__(self, root: Path, flip: bool, text_tokens: int = 0):
        self.root = root
        self.flip = flip
        self.text_tokens = text_tokens

        store = read_store(root, "data.path")
        self.settings = store.settings
        self.warning = scale_warning(store)
        if flip and not self.settings.flip:
            raise DataError(
                f"data.flip: true, but {str(root)!r} was made with --no-flip; --set data.flip=false"
            )
        self.class_names = self.settings.class_names
        self._shards: dict[int, dict[str, np.ndarray]] = {}

        # Labels and places of the readable images.
        shards = [self._shard(i) for i in range(self.settings.shards)]
        self.places = np.flatnonzero(np.concatenate([s["readable"] for s in shards]))
        self.labels = torch.from_numpy(np.concatenate([s["label"] for s in shards])[self.places])
        if not len(self.places):
            raise DataError(f"data.path: {str(root)!r} holds no readable images")

        # A damaged store: images without captions, or labels without a class.
        if self.settings.text:
            captions = np.concatenate([s["captions"] for s in shards])[self.places]
            if not 1 <= int(captions.min()) <= int(captions.max()) <= self.settings.captions:
                raise DataError(
                    f"data.path: {str(root)!r} holds images without captions; "
                    "run diffussm encode --verify"
                )
        if (
            not 0
            <= int(self.labels.min())
            <= int(self.labels.max())
            < max(1, len(self.class_names))
        ):
            raise DataError(
                f"data.path: {str(root)!r} holds labels without a class; "
                "run diffussm encode --verify"
            )

        self.scale = torch.tensor(self.settings.scale).view(1, -1, 1, 1)
        self.shift = torch.tensor(self.settings.shift).view(1, -1, 1, 1)
        self.statistics: dict[str, Any] = {}  # fields of `data`, if they are used
        self._measured = store.statistics
        hashes = [record.sha256 for record in store.records]
        self.shards_sha256 = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()

    def normalize(self, data: DataConfig) -> None:
        """From here on, read latents with mean 0 and deviation 1 in each channel: by the statistics
        in `data`, or by those of this store if there are none.

        Raises:
            DataError: if the store has none, or a channel does not vary.
        """
        if data.latents_std:
            self.statistics = {"latents_mean": data.latents_mean, "latents_std": data.latents_std}
        else:
            self.statistics = self._statistics()
        data = dataclasses.replace(data, **self.statistics)
        scale, shift = space_of(self.settings.scale, self.settings.shift, data)
        self.scale, self.shift = (torch.tensor(v).view(1, -1, 1, 1) for v in (scale, shift))
        self.warning = ""

    def _statistics(self) -> dict[str, Any]:
        """Means and deviations of the channels, in six digits. Raises DataError."""
        where = f"data.normalize: measured, but {str(self.root)!r}"
        if self._measured is None:
            raise DataError(
                f"{where} was made by an earlier version, which measured nothing; "
                "encode the images again, or --set data.normalize=vae"
            )

        mean, std = self._measured
        if (std < LEAST_VARYING).any():
            channel = int(np.argmin(std))
            raise DataError(
                f"{where} has a channel that does not vary, {channel}; --set data.normalize=vae"
            )
        return {
            "latents_mean": tuple(round(float(m), 6) for m in mean),
            "latents_std": tuple(float(f"{s:.6g}") for s in std),
        }

    def __len__(self) -> int:
        return len(self.places)

    @property
    def left_out(self) -> str:
        """One line that counts the images that could not be encoded; empty if there are none."""
        missing = self.settings.images - len(self.places)
        parts = (
            [LeftOut(missing, "image", "not encoded; reasons in its shard-*.json")]
            if missing
            else []
        )
        return left_out_line(self.root, parts)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}  # another process creates its own memory maps

    def _shard(self, i: int) -> dict[str, np.ndarray]:
        if i not in self._shards:
            self._shards[i] = map_shard(self.root, self.settings, i)
        return self._shards[i]

    def moments(
        self, indices: Sequence[int], mirrored: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of images, (B, C, H, W) float16 in the VAE's units.

        Args:
            mirrored: (B,), true for images that are flipped horizontally.
        """
        places = self.places[np.asarray(indices)]
        shards, rows = np.divmod(places, self.settings.shard_size)
        suffixes = ("", "_mirrored") if self.settings.flip else ("",)
        which = np.zeros(len(places), int) if mirrored is None else np.asarray(mirrored, int)

        mean, std = (np.empty((len(places), *self.settings.latent), np.float16) for _ in range(2))
        for k, (shard, row, m) in enumerate(zip(shards.tolist(), rows.tolist(), which.tolist())):
            tensors = self._shard(shard)
            mean[k] = tensors["mean" + suffixes[m]][row]
            std[k] = tensors["std" + suffixes[m]][row]
        return torch.from_numpy(mean), torch.from_numpy(std)

    def text(self, indices: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
        """One of the stored captions of each image, drawn with its generator, (B, 1 + K, E)
        float32.
        """
        vectors = []
        for place, generator in zip(self.places[np.asarray(indices)].tolist(), generators):
            shard, row = divmod(place, self.settings.shard_size)
            tensors = self._shard(shard)
            which = int(torch.randint(int(tensors["captions"][row]), (), generator=generator))
            vectors.append(tensors["text"][row, which, : 1 + self.text_tokens])
        return self._finite(torch.from_numpy(np.stack(vectors)).float(), indices)

    def read(
        self, indices: Sequence[int], generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        """Samples of the posterior in model space, (B, C, H, W) float32, and labels (B,)."""
        mirrored = coins(self.flip, generators)
        mean, std = self.moments(indices, mirrored.numpy() if self.flip else None)
        z = (
            torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators])
            .mul_(std)
            .add_(mean)
        )
        x_0 = self._finite(z.sub_(self.shift).mul_(self.scale), indices)
        return x_0, self.labels[torch.as_tensor(np.asarray(indices))]

    def _finite(self, values: Tensor, indices: Sequence[int]) -> Tensor:
        """The values (B, ...) of images, checked.

        Raises:
            DataError: naming the shard and row of the first image with a value that is not finite.
        """
        finite = values.isfinite().flatten(1).all(1)
        if not finite.all():
            place = int(self.places[indices[int(finite.int().argmin())]])
            shard, row = divmod(place, self.settings.shard_size)
            where = f"row {row} of {shard_name(shard)} in {str(self.root)!r}"
            raise DataError(
                f"data.path: {where} holds numbers that are not finite; "
                "run diffussm encode --verify"
            )
        return values


def scale_warning(store: Store) -> str:
    """A line if latents are far from mean 0 and deviation 1, which training assumes; else empty."""
    if store.statistics is None:
        return ""
    mean, std = store.statistics
    if (abs(mean) <= MOST_MEAN).all() and (std >= LEAST_STD).all() and (std <= MOST_STD).all():
        return ""

    has = (
        f"means from {mean.min():.3g} to {mean.max():.3g} "
        f"and deviations from {std.min():.3g} to {std.max():.3g}"
    )
    return (
        f"the latents in {str(store.root)!r} have channels with {has}, "
        "but training assumes about 0 and 1: check scaling_factor and shift_factor, "
        f"or latents_mean and latents_std, in the config of {store.settings.vae}; or "
        "--set data.normalize=measured"
    )
