"""The convolution as a scan over chunks of the sequence, in real arithmetic and batched products.

Within a chunk of T tokens the convolution is a product with a Toeplitz matrix of the first T taps.
What came before a chunk reaches it through the states of the N/2 modes at its beginning: a product
makes the contribution of each chunk to the state, the states are scanned from chunk to chunk, and
another product turns them into outputs. The backward direction is the same from the other end. The
cost is linear in L, and it is the same function as the convolution by FFT.

Products are in the dtype of u, states and taps in float32 (float64 in tests).

B batch   D channels   J positions   M tokens per position   L = J M tokens
T tokens of a chunk   n chunks   N state size: N/2 complex modes, as N real numbers
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffussm_cli.model.s4d.kernel import discretise, s4d_kernel, without_denormals

CHUNK = 128  # tokens, the most


def chunk_length(L: int) -> int:
    """T, so that L tokens fill chunks of at most CHUNK as evenly as they can."""
    return math.ceil(L / math.ceil(L / CHUNK))


class Chunked(NamedTuple):
    """What the convolution of chunks needs of the parameters, in their dtype; 2 is the direction.

    The states before a chunk are those of tokens from the nearest on: `entering` weighs its tokens
    for the state behind it, `leaving` the state for its tokens.
    """

    taps: Tensor  # (2, D, T), with the skip
    entering: Tensor  # (2, D, T, N)
    leaving: Tensor  # (2, D, N, T)
    x: Tensor  # (2, D, N/2), dt A = x + iy
    y: Tensor


def chunked_kernel(
    log_dt: Tensor, log_A_real: Tensor, A_imag: Tensor, B: Tensor, C: Tensor, D_skip: Tensor, T: int
) -> Chunked:
    """The taps of a chunk, and the exponentials of its modes, from the parameters of `S4D`."""
    dt, A_real = log_dt.exp(), -log_A_real.exp()
    taps = s4d_kernel(dt, A_real, A_imag, B, C, T, D_skip)
    x, y = dt[..., None] * A_real, dt[..., None] * A_imag
    re, im = discretise(x, y, A_real, A_imag, B, C)

    # exp(dt A l), l = 0..T, and 2 C_bar exp(dt A l), l = 1..T: (2, D, N/2, T + 1 or T)
    later = torch.arange(T + 1, device=x.device)
    powers_re, powers_im = power(x[..., None], y[..., None], later)
    later_re, later_im = powers_re[..., 1:], powers_im[..., 1:]
    out_re = 2 * (re[..., None] * later_re - im[..., None] * later_im)
    out_im = 2 * (re[..., None] * later_im + im[..., None] * later_re)

    # A token of the forward direction is as far from the end of its chunk as one of the backward
    # direction from the beginning.
    entering = torch.cat([powers_re[..., :T], powers_im[..., :T]], dim=2)
    leaving = torch.cat([out_re, -out_im], dim=2)
    entering = torch.stack([entering[0].flip(-1), entering[1]]).mT
    leaving = torch.stack([leaving[0], leaving[1].flip(-1)])
    return Chunked(taps, entering, leaving, x, y)


def power(x: Tensor, y: Tensor, l: Tensor | int) -> tuple[Tensor, Tensor]:  # noqa: E741
    """exp((x + iy) l) as real and imaginary parts, in the shape of x l."""
    decay, angle = without_denormals(torch.exp(x * l)), y * l
    return decay * torch.cos(angle), decay * torch.sin(angle)


class Toeplitz(torch.autograd.Function):
    """Taps (2, D, T) -> matrices (2, D, T, T) for rows of tokens, in a dtype: [0, d, q, p] is the
    tap at lag p - q, [1, d, q, p] that at lag q - p, and 0 where the lag is negative.
    """

    @staticmethod
    def forward(ctx, taps: Tensor, dtype: torch.dtype) -> Tensor:
        T = taps.shape[-1]
        ctx.dtype = taps.dtype
        token = torch.arange(T, device=taps.device)
        lag = token[None, :] - token[:, None]
        padded = F.pad(taps, (T - 1, 0)).to(dtype)
        return torch.stack([padded[0][:, lag + T - 1], padded[1][:, T - 1 - lag]])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        """Sums along the diagonals: rows that grow by one place shift them into columns."""
        T = gradient.shape[-1]
        g = torch.stack([gradient[0], gradient[1].mT]).to(ctx.dtype)
        # row q of 2T places is read as one of 2T - 1, so that column p - q + T - 1 is a diagonal
        flat = F.pad(g.flip(-2), (0, T)).flatten(-2)[..., : T * (2 * T - 1)]
        return flat.unflatten(-1, (T, 2 * T - 1)).sum(-2)[..., T - 1 :], None


def states_before(s: Tensor, x: Tensor, y: Tensor, T: int) -> Tensor:
    """The state before each chunk: s (2, D, B, n, N), what each chunk adds -> (2, D, B, n, N).

    The backward direction runs from the last chunk to the first.
    """
    decay_re, decay_im = power(x, y, T)
    a, b = decay_re[:, :, None], decay_im[:, :, None]
    both = [Scan.apply(*s[i].chunk(2, dim=-1), a[i], b[i], i == 1) for i in (0, 1)]
    return torch.stack([torch.cat(state, dim=-1) for state in both])


class Scan(torch.autograd.Function):
    """h[i + 1] = (a + ib) h[i] + s[i] from h[0] = 0 on: real and imaginary parts of s (D, B, n,
    N/2) and a, b (D, 1, N/2) -> those of h, as s. If `back`, from the last chunk to the first.

    The gradient of s is the same scan in the other order of the gradient of h, with a - ib.
    """

    @staticmethod
    def forward(
        ctx, re: Tensor, im: Tensor, a: Tensor, b: Tensor, back: bool
    ) -> tuple[Tensor, Tensor]:
        h_re, h_im = _scan(re, im, a, b, back)
        ctx.back = back
        ctx.save_for_backward(a, b, h_re, h_im)
        return h_re, h_im

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_re: Tensor, d_im: Tensor) -> tuple[Tensor | None, ...]:
        a, b, h_re, h_im = ctx.saved_tensors
        ds_re, ds_im = _scan(d_re, d_im, a, -b, not ctx.back)
        # summed over images and chunks: the gradient of a + ib is ds times conj(h)
        da = torch.addcmul(ds_re * h_re, ds_im, h_im).sum((1, 2))[:, None]
        db = torch.addcmul(ds_im * h_re, ds_re, h_im, value=-1).sum((1, 2))[:, None]
        return ds_re, ds_im, da, db, None


def _scan(re: Tensor, im: Tensor, a: Tensor, b: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    n = re.shape[2]
    h_re, h_im = torch.zeros_like(re[:, :, 0]), torch.zeros_like(im[:, :, 0])
    states = [(h_re, h_im)]
    for i in range(n - 1, 0, -1) if back else range(n - 1):
        h_re, h_im = (
            torch.addcmul(torch.addcmul(re[:, :, i], a, h_re), b, h_im, value=-1),
            torch.addcmul(torch.addcmul(im[:, :, i], a, h_im), b, h_re),
        )
        states.append((h_re, h_im))

    if back:
        states.reverse()
    all_re, all_im = zip(*states)
    return torch.stack(all_re, dim=2), torch.stack(all_im, dim=2)


def chunk_convolution(u: Tensor, kernel: Chunked) -> Tensor:
    """u (B, D, J, M) -> y (B, 2D, J, M) in the dtype of u, with the memory layout (M, 2D, B, J)."""
    B, D, J, M = u.shape
    L, T = J * M, kernel.taps.shape[-1]
    n = math.ceil(L / T)

    # Rows of T tokens; zeros behind the last token change nothing before it.
    rows = F.pad(u.permute(1, 0, 2, 3).reshape(D, B, L), (0, n * T - L)).reshape(D, B * n, T)

    # Within the chunks.
    within = Toeplitz.apply(kernel.taps, u.dtype)
    y = [torch.bmm(rows, matrices) for matrices in within]

    # From chunk to chunk: (2, D, B, n, N).
    if n > 1:
        entering = torch.cat([kernel.entering[0], kernel.entering[1]], dim=-1).to(u.dtype)
        added = torch.bmm(rows, entering).to(kernel.x.dtype)
        added = added.view(D, B, n, 2, -1).permute(3, 0, 1, 2, 4)
        before = states_before(added, kernel.x, kernel.y, T).to(u.dtype).flatten(2, 3)
        leaving = kernel.leaving.to(u.dtype)
        y = [torch.baddbmm(y[i], before[i], leaving[i]) for i in (0, 1)]

    result = torch.cat(y).view(2 * D, B, n * T)[..., :L].unflatten(-1, (J, M))
    return result.permute(3, 0, 1, 2).contiguous().permute(2, 1, 3, 0)
