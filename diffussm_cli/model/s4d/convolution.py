"""Convolution of a sequence with the kernels of both directions, by FFT, and its gradient.

B batch   D channels   J positions   M tokens per position   L = J M tokens   n FFT length   F = n/2 + 1
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffussm_cli.model.s4d.numerics import slices_of


def fft_length(L: int) -> int:
    """The smallest even n >= 2L - 1 without prime factors above 7: long enough for a linear convolution with L taps."""
    n = max(2, 2 * L - 1 + (2 * L - 1) % 2)
    while not _is_smooth(n):
        n += 2
    return n


def _is_smooth(n: int) -> bool:
    for p in (2, 3, 5, 7):
        while n % p == 0:
            n = n // p  # not in place: while a model is traced, sizes are tensors
    return n == 1


def kernel_spectra(K: Tensor, padded: Tensor | None = None) -> Tensor:
    """The spectra that the convolution multiplies by: K (2, D, L) -> (2, D, F), complex.

    The backward direction is a correlation, hence the conjugate. Successive calls may share the buffer `padded`,
    (2, >= D, n), in which K is padded; it must be zero beyond L.
    """
    if padded is None:
        padded = K.new_zeros(*K.shape[:2], fft_length(K.shape[-1]))
    S = torch.fft.rfft(copy_into_padded(K[..., None], padded))
    S[1].conj_physical_()
    return S


def convolve(u: Tensor, spectra: Tensor) -> Tensor:
    """Both directions at once: u (B, D, L), spectra (2, D, F) -> y (B, 2D, L), forward channels first.

    y_fwd[l] = sum_{j<=l} K_fwd[l-j] u[j],  y_bwd[l] = sum_{j>=l} K_bwd[j-l] u[j].
    """
    L, n = u.shape[-1], 2 * (spectra.shape[-1] - 1)
    U = torch.fft.rfft(u, n=n)  # (B, D, F)
    y = torch.fft.irfft(U[:, None] * spectra, n=n)[..., :L]  # (B, 2, D, L)
    return y.flatten(1, 2)


def convolve_slices(u: Tensor, spectra: Callable[[slice], Tensor], dtype: torch.dtype, share: int = 1) -> Tensor:
    """`convolve` on a few channels at a time, so that the data between two transforms stay in the cache.

    Args:
        u: (B, D, J, M), the sequence split into l = j M + m; its memory layout may be (M, D, B, J).
        spectra: returns the spectra of a slice of the channels, (2, d, F).
        dtype: real dtype of the transforms.
        share: as in `slices`.

    Returns:
        y (B, 2D, J, M) in the dtype of u, with the memory layout (M, 2D, B, J).
    """
    B, D, J, M = u.shape
    L, n = J * M, fft_length(J * M)
    y = u.new_empty(M, 2, D, B, J).permute(3, 1, 2, 4, 0)  # (B, 2, D, J, M)
    parts = slices(u, share)
    padded = u.new_zeros(B, parts[0].stop, n, dtype=dtype)
    for channels in parts:
        S = spectra(channels)  # (2, d, F)
        U = torch.fft.rfft(copy_into_padded(u[:, channels], padded))  # (B, d, F)
        for direction in (0, 1):
            copy_back(torch.fft.irfft(U * S[direction], n=n)[..., :L], y[:, direction, channels])
    return y.flatten(1, 2)


def copy_into_padded(u: Tensor, padded: Tensor) -> Tensor:
    """Write u (B, d, J, M) as a sequence l = jM + m into the first rows of `padded` (B, >= d, n); returns them."""
    d, J, M = u.shape[1:]
    rows = padded[:, :d]
    for m in range(M):  # one m at a time: twice as fast as a single copy, whose innermost loops would be M long
        rows[..., m : J * M : M].copy_(u[..., m])
    return rows


def copy_back(v: Tensor, y: Tensor) -> None:
    """The inverse: copy v (B, d, L) into y (B, d, J, M), in the dtype of y."""
    v, M = v.to(y.dtype), y.shape[-1]
    for m in range(M):
        y[..., m].copy_(v[..., m::M])


def slices(u: Tensor, share: int = 1) -> list[slice]:
    """Slices of the channels of u (B, D, J, M) whose transforms fit into the cache; a single slice when compiled.

    `share` is the number of slices in use at a time, which share the cache. On a GPU slices are much larger.
    """
    B, D, J, M = u.shape
    return slices_of(D, share * B * J * M, u.device)


class Convolution(torch.autograd.Function):
    """`convolve_slices` by kernels, with its own backward: u (B, D, J, M), K (2, D, L) -> (B, 2D, J, M).

    Autograd's backward of a real transform runs a complex transform of full length and saves spectra. This one needs
    only real transforms and saves only u and K.
    """

    @staticmethod
    def forward(ctx, u: Tensor, K: Tensor) -> Tensor:
        ctx.save_for_backward(u, K)
        padded = K.new_zeros(2, slices(u, share=2)[0].stop, fft_length(K.shape[-1]))
        return convolve_slices(u, lambda channels: kernel_spectra(K[:, channels], padded), K.dtype, share=2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        u, K = ctx.saved_tensors
        B, D, J, M = u.shape
        L, n = J * M, fft_length(J * M)
        dy = dy.unflatten(1, (2, D))  # (B, 2, D, J, M)
        du, dK = u.new_empty(M, D, B, J).permute(2, 1, 3, 0), torch.empty_like(K)
        parts = slices(u, share=2)
        padded, padded_K = K.new_zeros(B, parts[0].stop, n), K.new_zeros(2, parts[0].stop, n)
        for c in parts:
            S = kernel_spectra(K[:, c], padded_K)
            U = torch.fft.rfft(copy_into_padded(u[:, c], padded))  # (B, d, F)
            dU = torch.zeros_like(U)  # conjugated, like everything below
            for direction in (0, 1):
                dY = torch.fft.rfft(copy_into_padded(dy[:, direction, c], padded)).conj_physical_()
                dU.addcmul_(dY, S[direction])
                lags = (U * dY).sum(0)  # (d, F); those of the backward kernel are mirrored
                lags = lags if direction else lags.conj_physical_()
                dK[direction, c] = torch.fft.irfft(lags, n=n)[..., :L]
            copy_back(torch.fft.irfft(dU.conj_physical_(), n=n)[..., :L], du[:, c])
        return du, dK
