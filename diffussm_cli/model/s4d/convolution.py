"""Convolution of a sequence with the kernels of both directions, by FFT, and its gradient.

B batch   D channels   J positions   M tokens per position   L = J M tokens
n FFT length   F = n/2 + 1
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffussm_cli.model.s4d.numerics import slices_of, worth_keeping


def fft_length(L: int) -> int:
    """The smallest even n >= 2L - 1 without prime factors above 7: long enough for a linear
    convolution with L taps.
    """
    n = max(2, 2 * L - 1 + (2 * L - 1) % 2)
    while not _is_smooth(n):
        n += 2
    return n


def _is_smooth(n: int) -> bool:
    for p in (2, 3, 5, 7):
        while n % p == 0:
            n = n // p  # not in place: while a model is traced, sizes are tensors
    return n == 1


def kernel_spectra(K: Tensor) -> Tensor:
    """The factors of the convolution: K (..., 2, D, L) -> (..., 2, D, F), complex, in slices that
    fit into the cache.

    They are divided by n, so that the inverse transforms need no scaling. The backward direction is
    a correlation, hence its conjugate.
    """
    D, L = K.shape[-2:]
    n = fft_length(L)
    parts = slices_of(D, K.numel() // D, K.device)
    S = torch.cat([torch.fft.rfft(K[..., channels, :] / n, n=n) for channels in parts], dim=-2)
    S.select(-3, 1).conj_physical_()
    return S


class KernelSpectra(torch.autograd.Function):
    """`kernel_spectra` for training. The gradient of S is what `Convolution` gives: sum_b dY
    conj(U).
    """

    @staticmethod
    def forward(ctx, K: Tensor) -> Tensor:
        ctx.L = K.shape[-1]
        return kernel_spectra(K)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dS: Tensor) -> Tensor:
        dS = dS.clone()
        dS.select(-3, 1).conj_physical_()
        return torch.fft.irfft(dS, n=fft_length(ctx.L))[..., : ctx.L]


def convolve(u: Tensor, spectra: Tensor) -> Tensor:
    """Both directions at once: u (B, D, L), spectra (2, D, F) -> y (B, 2D, L), forward channels
    first.

    y_fwd[l] = sum_{j<=l} K_fwd[l-j] u[j],  y_bwd[l] = sum_{j>=l} K_bwd[j-l] u[j].
    """
    L, n = u.shape[-1], 2 * (spectra.shape[-1] - 1)
    U = torch.fft.rfft(u, n=n)  # (B, D, F)
    y = torch.fft.irfft(U[:, None] * spectra, n=n, norm="forward")[..., :L]  # (B, 2, D, L)
    return y.flatten(1, 2)


def convolve_slices(
    u: Tensor,
    spectra: Callable[[slice], Tensor],
    dtype: torch.dtype,
    share: int = 1,
    kept: list[Tensor] | None = None,
) -> Tensor:
    """`convolve` on a few channels at a time, so that the data between two transforms stay in the
    cache.

    Args:
        u: (B, D, J, M), the sequence split into l = j M + m; its memory layout may be (M, D, B, J).
        spectra: returns the spectra of a slice of the channels, (2, d, F).
        dtype: real dtype of the transforms.
        share: as in `slices`.
        kept: if it is a list, the spectra of u, (B, d, F) per slice, are appended to it, for the
            backward pass.

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
            copy_back(
                torch.fft.irfft(U * S[direction], n=n, norm="forward")[..., :L],
                y[:, direction, channels],
            )
        if kept is not None:
            kept.append(U)

    return y.flatten(1, 2)


def copy_into_padded(u: Tensor, padded: Tensor) -> Tensor:
    """Write u (B, d, J, M) as a sequence l = jM + m into the first rows of `padded` (B, >= d, n);
    returns them.
    """
    d, J, M = u.shape[1:]
    rows = padded[:, :d]
    # one m at a time: twice as fast as a single copy, whose innermost loops would be M long
    for m in range(M):
        rows[..., m : J * M : M].copy_(u[..., m])
    return rows


def copy_back(v: Tensor, y: Tensor) -> None:
    """The inverse: copy v (B, d, L) into y (B, d, J, M), in the dtype of y."""
    v = v.to(y.dtype)
    M = y.shape[-1]
    for m in range(M):
        y[..., m].copy_(v[..., m::M])


def slices(u: Tensor, share: int = 1) -> list[slice]:
    """Slices of the channels of u (B, D, J, M) whose transforms fit into the cache; a single slice
    when compiled.

    `share` is the number of slices in use at a time, which share the cache. On a GPU slices are
    much larger.
    """
    B, D, J, M = u.shape
    return slices_of(D, share * B * J * M, u.device)


class Convolution(torch.autograd.Function):
    """`convolve_slices` with its own backward: u (B, D, J, M), S (2, D, F) of `KernelSpectra` ->
    (B, 2D, J, M).

    Autograd's backward of a real transform runs a complex transform of full length. This one needs
    only real transforms. It saves u and S, and of short sequences the spectra of u.
    """

    @staticmethod
    def forward(ctx, u: Tensor, S: Tensor) -> Tensor:
        kept: list[Tensor] | None = [] if worth_keeping(len(u) * S[0].numel()) else None
        y = convolve_slices(u, lambda channels: S[:, channels], S.real.dtype, share=2, kept=kept)
        ctx.save_for_backward(u, S, *kept or [])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        u, S, *kept = ctx.saved_tensors
        B, D, J, M = u.shape
        L, n = J * M, fft_length(J * M)
        dy = dy.unflatten(1, (2, D))  # (B, 2, D, J, M)
        du = u.new_empty(M, D, B, J).permute(2, 1, 3, 0)  # (B, D, J, M)
        dS = torch.empty_like(S)

        parts = slices(u, share=2)
        padded = S.real.new_zeros(B, parts[0].stop, n)
        for i, c in enumerate(parts):
            # conj(U); kept spectra stay as they are for another backward pass
            U = kept[i] if kept else torch.fft.rfft(copy_into_padded(u[:, c], padded))  # (B, d, F)
            U = U.conj_physical() if kept else U.conj_physical_()

            # dS = sum_b conj(U) dY, and dU = conj(S) dY, summed over both directions
            S_c = S[:, c].conj_physical()
            dU = torch.zeros((), dtype=S.dtype, device=S.device)
            for direction in (0, 1):
                dY = torch.fft.rfft(copy_into_padded(dy[:, direction, c], padded))
                dS[direction, c] = (U * dY).sum(0)
                dU = torch.addcmul(dU, dY, S_c[direction])

            copy_back(torch.fft.irfft(dU, n=n, norm="forward")[..., :L], du[:, c])

        return du, dS
