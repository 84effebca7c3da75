"""Does a picture show what its prompt says? CLIP's score, and retrieval among real pictures with
captions.

The first caption of a picture is its name.

n pictures, each drawn for a prompt   m candidates, real pictures   d features
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffussm_cli.data.text import AT_ONCE, tokenize
from diffussm_cli.errors import DataError
from diffussm_cli.machine.hub import load_pretrained, weights_sha256


# ---------------------------------------------------------------------------------------- retrieval
def names_in(captions: Sequence[tuple[str, ...]]) -> list[str]:
    """The different names of images, in the order of the images."""
    return list(dict.fromkeys(texts[0] for texts in captions if texts))


def names_of(prompts: Sequence[str], captions: Sequence[tuple[str, ...]]) -> list[str] | None:
    """The name that each prompt stands for, names before other captions; None if a prompt is not
    among the captions.
    """
    name = {caption: texts[0] for texts in captions for caption in texts}
    name |= {text: text for text in names_in(captions)}
    return [name[p] for p in prompts] if name.keys() >= set(prompts) else None


def retrieval(
    drawn: Tensor,
    right_names: Sequence[str],
    real: Tensor,
    names: Sequence[str],
    categories: Sequence | None = None,
) -> dict[str, float]:
    """Shares of drawn pictures whose name, or whose category, is found by the cosine of features.

    Args:
        drawn: features of the pictures that are judged, (n, d).
        right_names: the name that each of them should show; one of `names`.
        real: features of the candidates, (m, d). A name may have several; the most similar one
            counts.
        names, categories: of the candidates; categories may be missing.

    Returns:
        `top1` and `top5`: the name is the most similar one, or among the five most similar.
        `category`: the most similar name is of the right category. `chance_...`: the same for a
        name picked at random.
    """
    # The names from the most to the least similar one, for each picture.
    labels, first, name_of = np.unique(np.asarray(names), return_index=True, return_inverse=True)
    similarity = (
        (F.normalize(drawn.double(), dim=1) @ F.normalize(real.double(), dim=1).T).cpu().numpy()
    )
    # (n, names)
    best = np.stack([similarity[:, name_of == k].max(1) for k in range(len(labels))], 1)
    order = np.argsort(-best, axis=1, kind="stable")

    right = np.searchsorted(labels, np.asarray(right_names))
    hits = order == right[:, None]
    values = {
        "top1": float(hits[:, 0].mean()),
        "top5": float(hits[:, :5].any(1).mean()),
        "chance_top1": 1 / len(labels),
        "chance_top5": min(5, len(labels)) / len(labels),
    }
    if categories is not None:
        category = np.asarray(categories)[first]  # of each name
        same = category[None] == category[right][:, None]  # (n, names)
        values["category"] = float(same[np.arange(len(right)), order[:, 0]].mean())
        values["chance_category"] = float(same.mean())
    return values


# --------------------------------------------------------------------------------------------- CLIP
class Clip(nn.Module):
    """CLIP of transformers with its preprocessing: images uint8 (n, 3, H, W) -> embeddings (n, d)
    of length 1.
    """

    def __init__(self, model: Any, tokenizer: Any, processor: Any):
        super().__init__()
        self.model, self.tokenizer, self.processor = model, tokenizer, processor

    def forward(self, images: Tensor) -> Tensor:
        inputs = self.processor(
            images=list(images.cpu()), input_data_format="channels_first", return_tensors="pt"
        )
        return F.normalize(
            _pooled(self.model.get_image_features(**inputs.to(images.device))), dim=1
        )

    @torch.no_grad()
    def score(self, embeddings: Tensor, prompts: Sequence[str]) -> float:
        """The CLIP score of images with these embeddings (n, d): the mean of 100 max(cosine, 0), as
        in torchmetrics.
        """
        inputs = [
            tokenize(self.tokenizer, prompts[i : i + AT_ONCE])
            for i in range(0, len(prompts), AT_ONCE)
        ]
        parts = [
            _pooled(self.model.get_text_features(**part.to(self.model.device))) for part in inputs
        ]
        text = F.normalize(torch.cat(parts).to(embeddings), dim=1)
        return 100 * (embeddings * text).sum(1).clamp(min=0).mean().item()


def _pooled(output: Any) -> Tensor:
    return getattr(output, "pooler_output", output)  # transformers 4 returns the tensor itself


def load_clip(name: str) -> tuple[Clip, str]:
    """CLIP by folder or hub name, and its identity. Raises DataError."""
    parts = ("AutoTokenizer", "AutoImageProcessor")
    model, *others = load_pretrained(name, "extractor", {"clip": "CLIPModel"}, *parts)
    if model.config.model_type != "clip":
        raise DataError(
            f"extractor: {name!r} holds a model of the type {model.config.model_type!r}, not 'clip'"
        )
    return Clip(model, *others), f"clip-{weights_sha256(model)[:16]}"
