"""CLIP as an extractor: image embeddings as features, and the CLIP score of prompts.

n images   d width of the embeddings
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffussm_cli.data.text import AT_ONCE, tokenize
from diffussm_cli.errors import DataError
from diffussm_cli.machine.hub import load_pretrained, weights_sha256


class Clip(nn.Module):
    """CLIP of transformers with its preprocessing: images uint8 (n, 3, H, W) -> embeddings (n, d) of length 1."""

    def __init__(self, model: Any, tokenizer: Any, processor: Any):
        super().__init__()
        self.model, self.tokenizer, self.processor = model, tokenizer, processor

    def forward(self, images: Tensor) -> Tensor:
        inputs = self.processor(images=list(images.cpu()), input_data_format="channels_first", return_tensors="pt")
        return F.normalize(_pooled(self.model.get_image_features(**inputs.to(images.device))), dim=1)

    @torch.no_grad()
    def score(self, embeddings: Tensor, prompts: Sequence[str]) -> float:
        """The CLIP score of images with these embeddings (n, d): the mean of 100 max(cosine, 0), as in torchmetrics."""
        inputs = [tokenize(self.tokenizer, prompts[i : i + AT_ONCE]) for i in range(0, len(prompts), AT_ONCE)]
        found = [_pooled(self.model.get_text_features(**each.to(self.model.device))) for each in inputs]
        text = F.normalize(torch.cat(found).to(embeddings), dim=1)
        return 100 * (embeddings * text).sum(1).clamp(min=0).mean().item()


def _pooled(found: Any) -> Tensor:
    return getattr(found, "pooler_output", found)  # transformers 4 returns the tensor itself


def load_clip(name: str) -> tuple[Clip, str]:
    """CLIP by folder or hub name, and its identity. Raises DataError."""
    parts = ("AutoTokenizer", "AutoImageProcessor")
    model, *others = load_pretrained(name, "--extractor", {"clip": "CLIPModel"}, *parts)
    if model.config.model_type != "clip":
        raise DataError(f"--extractor: {name!r} holds a model of the type {model.config.model_type!r}, not 'clip'")
    return Clip(model, *others), f"clip-{weights_sha256(model)[:16]}"
