"""The convolution as products with Toeplitz matrices, by Triton: `numerics.wants_toeplitz` says
when it is used.

It reads and writes each number a few times, where the FFTs take some twenty passes, and spends L^2
D multiply-adds per image. It has run in Triton's interpreter and been compiled for NVIDIA GPUs, but
never been timed on one.

B batch   D channels   J positions   M tokens per position   L = J M tokens
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = tl.constexpr(64)  # tokens
IMAGES = tl.constexpr(16)  # images of a tile; the least that tensor cores take


@triton.jit
def _load(x, image, token, B, L, M, strides):
    """The numbers x[image, j, m] of tokens jM + m, where they exist; `strides` are those of images,
    j and m.
    """
    at = image * strides[0] + (token // M) * strides[1] + (token % M) * strides[2]
    return tl.load(x + at, mask=(image < B) & (token >= 0) & (token < L), other=0.0)


@triton.jit
def _add_product(total, a, b):
    """total + a b, by tensor cores in TensorFloat-32: in one product of 11 bits for bfloat16, three
    for float32.
    """
    precision: tl.constexpr = "tf32x3" if a.dtype == tl.float32 else "tf32"
    return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=precision)


@triton.jit
def _one_sided(x, K, image, first, B, L, M, strides, CAUSAL: tl.constexpr):
    """sum_k x[image, k] K[|l - k|] for a tile of tokens l from `first` on, over k <= l if CAUSAL,
    else over k >= l.
    """
    token = first + tl.arange(0, TILE)[None, :]
    total = tl.zeros((IMAGES, TILE), dtype=tl.float32)
    start, stop = (0, first + TILE) if CAUSAL else (first, L)
    for k_0 in range(start, stop, TILE):
        k = k_0 + tl.arange(0, TILE)
        part = _load(x, image, k[None, :], B, L, M, strides)
        lag = (token - k[:, None]) if CAUSAL else (k[:, None] - token)
        taps = tl.load(K + lag, mask=(lag >= 0) & (lag < L), other=0.0)
        total = _add_product(total, part, taps)
    return total


@triton.jit
def _forward(u, K, y, B, D, L, M, u_d, y_d, u_strides, y_strides):
    """y[:, d] and y[:, D + d] of one tile of tokens and images: u by the causal and the anticausal
    kernel.
    """
    d, first = tl.program_id(0), tl.program_id(1) * TILE
    image = tl.program_id(2) * IMAGES + tl.arange(0, IMAGES)[:, None]
    token = first + tl.arange(0, TILE)[None, :]
    at = image * y_strides[0] + (token // M) * y_strides[1] + (token % M) * y_strides[2]
    exists = (image < B) & (token < L)
    ahead = _one_sided(u + d * u_d, K + d * L, image, first, B, L, M, u_strides, True)
    tl.store(y + d * y_d + at, ahead, mask=exists)
    back = _one_sided(u + d * u_d, K + (D + d) * L, image, first, B, L, M, u_strides, False)
    tl.store(y + (D + d) * y_d + at, back, mask=exists)


@triton.jit
def _backward_input(dy, K, du, B, D, L, M, dy_d, du_d, dy_strides, du_strides):
    """du[:, d] of one tile: the gradients of both directions, each by its own kernel in the other
    direction.
    """
    d, first = tl.program_id(0), tl.program_id(1) * TILE
    image = tl.program_id(2) * IMAGES + tl.arange(0, IMAGES)[:, None]
    token = first + tl.arange(0, TILE)[None, :]
    total = _one_sided(dy + d * dy_d, K + d * L, image, first, B, L, M, dy_strides, False)
    total += _one_sided(
        dy + (D + d) * dy_d, K + (D + d) * L, image, first, B, L, M, dy_strides, True
    )
    at = image * du_strides[0] + (token // M) * du_strides[1] + (token % M) * du_strides[2]
    tl.store(du + d * du_d + at, total, mask=(image < B) & (token < L))


@triton.jit
def _backward_taps(dy, u, parts, B, D, L, M, dy_d, u_d, dy_strides, u_strides):
    """The gradient of the taps with lags around n TILE, of one channel and direction.

    G[i, q] is the sum of dy[l + i] u[k + q] over images and over tiles l and k that are n tiles
    apart. Its diagonals i - q = c >= 0 have the lag n TILE + c and go to parts[..., n, 0, c]. Those
    with i - q = c - TILE < 0 have the lag (n - 1) TILE + c and go to parts[..., n, 1, c].
    """
    d, n, direction = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dy += (direction * D + d) * dy_d
    i, tiles = tl.arange(0, TILE), tl.cdiv(L, TILE)
    G = tl.zeros((TILE, TILE), dtype=tl.float32)
    for tile in range(n, tiles):
        near, far = (tile - n) * TILE + i, tile * TILE + i
        token = far if direction == 0 else near
        k = near if direction == 0 else far
        for b in range(0, B, IMAGES):
            image = b + tl.arange(0, IMAGES)
            grad = _load(dy, image[None, :], token[:, None], B, L, M, dy_strides)
            inputs = _load(u + d * u_d, image[:, None], k[None, :], B, L, M, u_strides)
            G = _add_product(G, grad, inputs)
    G = G if direction == 0 else tl.trans(G)  # the lag is i - q in both directions
    row, c = i[:, None], i[None, :]
    # [i, c] is G[i, i - c], or G[i, i - c + TILE]
    sheared = tl.gather(G, (row - c + TILE) % TILE, 1)
    at = parts + ((direction * D + d) * (tiles + 1) + n) * 2 * TILE + i
    tl.store(at, tl.sum(tl.where(row >= c, sheared, 0.0), 0))
    tl.store(at + TILE, tl.sum(tl.where(row < c, sheared, 0.0), 0))


class ToeplitzConvolution(torch.autograd.Function):
    """u (B, D, J, M), taps K (2, D, L) in float32 -> y (B, 2D, J, M), with the memory layout (M,
    2D, B, J).

    Taps and products have 11 bits for u in bfloat16, and about 22 in float32; sums are in float32.
    """

    @staticmethod
    def forward(ctx, u: Tensor, K: Tensor) -> Tensor:
        K = K.contiguous()
        ctx.save_for_backward(u, K)
        return convolve(u, K, u.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        u, K = ctx.saved_tensors
        B, D, J, M = u.shape
        L, tiles = J * M, triton.cdiv(J * M, TILE.value)
        du = u.new_empty(M, D, B, J).permute(2, 1, 3, 0)
        sizes = (B, D, L, M, dy.stride(1), du.stride(1), _strides(dy), _strides(du))
        _backward_input[_grid(u)](dy, K, du, *sizes)
        parts = K.new_zeros(2, D, tiles + 1, 2, TILE.value)
        sizes = (B, D, L, M, dy.stride(1), u.stride(1), _strides(dy), _strides(u))
        _backward_taps[(D, tiles, 2)](dy, u, parts, *sizes)
        dK = parts[:, :, :-1, 0] + parts[:, :, 1:, 1]  # (2, D, tiles, TILE)
        return du, dK.flatten(2)[..., :L]


def convolve(u: Tensor, K: Tensor, dtype: torch.dtype) -> Tensor:
    """The convolution without a gradient, with y in `dtype`."""
    B, D, J, M = u.shape
    y = u.new_empty(M, 2 * D, B, J, dtype=dtype).permute(2, 1, 3, 0)
    _forward[_grid(u)](u, K, y, B, D, J * M, M, u.stride(1), y.stride(1), _strides(u), _strides(y))
    return y


def _grid(u: Tensor) -> tuple[int, int, int]:
    B, D, J, M = u.shape
    return D, triton.cdiv(J * M, TILE.value), triton.cdiv(B, IMAGES.value)


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(2), x.stride(3)
