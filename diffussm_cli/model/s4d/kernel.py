"""The S4D kernel from its parameters, computed in two levels, and its gradient.

D channels   L taps   N state size: N/2 complex modes   R rows: the channels of both directions
l = a T + b
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffussm_cli.model.mixer import COMPLEX_PRODUCT
from diffussm_cli.model.s4d.numerics import (
    full_float32_products,
    in_forward_mode,
    no_autocast,
    slices_of,
    worth_keeping,
)


def s4d_kernel(
    dt: Tensor,
    A_real: Tensor,
    A_imag: Tensor,
    B: Tensor,
    C: Tensor,
    L: int,
    D_skip: Tensor | None = None,
    one_level: bool = False,
) -> Tensor:
    """K[l] = 2 Re sum_n C_bar[n] exp(dt A[n] l) for l = 0..L-1, as a batched real matrix product.

    With l = aT + b the Vandermonde sum over L columns factors into exp(dt A aT) and exp(dt A b),
    each about sqrt(L) wide. Each of these is built from two tables in the same way.
    `s4d_kernel_naive` is the same sum written out.

    Args:
        dt: step sizes, (..., D).
        A_real, A_imag: the N/2 poles, (..., D, N/2), A_real < 0.
        B, C: input and output vectors as (real, imaginary) pairs, (..., D, N/2, 2).
        L: number of taps.
        D_skip: added to the tap at lag 0, (..., D).
        one_level: compute all N/2 x L exponentials. That takes fewer operators, so it is faster if
            they are few.

    Returns:
        K, (..., D, L), in the dtype of `dt`.
    """
    # dt A = x + iy                 (..., D, N/2)
    x, y = dt[..., None] * A_real, dt[..., None] * A_imag
    re, im = discretise(x, y, A_real, A_imag, B, C)
    # (R, N/2): one row per channel and direction
    modes = [t.flatten(0, -2) for t in (re, im, x, y)]

    by_hand = torch.is_grad_enabled() and not in_forward_mode()  # the backward pass
    if one_level:
        one: Callable[..., Tensor] = ModesInOneLevel.apply if by_hand else _sum_in_one_level
        K = one(*modes, L).unflatten(0, dt.shape)
        if D_skip is None:
            return K
        return torch.cat([K[..., :1] + D_skip[..., None], K[..., 1:]], dim=-1)

    skip = torch.zeros_like(dt) if D_skip is None else D_skip
    sum_of_modes: Callable[..., Tensor] = Modes.apply if by_hand else _sum_of_modes
    return sum_of_modes(*modes, skip.flatten(), L).unflatten(0, dt.shape)


def _sum_of_modes(
    re: Tensor,
    im: Tensor,
    x: Tensor,
    y: Tensor,
    skip: Tensor,
    L: int,
    kept: list[Tensor] | None = None,
) -> Tensor:
    """2 Re sum_n (re + i im) exp((x + iy) l), l = 0..L-1, and skip at l = 0: (R, N/2) four times,
    (R,) -> (R, L).

    `kept` takes the tables of exponentials.
    """
    A, T = levels(L)
    K = re.new_empty(len(re), A, T)

    for rows in _row_slices(re, T):
        # exp(dt A aT) (r, A, N/2), exp(dt A b) (r, T, N/2)
        outer, inner = _tables(x[rows], y[rows], A, T)
        # 2 C_bar exp(dt A aT)
        weighted = torch.complex(2 * re[rows], 2 * im[rows])[:, None] * outer
        # Re(v w) is the inner product of v and conj(w) as pairs of numbers
        factors = _pairs(weighted), _pairs(inner.conj_physical()).mT
        with full_float32_products():
            if in_forward_mode():  # autograd sees these operators, and has no rule for `out`
                K[rows] = torch.bmm(*factors)
            else:
                torch.bmm(*factors, out=K[rows])
        if kept is not None:
            kept += [outer, inner]

    K[:, 0, 0] += skip
    return K.flatten(1)[:, :L]


class Modes(torch.autograd.Function):
    """`_sum_of_modes` that saves for the backward pass only its arguments and, if they are small,
    the tables.

    With W_k = sum_l dK[l] l^k exp((x + iy) l), the gradients are 2 Re W_0 and -2 Im W_0 for C_bar,
    2 Re (C_bar W_1) and -2 Im (C_bar W_1) for x and y. Since l = aT + b, both sums run over one
    level as a product, then the other.
    """

    @staticmethod
    def forward(ctx, re: Tensor, im: Tensor, x: Tensor, y: Tensor, skip: Tensor, L: int) -> Tensor:
        kept: list[Tensor] | None = [] if worth_keeping(re.numel() * sum(levels(L))) else None
        K = _sum_of_modes(re, im, x, y, skip, L, kept)
        ctx.save_for_backward(re, im, x, y, *kept or [])
        return K

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dK: Tensor) -> tuple[Tensor | None, ...]:
        re, im, x, y, *kept = ctx.saved_tensors
        A, T = levels(dK.shape[-1])

        # dK as (R, A, T), padded with zeros beyond L
        if dK.shape[-1] < A * T:
            dK = torch.nn.functional.pad(dK, (0, A * T - dK.shape[-1]))
        dK = dK.unflatten(-1, (A, T))

        # the lags of both levels, l = a + b here
        a = torch.arange(A, device=x.device, dtype=x.dtype) * T
        b = torch.arange(T, device=x.device, dtype=x.dtype)

        gradients = torch.empty(4, *re.shape, device=re.device, dtype=re.dtype)
        for i, rows in enumerate(_row_slices(re, T)):
            outer, inner = kept[2 * i : 2 * i + 2] if kept else _tables(x[rows], y[rows], A, T)

            # W_0 and W_1, each summed over one level, then over the other
            with no_autocast(x.device), full_float32_products():
                over_b = _pairs(outer * _complex(dK[rows] @ _pairs(inner)))  # (r, A, N)
                over_a = _pairs(inner * _complex(dK[rows].mT @ _pairs(outer)))  # (r, T, N)
                W0 = _complex(over_b.sum(-2))
                W1 = _complex(a @ over_b + b @ over_a)

            C_bar_W1 = torch.complex(re[rows], im[rows]) * W1
            gradients[:, rows] = 2 * torch.stack([W0.real, -W0.imag, C_bar_W1.real, -C_bar_W1.imag])

        return *gradients, dK[:, 0, 0], None


def _sum_in_one_level(
    re: Tensor, im: Tensor, x: Tensor, y: Tensor, L: int, kept: list[Tensor] | None = None
) -> Tensor:
    """`_sum_of_modes` without a skip, from all its exponentials: (R, N/2) four times -> (R, L).

    `kept` takes l and the exponentials as real and imaginary parts, (R, N, L).
    """
    l = torch.arange(L, device=x.device, dtype=x.dtype)  # noqa: E741
    decay, angle = without_denormals(torch.exp(x[..., None] * l)), y[..., None] * l
    powers = torch.cat([decay * torch.cos(angle), decay * torch.sin(angle)], dim=1)
    if kept is not None:
        kept += [l, powers]
    with full_float32_products():
        return torch.bmm(torch.cat([2 * re, -2 * im], dim=1)[:, None], powers)[:, 0]


class ModesInOneLevel(torch.autograd.Function):
    """`_sum_in_one_level` with its own backward: the gradients are those of `Modes`, with sums over
    l.
    """

    @staticmethod
    def forward(ctx, re: Tensor, im: Tensor, x: Tensor, y: Tensor, L: int) -> Tensor:
        kept: list[Tensor] = []
        K = _sum_in_one_level(re, im, x, y, L, kept)
        ctx.save_for_backward(re, im, *kept)
        return K

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dK: Tensor) -> tuple[Tensor | None, ...]:
        re, im, l, powers = ctx.saved_tensors  # noqa: E741
        with no_autocast(re.device), full_float32_products():
            W = torch.bmm(powers, torch.stack([dK, dK * l], dim=-1))  # (R, N, 2)
        (W0_re, W1_re), (W0_im, W1_im) = (half.unbind(-1) for half in W.chunk(2, dim=1))
        d_x = 2 * (re * W1_re - im * W1_im)
        d_y = -2 * (re * W1_im + im * W1_re)
        return 2 * W0_re, -2 * W0_im, d_x, d_y, None


def without_denormals(decay: Tensor) -> Tensor:
    """Set decay factors below tiny^(1/4) to 0: a product of four others is never denormal.

    A denormal number takes a CPU a hundred times as long, and half of the modes decay that far
    within 4096 tokens.
    """
    return torch.where(decay < torch.finfo(decay.dtype).tiny ** 0.25, 0.0, decay)


def levels(L: int) -> tuple[int, int]:
    """A and T of l = aT + b, 0 <= a < A and 0 <= b < T; T is a power of two near sqrt(L)."""
    T = 1 << math.ceil(math.log2(L) / 2)
    return math.ceil(L / T), T


def kernel_macs(L: int, N: int) -> float:
    """Multiply-adds of a kernel of L taps, for one channel and direction."""
    A, T = levels(L)
    tables = (_table_size(A) + A + _table_size(T)) * N // 2 * COMPLEX_PRODUCT
    return N * A * T + tables


def _table_size(count: int) -> int:
    """The size of the product of two short tables that holds at least `count` powers."""
    p = math.ceil(math.sqrt(count))
    return p * math.ceil(count / p)


def _row_slices(re: Tensor, T: int) -> list[slice]:
    """Slices of the rows of re (R, N/2) whose tables of powers fit into the cache; a single slice
    when compiled.
    """
    rows, half_N = re.shape
    return slices_of(rows, half_N * T, re.device)


def _tables(x: Tensor, y: Tensor, A: int, T: int) -> tuple[Tensor, Tensor]:
    """exp((x + iy) aT), a < A, and exp((x + iy) b), b < T: (R, N/2) -> (R, A, N/2) and (R, T, N/2).

    Each is the product of two short tables, so that about 2 sqrt(A) + 2 sqrt(T) exponentials are
    computed per mode.
    """
    p, q = math.ceil(math.sqrt(A)), math.ceil(math.sqrt(T))
    counts = [p, math.ceil(A / p), q, math.ceil(T / q)]
    steps = [T, p * T, 1, q]
    ranges = [torch.arange(n, device=x.device) * step for n, step in zip(counts, steps)]
    l = torch.cat(ranges)  # noqa: E741

    fine_a, coarse_a, fine_b, coarse_b = _exponentials(x, y, l).split(counts, dim=1)
    outer, inner = coarse_a[:, :, None] * fine_a[:, None], coarse_b[:, :, None] * fine_b[:, None]
    return outer.flatten(1, 2)[:, :A], inner.flatten(1, 2)[:, :T]


def _exponentials(x: Tensor, y: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """exp((x + iy) l): (R, N/2) and l (n,) -> (R, n, N/2), by exp, cos and sin."""
    l = l[:, None].to(x.dtype)  # noqa: E741
    decay, angle = without_denormals(torch.exp(x[:, None] * l)), y[:, None] * l
    return torch.complex(decay * torch.cos(angle), decay * torch.sin(angle))


def _pairs(z: Tensor) -> Tensor:
    """(..., n) complex -> (..., 2n) real, without a copy."""
    return torch.view_as_real(z).flatten(-2)


def _complex(pairs: Tensor) -> Tensor:
    """(..., 2n) real -> (..., n) complex, without a copy."""
    return torch.view_as_complex(pairs.unflatten(-1, (-1, 2)))


def discretise(
    x: Tensor, y: Tensor, A_real: Tensor, A_imag: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor]:
    """C_bar = C B (exp(dt A) - 1) / A by zero-order hold, real and imaginary parts, each (..., D,
    N/2).

    exp - 1 uses expm1: plain subtraction has an error of 4e-5 at small dt.
    """
    half_sin = torch.sin(y / 2)
    # exp(x + iy) - 1
    zre = torch.expm1(x) * torch.cos(y) - 2 * half_sin**2
    zim = torch.exp(x) * torch.sin(y)

    # divided by A
    square = A_real**2 + A_imag**2
    zre, zim = (zre * A_real + zim * A_imag) / square, (zim * A_real - zre * A_imag) / square

    # times C B
    bre = B[..., 0] * C[..., 0] - B[..., 1] * C[..., 1]
    bim = B[..., 0] * C[..., 1] + B[..., 1] * C[..., 0]
    return bre * zre - bim * zim, bre * zim + bim * zre
