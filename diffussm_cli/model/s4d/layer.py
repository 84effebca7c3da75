"""The S4D layer: a bidirectional diagonal state space layer (Gu et al. 2022, arXiv 2206.11893).
Read this file first.

    B batch   D channels   J positions   M tokens per position   L = J M tokens
    N state size: N/2 complex modes

`kernel.py` turns the parameters into the taps of a convolution, `convolution.py` applies them by
FFT, `chunks.py` and `fused.py` (by Triton) chunk by chunk, and `reference.py` computes the same
slowly from the definitions.

Everything in this package is float32 whatever the rest of the model is (float64 in tests): rounding
log_dt alone to bfloat16 changes the kernel by 35%. The first dimension of a parameter is the
direction: 0 forward (causal), 1 backward.
"""

import math

import torch
from torch import Tensor, nn

from diffussm_cli.model.mixer import COMPLEX_PRODUCT, Sizes, StateSpace, fft_macs
from diffussm_cli.model.s4d.chunks import (
    Chunked,
    chunk_convolution,
    chunk_length,
    chunked_kernel,
)
from diffussm_cli.model.s4d.convolution import (
    Convolution,
    KernelSpectra,
    convolve,
    convolve_slices,
    fft_length,
    kernel_spectra,
)
from diffussm_cli.model.s4d.kernel import kernel_macs, s4d_kernel
from diffussm_cli.model.s4d.numerics import chosen_convolution, in_forward_mode, no_autocast

KEEP_BYTES = 1 << 29  # the most that the spectra kept by one layer may take


class S4D(StateSpace):
    """Bidirectional S4D layer: u (B, D, J, M) -> concat(forward, backward) (B, 2D, J, M), in the
    dtype of `u`.

    Token (j, m) is number l = j M + m of the sequence. A flat sequence also works: u (B, D, L) ->
    (B, 2D, L). The grid of an image, which other mixers use, is ignored.

    There are 194 parameters per channel and direction at N = 64, never in less than float32. They
    are initialised by S4D-Lin: Re A = -1/2, Im A = pi n, log dt uniform between log dt_min and log
    dt_max, B = 1, C ~ CN(0, 1), D_skip ~ N(0, 1).

    The environment variable DIFFUSSM_CONVOLUTION chooses how training convolves: `fft`, `chunk` or
    `triton`.

    Inside `kept_kernels` the spectra are computed once. They take 16 D (L + 1) bytes or slightly
    more per layer and length. Beyond KEEP_BYTES they are computed slice by slice instead, so that
    memory stays bounded.
    """

    def __init__(self, D: int, N: int, dt_min: float = 1e-3, dt_max: float = 1e-1):
        super().__init__()
        if N < 2 or N % 2:
            raise ValueError(f"d_state must be even and at least 2, got {N}")
        self.dt_min, self.dt_max = dt_min, dt_max

        # The first axis: along the sequence, and against it.
        self.log_dt = nn.Parameter(torch.empty(2, D))
        self.log_A_real = nn.Parameter(torch.empty(2, D, N // 2))
        self.A_imag = nn.Parameter(torch.empty(2, D, N // 2))
        self.B = nn.Parameter(torch.empty(2, D, N // 2, 2))
        self.C = nn.Parameter(torch.empty(2, D, N // 2, 2))
        self.D_skip = nn.Parameter(torch.empty(2, D))

        self.reset_parameters()

    @classmethod
    def of(cls, sizes: Sizes) -> "S4D":
        return cls(sizes.D, sizes.N)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.log_dt.uniform_(math.log(self.dt_min), math.log(self.dt_max))
        self.log_A_real.fill_(math.log(0.5))
        self.A_imag.copy_(math.pi * torch.arange(self.A_imag.shape[-1], device=self.A_imag.device))
        self.B.copy_(torch.tensor([1.0, 0.0], device=self.B.device))
        self.C.normal_(std=math.sqrt(0.5))
        self.D_skip.normal_()

    def forward(self, u: Tensor, _grid: tuple[int, int] | None = None) -> Tensor:
        """u (B, D, J, M) -> (B, 2D, J, M): forward beside backward, in the dtype of `u`."""
        if u.ndim == 3:
            return self(u[..., None])[..., 0]
        if not len(u):  # FFTs need an image
            return torch.cat([u, u], dim=1)

        L = u.shape[2] * u.shape[3]
        dtype = self.log_dt.dtype
        with no_autocast(u.device):
            # Forward mode of autograd, which a backward pass by hand does not know.
            if in_forward_mode():
                S = kernel_spectra(self.taps(L)) if torch.is_grad_enabled() else self.spectra(L)
                y = convolve(u.flatten(2).to(dtype), S)  # (B, 2D, L)
                return y.unflatten(2, u.shape[2:]).to(u.dtype)

            # Training, by backward passes that are written by hand.
            if torch.is_grad_enabled():
                choice = chosen_convolution()
                if choice == "chunk":
                    return chunk_convolution(u, self.chunked(L))
                if choice == "triton":
                    from diffussm_cli.model.s4d.fused import fused_convolution

                    return fused_convolution(u, *self.kernel_parameters())
                return Convolution.apply(u, KernelSpectra.apply(self.taps(L)))

            # Inference: the kernels are kept if the memory allows, or else computed in slices.
            if torch.compiler.is_compiling() or 16 * u.shape[1] * (L + 1) > KEEP_BYTES:
                return convolve_slices(
                    u, lambda channels: kernel_spectra(self.taps(L, channels)), dtype
                )
            return convolve_slices(u, lambda channels: self.spectra(L)[:, channels], dtype)

    def taps(self, L: int, channels: slice = slice(None)) -> Tensor:
        """The kernels of both directions, including the skip, (2, d, L), for all channels or a
        slice of them.
        """
        log_dt, log_A_real, A_imag, B, C, D_skip = (
            p[:, channels] for p in self.kernel_parameters()
        )
        with no_autocast(log_dt.device):
            return s4d_kernel(log_dt.exp(), -log_A_real.exp(), A_imag, B, C, L, D_skip)

    def chunked(self, L: int) -> Chunked:
        """What the convolution of L tokens by chunks needs of the parameters."""
        with no_autocast(self.log_dt.device):
            return chunked_kernel(*self.kernel_parameters(), chunk_length(L))

    def kernel_parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """All parameters, in the order in which kernels are made of them."""
        return self.log_dt, self.log_A_real, self.A_imag, self.B, self.C, self.D_skip

    def spectra(self, L: int) -> Tensor:
        """Spectra for length L without gradients, (2, D, F), kept inside `kept_kernels`."""
        # While a model is traced, sizes are tensors.
        return self.keep(int(L), lambda: kernel_spectra(self.taps(L)))

    def macs(self, L: int, _grid: tuple[int, int]) -> dict[str, float]:
        D = self.log_dt.shape[-1]
        n = fft_length(L)
        return {
            "FFT": 3 * D * fft_macs(n),  # one forward transform, two inverse
            "spectra": 2 * D * (n // 2 + 1) * COMPLEX_PRODUCT,
        }

    def kernel_macs(self, L: int, _grid: tuple[int, int]) -> float:
        D, half_N = self.A_imag.shape[-2:]
        return 2 * D * (kernel_macs(L, 2 * half_N) + fft_macs(fft_length(L)))

    def saved(self) -> float:
        return 0  # u, and of short sequences its spectra

    def saved_kernels(self, L: int, _grid: tuple[int, int]) -> float:
        return 4 * self.log_dt.shape[-1] * L  # as complex spectra
