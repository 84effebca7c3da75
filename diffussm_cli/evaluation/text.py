"""Does a picture show what its prompt says? Retrieval among real pictures with captions, by features of an extractor.

The first caption of a picture is its name.

n pictures, each drawn for a prompt   m candidates, real pictures   d features
"""

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor


def names_in(captions: Sequence[tuple[str, ...]]) -> list[str]:
    """The different names of images, in the order of the images."""
    return list(dict.fromkeys(own[0] for own in captions if own))


def names_of(prompts: Sequence[str], captions: Sequence[tuple[str, ...]]) -> list[str] | None:
    """The name that each prompt stands for, names before other captions; None if a prompt is not among the captions."""
    name = {caption: own[0] for own in captions for caption in own}
    name |= {own: own for own in names_in(captions)}
    return [name[p] for p in prompts] if name.keys() >= set(prompts) else None


def retrieval(
    drawn: Tensor, wanted: Sequence[str], real: Tensor, names: Sequence[str], categories: Sequence | None = None
) -> dict[str, float]:
    """Shares of drawn pictures whose name, or whose category, is found by the cosine of features.

    Args:
        drawn: features of the pictures that are judged, (n, d).
        wanted: the name that each of them should show; one of `names`.
        real: features of the candidates, (m, d). A name may have several; the most similar one counts.
        names, categories: of the candidates; categories may be missing.

    Returns:
        `top1` and `top5`: the name is the most similar one, or among the five most similar. `category`: the most
        similar name is of the right category. `chance_...`: the same for a name picked at random.
    """
    labels, first, name_of = np.unique(np.asarray(names), return_index=True, return_inverse=True)
    similarity = (F.normalize(drawn.double(), dim=1) @ F.normalize(real.double(), dim=1).T).cpu().numpy()
    best = np.stack([similarity[:, name_of == k].max(1) for k in range(len(labels))], 1)  # (n, names)
    order = np.argsort(-best, axis=1, kind="stable")
    right = np.searchsorted(labels, np.asarray(wanted))
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
