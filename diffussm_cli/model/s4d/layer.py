"""The S4D layer: a bidirectional diagonal state space layer (Gu et al. 2022, arXiv 2206.11893). Read this file first.

    B batch   D channels   J positions   M tokens per position   L = J M tokens   N state size: N/2 complex modes

`kernel.py` turns the parameters into the taps of a convolution, `convolution.py` applies them, and `reference.py`
computes the same slowly from the definitions.

Everything in this package is float32 whatever the rest of the model is (float64 in tests): rounding log_dt alone to
bfloat16 changes the kernel by 35%. The first dimension of a parameter is the direction: 0 forward (causal), 1 backward.
"""

import math

import torch
from torch import Tensor, nn

from diffussm_cli.model.s4d.convolution import Convolution, KernelSpectra, convolve_slices, kernel_spectra
from diffussm_cli.model.s4d.kernel import s4d_kernel
from diffussm_cli.model.s4d.numerics import no_autocast, wants_toeplitz

KEEP_BYTES = 1 << 29  # the most that the spectra kept by one layer may take


class S4D(nn.Module):
    """Bidirectional S4D layer: u (B, D, J, M) -> concat(forward, backward) (B, 2D, J, M), in the dtype of `u`.

    Token (j, m) is number l = j M + m of the sequence. A flat sequence also works: u (B, D, L) -> (B, 2D, L). The grid
    of an image, which other mixers use, is ignored.

    There are 194 parameters per channel and direction at N = 64. They stay float32 under `.half()`, `.to(bfloat16)`
    and autocast; `.double()` is honoured. They are initialised by S4D-Lin: Re A = -1/2, Im A = pi n, log dt uniform
    between log dt_min and log dt_max, B = 1, C ~ CN(0, 1), D_skip ~ N(0, 1).

    Without gradients the spectra are kept until a parameter changes, so that sampling computes them once and not at
    each denoising step. They take 16 D (L + 1) bytes or slightly more per layer and length. Beyond KEEP_BYTES they are
    computed slice by slice instead, so that memory stays bounded. Compiled code computes them at each call.
    """

    def __init__(self, D: int, N: int, dt_min: float = 1e-3, dt_max: float = 1e-1):
        super().__init__()
        if N < 2 or N % 2:
            raise ValueError(f"d_state must be even and at least 2, got {N}")
        self.dt_min, self.dt_max = dt_min, dt_max
        self.log_dt = nn.Parameter(torch.empty(2, D))
        self.log_A_real = nn.Parameter(torch.empty(2, D, N // 2))
        self.A_imag = nn.Parameter(torch.empty(2, D, N // 2))
        self.B = nn.Parameter(torch.empty(2, D, N // 2, 2))
        self.C = nn.Parameter(torch.empty(2, D, N // 2, 2))
        self.D_skip = nn.Parameter(torch.empty(2, D))
        self._kept: dict[int, tuple[tuple, Tensor]] = {}
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.log_dt.uniform_(math.log(self.dt_min), math.log(self.dt_max))
        self.log_A_real.fill_(math.log(0.5))
        self.A_imag.copy_(math.pi * torch.arange(self.A_imag.shape[-1], device=self.A_imag.device))
        self.B.copy_(torch.tensor([1.0, 0.0], device=self.B.device))
        self.C.normal_(std=math.sqrt(0.5))
        self.D_skip.normal_()

    def forward(self, u: Tensor, _grid: tuple[int, int] | None = None) -> Tensor:
        if u.ndim == 3:
            return self(u[..., None])[..., 0]
        L, dtype = u.shape[2] * u.shape[3], self.log_dt.dtype
        with no_autocast(u.device):
            if torch.is_grad_enabled():
                if wants_toeplitz(u):
                    from diffussm_cli.model.s4d.toeplitz import ToeplitzConvolution

                    return ToeplitzConvolution.apply(u, self.taps(L))
                return Convolution.apply(u, KernelSpectra.apply(self.taps(L)))
            if torch.compiler.is_compiling() or 16 * u.shape[1] * (L + 1) > KEEP_BYTES:
                return convolve_slices(u, lambda channels: kernel_spectra(self.taps(L, channels)), dtype)
            return convolve_slices(u, lambda channels: self.spectra(L)[:, channels], dtype)

    def taps(self, L: int, channels: slice = slice(None)) -> Tensor:
        """The kernels of both directions, including the skip, (2, d, L), for all channels or a slice of them."""
        parameters = (self.log_dt, self.log_A_real, self.A_imag, self.B, self.C, self.D_skip)
        log_dt, log_A_real, A_imag, B, C, D_skip = (p[:, channels] for p in parameters)
        with no_autocast(log_dt.device):
            return s4d_kernel(log_dt.exp(), -log_A_real.exp(), A_imag, B, C, L, D_skip)

    def spectra(self, L: int) -> Tensor:
        """Spectra for length L without gradients, (2, D, F), kept until a parameter changes."""
        state = tuple((p.data_ptr(), p._version) for p in self.parameters())
        if L not in self._kept or self._kept[L][0] != state:
            self._kept[L] = (state, kernel_spectra(self.taps(L)))
        return self._kept[L][1]

    def forget_kernels(self) -> None:
        """Free the kept spectra."""
        self._kept.clear()

    def train(self, mode: bool = True) -> "S4D":
        self.forget_kernels()
        return super().train(mode)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.forget_kernels()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn, recurse: bool = True) -> "S4D":
        """Called by `.to`, `.cuda`, `.half` and the like: changes the device; precision stays at least float32."""
        self.forget_kernels()

        def keep_precision(t: Tensor) -> Tensor:
            wanted = fn(t.new_empty(0))
            if wanted.dtype in (torch.float32, torch.float64):
                return fn(t)
            return t.to(wanted.device, torch.float32)

        return super()._apply(keep_precision, recurse)
