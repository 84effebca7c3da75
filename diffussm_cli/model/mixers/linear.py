"""Gated linear attention in both directions as a mixer, in chunks and in plain PyTorch.

B batch   D channels   J positions   M tokens per position   L = J M tokens
h heads of d = D/h channels   T tokens per chunk   n = L/T chunks

Gated linear attention (GLA): Yang et al. 2023, arXiv 2312.06635; in diffusion: DiG, arXiv
2405.18428. GLA has a gate per channel of the keys. Here there is one per head, as in Mamba-2 (arXiv
2405.21060), so that a chunk needs only matrix products, and its decays, exponentials of numbers
that are at most 0, cannot overflow.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffussm_cli.model.mixers.attention import Heads

CHUNK = 64  # T
# a = sigmoid(gate)^(1/16), as in GLA: a head starts with a memory of about 23 tokens
TEMPERATURE = 16


class LinearAttention(Heads):
    """u (B, D, J, M) -> concat(forward, backward) (B, 2D, J, M). Time and memory grow with L.

    Both directions share queries and keys, and have their own gates. The result of a head is
    divided by its root mean square, as nothing else bounds it.
    """

    def __init__(self, D: int, heads: int):
        super().__init__(D, heads)
        self.gates = nn.Linear(D, 2 * heads)

    def forward(self, u: Tensor, _grid: tuple[int, int] | None = None) -> Tensor:
        *qkv, tokens = self.split(u)  # (B, h, L, d) each, (B, L, D)

        # Both directions as one batch: the second reads the tokens from the last to the first.
        q, k, v = (torch.stack([x, x.flip(2)]) for x in qkv)  # (2, B, h, L, d)
        gates = self.gates(tokens).unflatten(-1, (2, -1)).permute(2, 0, 3, 1)  # (2, B, h, L)
        gates = torch.stack([gates[0], gates[1].flip(2)])  # (2, B, h, L)

        wide = torch.promote_types(gates.dtype, torch.float32)
        log_decay = F.logsigmoid(gates.to(wide)) / TEMPERATURE
        y = gated_linear_attention(q, k, v, log_decay)  # (2, B, h, L, d)
        y = F.rms_norm(y, y.shape[-1:], eps=1e-6)  # (2, B, h, L, d)

        both = torch.stack([y[0], y[1].flip(2)], dim=1).mT  # (B, 2, h, d, L)
        return both.reshape(len(u), 2 * u.shape[1], *u.shape[2:])

    def macs(self, L: int, _grid: tuple[int, int]) -> dict[str, float]:
        """Queries, keys and gates; per direction and token T products with keys and values, and two
        with a state.
        """
        D, h = self.qk.in_features, self.heads
        padded = math.ceil(L / CHUNK) * CHUNK
        return {"mixer": 2 * L * D * (D + h) + 2 * padded * (2 * CHUNK * D + 2 * D**2 / h)}

    def saved(self) -> float:
        return 19 * self.qk.in_features + 6 * self.heads * CHUNK


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, T: int = CHUNK
) -> Tensor:
    """y_l = q_l S_l with S_l = exp(log_decay_l) S_{l-1} + k_l^T v_l and S_0 = 0, in one direction.

    q, k, v (..., L, d), log_decay (..., L) of numbers that are at most 0 -> y (..., L, d).

    A token reads the tokens of its own chunk of T directly, and all earlier ones as the state S
    (d, d) with which the chunk begins.
    """
    # n chunks of T tokens; zeros fill the last one.
    L = q.shape[-2]
    missing = -L % T
    q, k, v = (F.pad(x, (0, 0, 0, missing)).unflatten(-2, (-1, T)) for x in (q, k, v))
    log_decay = F.pad(log_decay, (0, missing)).unflatten(-1, (-1, T))  # (..., n, T)
    since_start = log_decay.cumsum(-1)  # the log of the decay from the chunk's start to each token

    # What the tokens of a chunk read of each other: i reads j <= i, decayed from j to i.
    is_later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    log_between = since_start[..., None] - since_start[..., None, :]  # (..., n, T, T)
    between = log_between.masked_fill(is_later, -torch.inf).exp()
    within = (q @ k.mT * between.to(q.dtype)) @ v  # (..., n, T, d)

    # What each chunk adds to the state, and how much of the state remains at its end.
    to_end = (since_start[..., -1:] - since_start).exp().to(k.dtype)  # (..., n, T)
    added = (k * to_end[..., None]).mT @ v  # (..., n, d, d)
    remains = since_start[..., -1].exp()  # (..., n)

    # The states with which the chunks begin, one after the other.
    S = torch.zeros_like(since_start[..., 0, 0, None, None])
    states = []
    for added_by_chunk, share in zip(added.unbind(-3), remains.unbind(-1)):
        states.append(S.expand(added_by_chunk.shape))  # (..., d, d)
        S = share[..., None, None] * S + added_by_chunk

    # What the tokens read of the state, decayed from the chunk's start to them.
    decayed = q * since_start.exp().to(q.dtype)[..., None]
    before = decayed @ torch.stack(states, -3).to(q.dtype)  # (..., n, T, d)
    return (within + before).flatten(-3, -2)[..., :L, :]
