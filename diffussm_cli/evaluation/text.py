"""Does a picture show what its prompt says? Retrieval among pictures of known names, by features of an extractor.

n pictures, each drawn for a prompt   m candidates, real pictures   d features
"""

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor


def retrieval(
    drawn: Tensor, wanted: Sequence[str], real: Tensor, names: Sequence[str], categories: Sequence[str]
) -> dict[str, float]:
    """Shares of drawn pictures whose name, or whose category, is found by the cosine of features.

    Args:
        drawn: features of the pictures that are judged, (n, d).
        wanted: the name that each of them should show; one of `names`.
        real: features of the candidates, (m, d). A name may have several; the most similar one counts.
        names, categories: of the candidates.

    Returns:
        `top1` and `top5`: the name is the most similar one, or among the five most similar. `category`: the most
        similar name is of the right category. `chance_...`: the same for a name picked at random.
    """
    labels, first, name_of = np.unique(np.asarray(names), return_index=True, return_inverse=True)
    category = np.asarray(categories)[first]  # of each name
    similarity = (F.normalize(drawn.double(), dim=1) @ F.normalize(real.double(), dim=1).T).cpu().numpy()
    best = np.stack([similarity[:, name_of == k].max(1) for k in range(len(labels))], 1)  # (n, names)
    order = np.argsort(-best, axis=1, kind="stable")
    right = np.searchsorted(labels, np.asarray(wanted))
    same = category[None] == category[right][:, None]  # (n, names)
    hits = order == right[:, None]
    return {
        "top1": float(hits[:, 0].mean()),
        "top5": float(hits[:, :5].any(1).mean()),
        "category": float(same[np.arange(len(right)), order[:, 0]].mean()),
        "chance_top1": 1 / len(labels),
        "chance_top5": min(5, len(labels)) / len(labels),
        "chance_category": float(same.mean()),
    }
