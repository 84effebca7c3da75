"""The convolution by chunks in two kernels of Triton: the same function as `chunks.py`.

A row is a channel and direction, and a program computes a row for a tile of images. It loops over
the chunks, with the states of the N/2 modes in registers. A product within the chunk, with a
Toeplitz matrix of the first taps, and one with the state before the chunk give its outputs.

The gradient of u is the same scan with the tokens in the other order. The gradients of the modes
are sums over pairs of tokens, for which `_sums` scans u once more: no state is kept.

Products are in the dtype of u, states and sums in float32 (float64 in the interpreter, for tests).
Nobody has timed this on a GPU yet.

B batch   D channels   R rows of an input: D or 2D   J positions   M tokens per position   L = J M
C tokens of a chunk   N state size: N/2 complex modes, as real and imaginary parts
H the modes of a tile: a power of two from 16 on
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffussm_cli.errors import ConfigError
from diffussm_cli.model.s4d.chunks import power
from diffussm_cli.model.s4d.kernel import Modes, discretise
from diffussm_cli.model.s4d.numerics import CONVOLUTION

CHUNK = 64  # tokens: the least that wgmma takes
MOST_STATES = 128  # N, whose tables and states fit into registers
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


# ----------------------------------------------------------------------------------------- kernels
@triton.jit
def _times(a_re, a_im, b_re, b_im):
    """The product of complex numbers."""
    return a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re


@triton.jit
def _dot(a, b, total):
    """total + a b, by the matrix unit."""
    if INTERPRETED and a.dtype == tl.bfloat16:  # whose bits the interpreter takes for integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, out_dtype=total.dtype)


@triton.jit
def _row(D):
    """The row of this program: both directions of a channel side by side, which read the same u."""
    i = tl.program_id(0)
    return i // 2 + i % 2 * D


@triton.jit
def _order(is_reversed, C: tl.constexpr, M: tl.constexpr):
    """The tokens of a chunk in the order of memory, where J is innermost and M outermost: j, m, and
    how far each is from the token at which the scan comes into the chunk.
    """
    i = tl.arange(0, C)
    j, m = i % (C // M), i // (C // M)
    token = j * M + m
    return j, m, tl.where(is_reversed, C - 1 - token, token)


@triton.jit
def _place(r, j, m, image, R, B, J):
    """Where x (M, R, B, J) holds the tokens (j, m) of row r % R and images, and whether it does."""
    at = (m[:, None] * R + r % R).to(tl.int64) * B * J + image[None, :] * J + j[:, None]
    return at, (j[:, None] < J) & (image[None, :] < B)


@triton.jit
def _powers(powers, r, h, lag, modes, rows, C: tl.constexpr):
    """exp(dt A lag) of row r, modes h and lags that broadcast against each other."""
    at = powers + (r * modes + h) * (C + 1) + lag
    re = tl.load(at, mask=h < modes, other=0.0)
    return re, tl.load(at + rows * modes * (C + 1), mask=h < modes, other=0.0)


@triton.jit
def _scan(
    x, taps, re, im, powers, y, D, R, B, J, chunks, modes,
    ADJOINT: tl.constexpr, C: tl.constexpr, M: tl.constexpr, H: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    """y (M, 2D, B, J) of a row and a tile of images: x (M, R, B, J) by the kernel of the row."""
    r = _row(D)
    image = tl.program_id(1) * IMAGES + tl.arange(0, IMAGES)
    is_reversed = (r >= D) != ADJOINT
    j, m, near = _order(is_reversed, C, M)
    h = tl.arange(0, H)

    # Within a chunk (C, C); into the state (H, C), out of it (C, H), and on to the next chunk.
    lag = near[:, None] - near[None, :]
    within = tl.load(taps + r * C + lag, mask=lag >= 0, other=0.0).to(x.dtype.element_ty)
    in_re, in_im = _powers(powers, r, h[:, None], C - 1 - near[None, :], modes, 2 * D, C)
    out_re, out_im = _powers(powers, r, h[None, :], near[:, None] + 1, modes, 2 * D, C)
    next_re, next_im = _powers(powers, r, h[:, None], C, modes, 2 * D, C)
    in_re, in_im = in_re.to(within.dtype), in_im.to(within.dtype)
    out_re, out_im = out_re.to(within.dtype), (-out_im).to(within.dtype)
    c_re = 2 * tl.load(re + r * modes + h[:, None], mask=h[:, None] < modes, other=0.0)
    c_im = 2 * tl.load(im + r * modes + h[:, None], mask=h[:, None] < modes, other=0.0)

    # From chunk to chunk, with the state (H, IMAGES) before each.
    s_re = tl.zeros((H, IMAGES), dtype=powers.dtype.element_ty)
    s_im = tl.zeros((H, IMAGES), dtype=powers.dtype.element_ty)
    for i in range(chunks):
        chunk = tl.where(is_reversed, chunks - 1 - i, i)
        at, exists = _place(r, chunk * (C // M) + j, m, image, R, B, J)
        tile = tl.load(x + at, mask=exists, other=0.0)

        v_re, v_im = _times(c_re, c_im, s_re, s_im)
        total = tl.zeros((C, IMAGES), dtype=powers.dtype.element_ty)
        total = _dot(within, tile, total)
        total = _dot(out_re, v_re.to(tile.dtype), total)
        total = _dot(out_im, v_im.to(tile.dtype), total)
        to, exists = _place(r, chunk * (C // M) + j, m, image, 2 * D, B, J)
        tl.store(y + to, total, mask=exists)

        s_re, s_im = _times(next_re, next_im, s_re, s_im)
        s_re = _dot(in_re, tile, s_re)
        s_im = _dot(in_im, tile, s_im)


@triton.jit
def _sums(
    u, dy, powers, dtaps, W, D, B, J, chunks, modes,
    C: tl.constexpr, M: tl.constexpr, H: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    """What the gradients of a row need, summed over images.

    Of lags within a chunk, dtaps (2D, C): sum of dy[l] u[l - lag]. Of pairs of tokens in different
    chunks, W_k (2D, N/2) for k = 0, 1: sum of dy[l] u[l - lag] lag^k exp(dt A lag), of which real
    and imaginary parts are written to W (4, 2D, N/2).
    """
    r = _row(D)
    is_reversed = r >= D
    j, m, near = _order(is_reversed, C, M)
    h = tl.arange(0, H)
    dtype: tl.constexpr = u.dtype.element_ty

    # A lag is `far`, from a token to the end of its chunk, and `here`, from there to a later token.
    far, here = C - 1 - near[None, :], near[None, :] + 1
    in_re, in_im = _powers(powers, r, h[:, None], far, modes, 2 * D, C)
    out_re, out_im = _powers(powers, r, h[:, None], here, modes, 2 * D, C)
    next_re, next_im = _powers(powers, r, h[:, None], C, modes, 2 * D, C)
    in1_re, in1_im = (in_re * far).to(dtype), (in_im * far).to(dtype)
    out1_re, out1_im = (out_re * here).to(dtype), (out_im * here).to(dtype)
    in_re, in_im = in_re.to(dtype), in_im.to(dtype)
    out_re, out_im = out_re.to(dtype), out_im.to(dtype)

    zero = tl.zeros((H, IMAGES), dtype=powers.dtype.element_ty)
    W0_re, W0_im, W1_re, W1_im = zero, zero, zero, zero
    G = tl.zeros((C, C), dtype=powers.dtype.element_ty)  # dy[p] u[q], summed over chunks
    for b in range(0, B, IMAGES):
        image = b + tl.arange(0, IMAGES)
        # The state s, and t: with far in the sum, as the derivative by dt A has it.
        s_re, s_im, t_re, t_im = zero, zero, zero, zero
        for i in range(chunks):
            chunk = tl.where(is_reversed, chunks - 1 - i, i)
            at, exists = _place(r, chunk * (C // M) + j, m, image, D, B, J)
            tile = tl.load(u + at, mask=exists, other=0.0)
            at, exists = _place(r, chunk * (C // M) + j, m, image, 2 * D, B, J)
            grad = tl.load(dy + at, mask=exists, other=0.0)
            G = _dot(grad, tl.trans(tile), G)

            # Pairs of a token here and one in an earlier chunk.
            g_re, g_im = _dot(out_re, grad, zero), _dot(out_im, grad, zero)
            f_re, f_im = _dot(out1_re, grad, zero), _dot(out1_im, grad, zero)
            a_re, a_im = _times(g_re, g_im, s_re, s_im)
            W0_re, W0_im = W0_re + a_re, W0_im + a_im
            a_re, a_im = _times(f_re, f_im, s_re, s_im)
            b_re, b_im = _times(g_re, g_im, t_re, t_im)
            W1_re, W1_im = W1_re + a_re + b_re, W1_im + a_im + b_im

            # On to the next chunk, which is C further away.
            t_re, t_im = _times(next_re, next_im, t_re + C * s_re, t_im + C * s_im)
            t_re, t_im = _dot(in1_re, tile, t_re), _dot(in1_im, tile, t_im)
            s_re, s_im = _times(next_re, next_im, s_re, s_im)
            s_re, s_im = _dot(in_re, tile, s_re), _dot(in_im, tile, s_im)

    # The diagonals of G: in row p, the token that is `lag` nearer.
    lag = tl.arange(0, C)
    nearer = near[:, None] - lag[None, :]
    token = tl.where(is_reversed, C - 1 - nearer, nearer)
    q = tl.where(nearer >= 0, token % M * (C // M) + token // M, 0)
    diagonals = tl.where(nearer >= 0, tl.gather(G, q, 1), 0.0)
    tl.store(dtaps + r * C + lag, tl.sum(diagonals, 0))

    to, stride = W + r * modes + h, 2 * D * modes
    tl.store(to, tl.sum(W0_re, 1), mask=h < modes)
    tl.store(to + stride, tl.sum(W0_im, 1), mask=h < modes)
    tl.store(to + 2 * stride, tl.sum(W1_re, 1), mask=h < modes)
    tl.store(to + 3 * stride, tl.sum(W1_im, 1), mask=h < modes)


def _tile(x: Tensor, modes: int, images: int) -> dict[str, int]:
    """What the kernels are compiled for: x (M, R, B, J), and the most images of a tile."""
    H = max(16, triton.next_power_of_2(modes))
    return {"C": CHUNK, "M": len(x), "H": H, "IMAGES": 16 if x.shape[2] <= 16 else images}


# --------------------------------------------------------- as operators, which torch.compile knows
@torch.library.custom_op("diffussm::chunk_scan", mutates_args=())
def scan(x: Tensor, taps: Tensor, re: Tensor, im: Tensor, powers: Tensor, adjoint: bool) -> Tensor:
    """x (M, R, B, J) -> y (M, 2D, B, J) in the dtype of x, each row by its own kernel.

    Args:
        taps: (2D, C), the first taps with the skip.
        re, im: (2D, N/2), C_bar.
        powers: (2, 2D, N/2, C + 1), real and imaginary parts of exp(dt A l), l = 0..C.
        adjoint: whether rows run in the other direction.
    """
    M, R, B, J = x.shape
    rows, modes = re.shape
    y, tile = x.new_empty(M, rows, B, J), _tile(x, modes, 32)
    grid = rows, triton.cdiv(B, tile["IMAGES"])
    sizes = (rows // 2, R, B, J, triton.cdiv(J * M, CHUNK), modes)
    with torch.cuda.device_of(x):
        _scan[grid](x, taps, re, im, powers, y, *sizes, ADJOINT=adjoint, **tile)
    return y


@scan.register_fake
def _(x, taps, *_):
    return x.new_empty(len(x), len(taps), *x.shape[2:])


@torch.library.custom_op("diffussm::chunk_sums", mutates_args=())
def sums(u: Tensor, dy: Tensor, powers: Tensor) -> tuple[Tensor, Tensor]:
    """u (M, D, B, J), dy (M, 2D, B, J) -> dtaps (2D, C) and W (4, 2D, N/2), as in `_sums`."""
    M, D, B, J = u.shape
    modes = powers.shape[2]
    dtaps, W = powers.new_empty(2 * D, CHUNK), powers.new_empty(4, 2 * D, modes)
    sizes = (D, B, J, triton.cdiv(J * M, CHUNK), modes)
    with torch.cuda.device_of(u):
        # tiles of 32 images would not fit into registers
        _sums[(2 * D,)](u, dy, powers, dtaps, W, *sizes, **_tile(u, modes, 16))
    return dtaps, W


@sums.register_fake
def _(u, dy, powers):  # noqa: ARG001
    rows, modes = powers.shape[1:3]
    return powers.new_empty(rows, CHUNK), powers.new_empty(4, rows, modes)


# ------------------------------------------------------------------------------------- convolution
class Fused(torch.autograd.Function):
    """u (M, D, B, J), taps (2D, C), and C_bar = re + i im and dt A = x + iy (2D, N/2) -> y (M, 2D,
    B, J).
    """

    @staticmethod
    def forward(
        ctx, u: Tensor, taps: Tensor, re: Tensor, im: Tensor, x: Tensor, y: Tensor
    ) -> Tensor:
        lags = torch.arange(CHUNK + 1, device=x.device)
        powers = torch.stack(power(x[..., None], y[..., None], lags))
        ctx.save_for_backward(u, taps, re, im, powers)
        return scan(u, taps, re, im, powers, False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, ...]:
        u, taps, re, im, powers = ctx.saved_tensors
        dy = dy.contiguous()
        du = scan(dy, taps, re, im, powers, True).unflatten(1, (2, -1)).sum(1)

        # Of the modes, as in `Modes`.
        dtaps, (W0_re, W0_im, W1_re, W1_im) = sums(u, dy, powers)
        d_x = 2 * (re * W1_re - im * W1_im)
        d_y = -2 * (re * W1_im + im * W1_re)
        return du, dtaps, 2 * W0_re, -2 * W0_im, d_x, d_y


def fused_convolution(
    u: Tensor,
    log_dt: Tensor,
    log_A_real: Tensor,
    A_imag: Tensor,
    B: Tensor,
    C: Tensor,
    D_skip: Tensor,
) -> Tensor:
    """u (B, D, J, M) and the parameters of `S4D` -> y (B, 2D, J, M) in the dtype of u, with the
    memory layout (M, 2D, B, J).

    Raises:
        ConfigError: u is on a CPU or not in 16 bits, except in the interpreter; or N is too large.
    """
    M, modes = u.shape[3], A_imag.shape[-1]
    _check(u, modes)
    if CHUNK % M:  # a chunk would end within a position
        y = fused_convolution(u.flatten(2)[..., None], log_dt, log_A_real, A_imag, B, C, D_skip)
        return y.reshape(*y.shape[:2], -1, M)

    # The modes, and the first taps.
    dt, A_real = log_dt.exp(), -log_A_real.exp()
    x, y = dt[..., None] * A_real, dt[..., None] * A_imag
    re, im = discretise(x, y, A_real, A_imag, B, C)
    rows = [t.flatten(0, 1) for t in (re, im, x, y)]
    taps = Modes.apply(*rows, D_skip.flatten(), CHUNK)

    result = Fused.apply(u.permute(3, 1, 0, 2).contiguous(), taps.contiguous(), *rows)
    return result.permute(2, 1, 3, 0)


def _check(u: Tensor, modes: int) -> None:
    if 2 * modes > MOST_STATES:
        raise ConfigError(
            f"{CONVOLUTION}: triton takes model.d_state up to {MOST_STATES}, and it is "
            f"{2 * modes}; choose fft or chunk"
        )
    if INTERPRETED.value:
        return
    if u.device.type not in ("cuda", "meta"):
        raise ConfigError(
            f"{CONVOLUTION}: triton needs a GPU, but the device is {u.device.type}; choose fft"
        )
    if u.element_size() != 2:
        raise ConfigError(
            f"{CONVOLUTION}: triton computes in 16 bits; set train.precision=bf16, or choose fft"
        )
