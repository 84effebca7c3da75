"""S4D: a bidirectional diagonal state space layer (Gu et al. 2022, arXiv 2206.11893).

    B batch   D channels   L tokens   N state size: N/2 complex modes and their conjugates   n FFT length   F = n/2 + 1

Everything in this file is float32 whatever the rest of the model is (float64 for tests): log_dt rounded to bfloat16
alone moves the kernel by 35%. Directions are stacked in front: index 0 is forward (causal), 1 backward (anti-causal).
"""

import contextlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffussm_cli.device import full_float32

SLICE = {True: 1 << 19, False: 1 << 26}  # numbers in a slice of u: for a CPU's cache, and for other devices
KEEP_BYTES = 1 << 29  # of spectra that one layer keeps while its weights stay as they are


# ------------------------------------------------------------------------------------------------ the kernel
def s4d_kernel(
    dt: Tensor, A_real: Tensor, A_imag: Tensor, B: Tensor, C: Tensor, L: int, D_skip: Tensor | None = None
) -> Tensor:
    """K[l] = 2 Re sum_n C_bar[n] exp(dt A[n] l) for l = 0..L-1, as a batched real matrix product.

    With l = aT + b the Vandermonde sum over L columns factors into exp(dt A aT) and exp(dt A b), each about sqrt(L)
    wide, and each of these is made of two tables in the same way. `s4d_kernel_naive` is the same sum written out.

    Args:
        dt: step sizes, (..., D).
        A_real, A_imag: the N/2 poles, (..., D, N/2), A_real < 0.
        B, C: input and output vectors as (real, imaginary) pairs, (..., D, N/2, 2).
        L: number of taps.
        D_skip: added to the tap at lag 0, (..., D).

    Returns:
        K, (..., D, L), in the dtype of `dt`.
    """
    x, y = dt[..., None] * A_real, dt[..., None] * A_imag  # dt A = x + iy                 (..., D, N/2)
    re, im = _discretise(x, y, A_real, A_imag, B, C)
    modes = [t.flatten(0, -2) for t in (re, im, x, y)]  # (R, N/2): a row for each channel
    skip = torch.zeros_like(dt) if D_skip is None else D_skip
    sum_of_modes = Modes.apply if torch.is_grad_enabled() else _sum_of_modes
    return sum_of_modes(*modes, skip.flatten(), L).unflatten(0, dt.shape)


def _sum_of_modes(re: Tensor, im: Tensor, x: Tensor, y: Tensor, skip: Tensor, L: int) -> Tensor:
    """2 Re sum_n (re + i im) exp((x + iy) l), l = 0..L-1, and skip at l = 0: (R, N/2) four times, (R,) -> (R, L)."""
    A, T = levels(L)
    K = re.new_empty(len(re), A, T)
    for rows in _row_slices(re, T):
        C_bar = torch.complex(2 * re[rows], 2 * im[rows])
        outer = C_bar[:, None] * _powers(x[rows], y[rows], A, T)  # 2 C_bar exp(dt A aT), (r, A, N/2)
        inner = _powers(x[rows], -y[rows], T)  # the conjugate of exp(dt A b), (r, T, N/2)
        with _full_float32():  # Re(v w) is the inner product of v and conj(w) as pairs of numbers
            torch.bmm(_pairs(outer), _pairs(inner).mT, out=K[rows])
    K[:, 0, 0] += skip
    return K.flatten(1)[:, :L]


class Modes(torch.autograd.Function):
    """`_sum_of_modes` that keeps nothing but its arguments for the backward pass.

    With W_k = sum_l dK[l] l^k exp((x + iy) l), the gradients are 2 Re W_0 and -2 Im W_0 for C_bar, 2 Re (C_bar W_1)
    and -2 Im (C_bar W_1) for x and y. As l = aT + b, both sums are taken over one level by a product, then the other.
    """

    @staticmethod
    def forward(ctx, re: Tensor, im: Tensor, x: Tensor, y: Tensor, skip: Tensor, L: int) -> Tensor:
        ctx.save_for_backward(re, im, x, y)
        return _sum_of_modes(re, im, x, y, skip, L)

    @staticmethod
    def backward(ctx, dK: Tensor) -> tuple[Tensor | None, ...]:
        re, im, x, y = ctx.saved_tensors
        A, T = levels(dK.shape[-1])
        if dK.shape[-1] < A * T:
            dK = torch.nn.functional.pad(dK, (0, A * T - dK.shape[-1]))
        dK = dK.unflatten(-1, (A, T))
        a = torch.arange(A, device=x.device, dtype=x.dtype) * T
        b = torch.arange(T, device=x.device, dtype=x.dtype)
        gradients = torch.empty(4, *re.shape, device=re.device, dtype=re.dtype)
        for rows in _row_slices(re, T):
            outer, inner = _powers(x[rows], y[rows], A, T), _powers(x[rows], y[rows], T)
            with _no_autocast(x.device), _full_float32():
                over_b = _pairs(outer * _complex(dK[rows] @ _pairs(inner)))  # (r, A, N)
                over_a = _pairs(inner * _complex(dK[rows].mT @ _pairs(outer)))  # (r, T, N)
                W0 = _complex(over_b.sum(-2))
                W1 = _complex(a @ over_b + b @ over_a)
            C_bar_W1 = torch.complex(re[rows], im[rows]) * W1
            gradients[:, rows] = 2 * torch.stack([W0.real, -W0.imag, C_bar_W1.real, -C_bar_W1.imag])
        return *gradients, dK[:, 0, 0], None


def levels(L: int) -> tuple[int, int]:
    """A and T of l = aT + b, 0 <= a < A and 0 <= b < T: T a power of two of about sqrt(L)."""
    T = 1 << math.ceil(math.log2(L) / 2)
    return math.ceil(L / T), T


def _row_slices(re: Tensor, T: int) -> list[slice]:
    """Slices of the rows of re (R, N/2) whose tables of powers fit into the cache; one on a GPU, or when compiled."""
    rows, half_N = re.shape
    return _cut(rows, half_N * T, re.device)


def _cut(count: int, numbers: int, device: torch.device) -> list[slice]:
    """Slices of `count` things of so many numbers each; one when compiled, for which sizes must not vary."""
    size = count if torch.compiler.is_compiling() else max(1, SLICE[device.type == "cpu"] // numbers)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _powers(x: Tensor, y: Tensor, count: int, step: int = 1) -> Tensor:
    """exp((x + iy) step l), l = 0..count-1: (R, N/2) -> (R, count, N/2), by products of two short tables."""
    p = math.ceil(math.sqrt(count))
    fine = _exponentials(x, y, p, step)  # (R, p, N/2)
    coarse = _exponentials(x, y, math.ceil(count / p), p * step)
    return (coarse[:, :, None] * fine[:, None]).flatten(1, 2)[:, :count]


def _exponentials(x: Tensor, y: Tensor, count: int, step: int) -> Tensor:
    """As `_powers`, each by exp, cos and sin; but 0 below a bound under which a product of four might be denormal.

    A CPU takes a hundred times as long for a denormal number, and half of the modes decay that far in 4096 tokens.
    """
    l = torch.arange(count, device=x.device, dtype=x.dtype)[:, None] * step  # noqa: E741
    decay, angle = torch.exp(x[:, None] * l), y[:, None] * l
    decay = torch.where(decay < torch.finfo(decay.dtype).tiny ** 0.25, 0.0, decay)
    return torch.complex(decay * torch.cos(angle), decay * torch.sin(angle))


def _pairs(z: Tensor) -> Tensor:
    """(..., n) complex -> (..., 2n) real, without a copy."""
    return torch.view_as_real(z).flatten(-2)


def _complex(pairs: Tensor) -> Tensor:
    """(..., 2n) real -> (..., n) complex, without a copy."""
    return torch.view_as_complex(pairs.unflatten(-1, (-1, 2)))


def _discretise(x: Tensor, y: Tensor, A_real: Tensor, A_imag: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """C_bar = C B (exp(dt A) - 1) / A by zero-order hold, real and imaginary parts, each (..., D, N/2).

    exp - 1 by expm1: plain subtraction costs 4e-5 at small dt.
    """
    half_sin = torch.sin(y / 2)
    zre, zim = torch.expm1(x) * torch.cos(y) - 2 * half_sin**2, torch.exp(x) * torch.sin(y)  # exp(x + iy) - 1
    square = A_real**2 + A_imag**2
    zre, zim = (zre * A_real + zim * A_imag) / square, (zim * A_real - zre * A_imag) / square
    bre, bim = B[..., 0] * C[..., 0] - B[..., 1] * C[..., 1], B[..., 0] * C[..., 1] + B[..., 1] * C[..., 0]
    return bre * zre - bim * zim, bre * zim + bim * zre


def _full_float32() -> contextlib.AbstractContextManager:
    """For products of the kernel. In compiled code the user's choice holds: it cannot change global switches."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else full_float32()


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    if device.type == "meta":  # knows no autocast
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def s4d_kernel_naive(dt: Tensor, A_real: Tensor, A_imag: Tensor, B: Tensor, C: Tensor, L: int) -> Tensor:
    """Reference for `s4d_kernel`, same arguments: the definition, in complex arithmetic."""
    A, B, C = torch.complex(A_real, A_imag), torch.view_as_complex(B), torch.view_as_complex(C)
    dtA = dt[..., None] * A
    C_bar = C * B * (torch.exp(dtA) - 1) / A
    powers = torch.exp(dtA[..., None] * torch.arange(L, device=dt.device, dtype=dt.dtype))  # (..., D, N/2, L)
    return 2 * (C_bar[..., None] * powers).sum(-2).real


# ------------------------------------------------------------------------------------------- the convolution
def fft_length(L: int) -> int:
    """The smallest even n >= 2L - 1 without prime factors above 7: room for a linear convolution of L taps."""
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
    """Spectra by which the convolution multiplies: K (2, D, L) -> (2, D, F), complex.

    The backward direction is a correlation, hence the conjugate. Many calls in turn may share memory to pad K in:
    `padded`, (2, >= D, n), zero beyond L.
    """
    if padded is None:
        padded = K.new_zeros(*K.shape[:2], fft_length(K.shape[-1]))
    S = torch.fft.rfft(_lay_out(K[..., None], padded))
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
    """`convolve` on a few channels at a time, so that what is between two transforms stays in the cache.

    Args:
        u: (B, D, J, M), the sequence split into l = j M + m; its memory may lie in M planes (M, D, B, J).
        spectra: gives those of a slice of the channels, (2, d, F).
        dtype: real, of the transforms.
        share: as in `slices`.

    Returns:
        y (B, 2D, J, M) of the dtype of u, its memory in planes (M, 2D, B, J).
    """
    B, D, J, M = u.shape
    L, n = J * M, fft_length(J * M)
    y = u.new_empty(M, 2, D, B, J).permute(3, 1, 2, 4, 0)  # (B, 2, D, J, M)
    parts = slices(u, share)
    padded = u.new_zeros(B, parts[0].stop, n, dtype=dtype)
    for channels in parts:
        S = spectra(channels)  # (2, d, F)
        U = torch.fft.rfft(_lay_out(u[:, channels], padded))  # (B, d, F)
        for direction in (0, 1):
            _take_in(torch.fft.irfft(U * S[direction], n=n)[..., :L], y[:, direction, channels])
    return y.flatten(1, 2)


def _lay_out(u: Tensor, padded: Tensor) -> Tensor:
    """Writes u (B, d, J, M) as a sequence l = jM + m into the rows of `padded` (B, >= d, n), and returns these."""
    d, J, M = u.shape[1:]
    rows = padded[:, :d]
    for m in range(M):  # place by place: twice as fast as one copy of all, whose innermost runs have M numbers
        rows[..., m : J * M : M].copy_(u[..., m])
    return rows


def _take_in(v: Tensor, y: Tensor) -> None:
    """The way back: v (B, d, L) into y (B, d, J, M), in the dtype of y."""
    v, M = v.to(y.dtype), y.shape[-1]
    for m in range(M):
        y[..., m].copy_(v[..., m::M])


def slices(u: Tensor, share: int = 1) -> list[slice]:
    """Slices of the channels of u (B, D, J, M) whose transforms fit into the cache; one on a GPU, or when compiled.

    Where more of them are at work at a time, each has but a share.
    """
    B, D, J, M = u.shape
    return _cut(D, share * B * J * M, u.device)


class Convolution(torch.autograd.Function):
    """`convolve_slices` by kernels, with its adjoint by hand: u (B, D, J, M), K (2, D, L) -> (B, 2D, J, M).

    Autograd's backward of a real transform runs a complex one of full length, and keeps spectra; this one needs real
    transforms only and keeps u and K.
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
            U = torch.fft.rfft(_lay_out(u[:, c], padded))  # (B, d, F)
            dU = torch.zeros_like(U)  # conjugate, as all that follows
            for direction in (0, 1):
                dY = torch.fft.rfft(_lay_out(dy[:, direction, c], padded)).conj_physical_()
                dU.addcmul_(dY, S[direction])
                lags = (U * dY).sum(0)  # (d, F); the backward kernel's are mirrored
                lags = lags if direction else lags.conj_physical_()
                dK[direction, c] = torch.fft.irfft(lags, n=n)[..., :L]
            _take_in(torch.fft.irfft(dU.conj_physical_(), n=n)[..., :L], du[:, c])
        return du, dK


def s4d_recurrence(
    u: Tensor, dt: Tensor, A_real: Tensor, A_imag: Tensor, B: Tensor, C: Tensor, D_skip: Tensor
) -> Tensor:
    """Reference for kernel and convolution together, one direction, as the state space model itself.

    x_l = exp(dt A) x_{l-1} + B (exp(dt A) - 1)/A u_l,  y_l = 2 Re C x_l + D u_l;  u (B, D, L) -> y (B, D, L).
    """
    A, B, C = torch.complex(A_real, A_imag), torch.view_as_complex(B), torch.view_as_complex(C)
    A_bar = torch.exp(dt[..., None] * A)
    B_bar = B * (A_bar - 1) / A
    x = torch.zeros(u.shape[0], *A_bar.shape, dtype=A_bar.dtype, device=u.device)  # (B, D, N/2)
    y = []
    for u_l in u.unbind(-1):
        x = A_bar * x + B_bar * u_l[..., None]
        y.append(2 * (C * x).sum(-1).real + D_skip * u_l)
    return torch.stack(y, dim=-1)


# ------------------------------------------------------------------------------------------------- the layer
class S4D(nn.Module):
    """Bidirectional S4D layer: u (B, D, J, M) -> concat(forward, backward) (B, 2D, J, M), in the dtype of `u`.

    The sequence is l = j M + m. It may also be given as it is, u (B, D, L) -> (B, 2D, L).

    Parameters are 194 numbers a channel and direction at N = 64, and stay float32 under `.half()`, `.to(bfloat16)`
    and autocast; `.double()` is honoured. Start: S4D-Lin, Re A = -1/2, Im A = pi n, log dt uniform in
    [dt_min, dt_max], B = 1, C ~ CN(0, 1), D_skip ~ N(0, 1).

    Without gradients the spectra are kept until a parameter changes, so that sampling builds them once and not at each
    denoising step. They take 16 D (L + 1) bytes a layer and length or a little more, and beyond KEEP_BYTES they are
    made slice by slice instead, so that memory stays bounded. Compiled code makes them at each call.
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

    def forward(self, u: Tensor) -> Tensor:
        if u.ndim == 3:
            return self(u[..., None])[..., 0]
        L, dtype = u.shape[2] * u.shape[3], self.log_dt.dtype
        with _no_autocast(u.device):
            if torch.is_grad_enabled():
                return Convolution.apply(u, self.taps(L))
            if torch.compiler.is_compiling() or 16 * u.shape[1] * (L + 1) > KEEP_BYTES:
                return convolve_slices(u, lambda channels: kernel_spectra(self.taps(L, channels)), dtype)
            return convolve_slices(u, lambda channels: self.spectra(L)[:, channels], dtype)

    def taps(self, L: int, channels: slice = slice(None)) -> Tensor:
        """The kernels of both directions, skip included, (2, d, L), of all channels or a slice of them."""
        parameters = (self.log_dt, self.log_A_real, self.A_imag, self.B, self.C, self.D_skip)
        log_dt, log_A_real, A_imag, B, C, D_skip = (p[:, channels] for p in parameters)
        with _no_autocast(log_dt.device):
            return s4d_kernel(log_dt.exp(), -log_A_real.exp(), A_imag, B, C, L, D_skip)

    def spectra(self, L: int) -> Tensor:
        """Spectra for length L without gradients, (2, D, F), kept until a parameter changes."""
        state = tuple((p.data_ptr(), p._version) for p in self.parameters())
        if L not in self._kept or self._kept[L][0] != state:
            self._kept[L] = (state, kernel_spectra(self.taps(L)))
        return self._kept[L][1]

    def forget_kernels(self) -> None:
        """Free the spectra that are kept."""
        self._kept.clear()

    def train(self, mode: bool = True) -> "S4D":
        self.forget_kernels()
        return super().train(mode)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.forget_kernels()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn, recurse: bool = True) -> "S4D":
        """What `.to`, `.cuda`, `.half` and their kin call: the device changes, precision stays at least float32."""
        self.forget_kernels()

        def keep_precision(t: Tensor) -> Tensor:
            wanted = fn(t.new_empty(0))
            if wanted.dtype in (torch.float32, torch.float64):
                return fn(t)
            return t.to(wanted.device, torch.float32)

        return super()._apply(keep_precision, recurse)
