"""State spaces along the rows and along the columns of an image, as matrix products, or along
many tokens as FFTs.

B batch   D channels   J positions   M tokens per position   H x W grid of tokens
V = W/M   N state size: N/2 modes   S side: W along a row, H along a column
lag: the place of the output less the place of the input, in tokens

In the first dimension of a parameter the axes are 0 along a row and 1 along a column; in the second
the directions are 0 forward (inputs at smaller places) and 1 backward.
"""

import math

import torch
from torch import Tensor, nn

from diffussm_cli.model.mixer import COMPLEX_PRODUCT, Sizes, StateSpace, fft_macs
from diffussm_cli.model.s4d.convolution import fft_length
from diffussm_cli.model.s4d.kernel import kernel_macs, s4d_kernel
from diffussm_cli.model.s4d.numerics import in_forward_mode, no_autocast
from diffussm_cli.model.s4d.reference import s4d_recurrence
from diffussm_cli.model.scan import RASTER, Scan

ONE_LEVEL = 64  # tokens a side up to which the kernels' exponentials are computed one by one
# Tokens a side up to which products are used. On one thread of an EPYC they take 0.9 of the FFTs'
# time at 256, 1.2 at 512, and 2 at 1024.
LONGEST = 256


class Axial(StateSpace):
    """u (B, D, J, M) -> concat(along rows, along columns) (B, 2D, J, M), in the dtype of `u`.

    Each channel has a two-sided kernel k per axis: y[i] = sum_j k[i - j] u[j] along every line of
    the image. The kernel is the sum of the kernels of two S4D state spaces, one for each direction,
    and of one skip at lag 0.

    The products take L (H + W) D multiply-adds for L = H W tokens. Beyond LONGEST tokens a side,
    FFTs along the lines take their place.

    A step of the state space is exp(log_dt) / S: time counts in units of the image's side. So the
    same weights on a finer grid compute the same operator on functions, more exactly.

    Args:
        D: channels.
        N: state size, even. 16 is enough.
        scan: the order of the positions of `u`.
        grid: (H, W), the tokens at the start. Steps are then between dt_min and dt_max, and the
            outputs of a white input have variance 1.
    """

    def __init__(
        self,
        D: int,
        N: int,
        scan: Scan = RASTER,
        grid: tuple[int, int] = (16, 16),
        dt_min: float = 1e-2,
        dt_max: float = 1.0,
    ):
        super().__init__()
        if N < 2 or N % 2:
            raise ValueError(f"d_state must be even and at least 2, got {N}")

        self.scan, self.grid = scan, grid
        self.dt_min, self.dt_max = dt_min, dt_max

        self.log_dt = nn.Parameter(torch.empty(2, 2, D))
        self.log_A_real = nn.Parameter(torch.empty(2, 2, D, N // 2))
        self.A_imag = nn.Parameter(torch.empty(2, 2, D, N // 2))
        self.B = nn.Parameter(torch.empty(2, 2, D, N // 2, 2))
        self.C = nn.Parameter(torch.empty(2, 2, D, N // 2, 2))
        self.D_skip = nn.Parameter(torch.empty(2, D))
        self.reset_parameters()

    @classmethod
    def of(cls, sizes: Sizes) -> "Axial":
        return cls(sizes.D, sizes.N, sizes.scan, sizes.grid)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """S4D-Lin, then C and D_skip scaled so that the outputs of a white input have variance
        1.
        """
        device = self.log_dt.device
        H, W = self.grid
        sides = sides_of_axes(H, W, device)

        self.log_dt.uniform_(math.log(self.dt_min), math.log(self.dt_max)).add_(sides.log())
        self.log_A_real.fill_(math.log(0.5))
        self.A_imag.copy_(math.pi * torch.arange(self.A_imag.shape[-1], device=device))
        self.B.copy_(torch.tensor([1.0, 0.0], device=device))
        self.C.normal_(std=math.sqrt(0.5))
        self.D_skip.normal_()

        # A lag occurs S - |lag| times in S outputs.
        L = max(H, W)
        lags = torch.arange(1 - L, L, device=device).abs()
        share = (1 - lags / sides[:, 0]).clamp(min=0)[:, None]  # (2, 1, 2L - 1)
        variance = (share * self.taps(H, W).square()).sum(-1)  # (2, D)
        scale = variance.rsqrt()
        self.C.mul_(scale[:, None, :, None, None])
        self.D_skip.mul_(scale)

    def forward(self, u: Tensor, grid: tuple[int, int]) -> Tensor:
        H, W = grid[0], grid[1] * u.shape[3]
        with no_autocast(u.device):
            image = self.scan.undo(u, grid, dim=2)  # (B, D, J, M) in raster order

            # Long sides by FFTs, short ones as products with matrices.
            if max(H, W) > LONGEST:
                rows, columns = self.keep((int(H), int(W)), lambda: self.spectra(H, W))
                y = axial_ffts(image, rows, columns, H)
            else:
                rows, columns = self.keep(
                    (int(H), int(W), u.dtype), lambda: self.matrices(H, W, u.dtype)
                )
                by_hand = torch.is_grad_enabled() and not in_forward_mode()  # the backward pass
                products = AxialProducts.apply if by_hand else axial_products
                y = products(image, rows, columns)

        return self.scan.apply(y, grid, dim=2)

    def taps(self, H: int, W: int) -> Tensor:
        """The kernels of both axes, including the skip, (2, D, 2L - 1) at lags 1 - L to L - 1, with
        L = max(H, W).
        """
        L = max(H, W)
        with no_autocast(self.log_dt.device):
            dt = self.log_dt.exp() / sides_of_axes(H, W, self.log_dt.device)
            ssm = (dt, -self.log_A_real.exp(), self.A_imag, self.B, self.C)
            K = s4d_kernel(*ssm, L, one_level=L <= ONE_LEVEL)  # (2, 2, D, L)

            # Both directions side by side; at lag 0 they add up.
            ahead, back = K.unbind(1)
            middle = ahead[..., :1] + back[..., :1] + self.D_skip[..., None]
            return torch.cat([back[..., 1:].flip(-1), middle, ahead[..., 1:]], dim=-1)

    def matrices(self, H: int, W: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The products along rows and columns as matrices, (D, W, W) and (D, H, H): [d, i, j]
        weighs input j in i.
        """
        rows, columns = (toeplitz(k.to(dtype)) for k in self._taps_of_axes(H, W))
        return rows, columns

    def spectra(self, H: int, W: int) -> tuple[Tensor, Tensor]:
        """The kernels along rows and columns for `axial_ffts`, (D, F) each, complex."""
        rows, columns = (
            torch.fft.rfft(k, n=fft_length(S)) for k, S in zip(self._taps_of_axes(H, W), (W, H))
        )
        return rows, columns

    def _taps_of_axes(self, H: int, W: int) -> tuple[Tensor, Tensor]:
        """The kernels of both axes at the lags of their own side, (D, 2W - 1) and (D, 2H - 1)."""
        middle = max(H, W) - 1
        rows, columns = (k[:, middle + 1 - S : middle + S] for k, S in zip(self.taps(H, W), (W, H)))
        return rows, columns

    def macs(self, L: int, grid: tuple[int, int]) -> dict[str, float]:
        D, (H, W) = self.log_dt.shape[-1], grid
        if max(grid) <= LONGEST:
            return {"mixer": D * L * (H + W)}
        n = {S: fft_length(S) for S in grid}
        lines = ((H, W), (W, H))  # how many, and how long they are
        return {
            "FFT": D * sum(count * 2 * fft_macs(n[S]) for count, S in lines),
            "spectra": D * sum(count * (n[S] // 2 + 1) for count, S in lines) * COMPLEX_PRODUCT,
        }

    def kernel_macs(self, _L: int, grid: tuple[int, int]) -> float:
        D, half_N = self.A_imag.shape[-2:]
        L = max(grid)
        taps = 4 * D * (2 * half_N * L if L <= ONE_LEVEL else kernel_macs(L, 2 * half_N))
        return taps + D * sum(fft_macs(fft_length(S)) for S in grid) * (L > LONGEST)

    def saved(self) -> float:
        # u, or its spectra along both axes
        return self.log_dt.shape[-1] * (4 if max(self.grid) > LONGEST else 1)

    def saved_kernels(self, _L: int, grid: tuple[int, int]) -> float:
        each = fft_length if max(grid) > LONGEST else (lambda S: S**2)
        return self.log_dt.shape[-1] * sum(map(each, grid))


def sides_of_axes(H: int, W: int, device: torch.device) -> Tensor:
    """The tokens along a row and along a column, W and H, (2, 1, 1).

    They are written on the device. A list would be copied there, and a GPU copies it only when it
    has done all before it, for which the host would wait in every block of every step.
    """
    return torch.cat([torch.full((1, 1, 1), S, device=device) for S in (W, H)])


def toeplitz(taps: Tensor) -> Tensor:
    """taps (D, 2S - 1) at lags 1 - S to S - 1 -> T (D, S, S) with T[d, i, j] = taps[d, i - j]."""
    S = (taps.shape[-1] + 1) // 2
    return taps.flip(-1).unfold(-1, S, 1).flip(-2)


def axial_products(u: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """u (B, D, J, M) in raster order, matrices (D, W, W) and (D, H, H) -> (B, 2D, J, M), in memory
    (M, 2D, B, J).
    """
    planes = _planes(u, columns.shape[-1])
    M, D, B, H, V = planes.shape
    y = u.new_empty(M, 2, D, B, H, V)
    _write_rows(torch.bmm(_by_row(planes), rows.mT), y[:, 0])
    y[:, 1] = _as_planes(torch.bmm(columns, _by_column(planes)), planes)
    return y.view(M, 2 * D, B, H * V).permute(2, 1, 3, 0)


class AxialProducts(torch.autograd.Function):
    """`axial_products` with its own backward. It saves u; autograd would save its numbers in two
    orders.
    """

    @staticmethod
    def forward(ctx, u: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(u, rows, columns)
        return axial_products(u, rows, columns)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, rows, columns = ctx.saved_tensors
        planes = _planes(u, columns.shape[-1])
        M, D, B, H, V = planes.shape
        dy_rows, dy_columns = (_planes(half, H) for half in dy.chunk(2, dim=1))
        by_row, by_column = _by_row(dy_rows), _by_column(dy_columns)

        with no_autocast(u.device):
            d_rows = torch.bmm(by_row.mT, _by_row(planes))
            d_columns = torch.bmm(by_column, _by_column(planes).mT)
            du = u.new_empty(M, D, B, H, V)
            _write_rows(torch.bmm(by_row, rows), du)
            du += _as_planes(torch.bmm(columns.mT, by_column), planes)
        return du.view(M, D, B, H * V).permute(2, 1, 3, 0), d_rows, d_columns


def axial_ffts(u: Tensor, rows: Tensor, columns: Tensor, H: int) -> Tensor:
    """`axial_products` by FFTs: u (B, D, J, M) in raster order, spectra (D, F) -> (B, 2D, J, M).

    The transforms have the precision of the spectra; the result is in the dtype of u.
    """
    image = u.unflatten(2, (H, -1)).flatten(3).to(rows.real.dtype)  # (B, D, H, W)
    both = [_convolve_lines(image, rows), _convolve_lines(image.mT, columns).mT]
    y = torch.cat(both, dim=1).to(u.dtype)  # (B, 2D, H, W)
    return y.unflatten(3, (-1, u.shape[3])).flatten(2, 3)


def _convolve_lines(lines: Tensor, spectra: Tensor) -> Tensor:
    """lines (B, D, n, S) with the kernels of spectra (D, F), whose first lag is 1 - S -> (B, D, n,
    S).
    """
    S, n = lines.shape[-1], fft_length(lines.shape[-1])
    y = torch.fft.irfft(torch.fft.rfft(lines, n=n) * spectra[:, None], n=n)
    return y[..., S - 1 : 2 * S - 1]


def _planes(u: Tensor, H: int) -> Tensor:
    """u (B, D, J, M) -> (M, D, B, H, V), which is its order in memory."""
    return u.permute(3, 1, 0, 2).unflatten(3, (H, -1))


def _by_row(planes: Tensor) -> Tensor:
    """(M, D, B, H, V) -> (D, BH, W)."""
    M, D, B, H, V = planes.shape
    return planes.permute(1, 2, 3, 4, 0).reshape(D, B * H, V * M)


def _write_rows(lines: Tensor, planes: Tensor) -> None:
    """The inverse: lines (D, BH, W) into `planes`."""
    M, D, B, H, V = planes.shape
    planes.copy_(lines.view(D, B, H, V, M).permute(4, 0, 1, 2, 3))


def _by_column(planes: Tensor) -> Tensor:
    """(M, D, B, H, V) -> (D, H, MBV)."""
    M, D, B, H, V = planes.shape
    return planes.permute(1, 3, 0, 2, 4).reshape(D, H, M * B * V)


def _as_planes(columns: Tensor, like: Tensor) -> Tensor:
    """The inverse: (D, H, MBV) -> (M, D, B, H, V), the sizes of `like`."""
    M, D, B, H, V = like.shape
    return columns.view(D, H, M, B, V).permute(2, 0, 3, 1, 4)


def axial_recurrence(layer: Axial, image: Tensor) -> Tensor:
    """Reference for `Axial`: the recurrences along every line, image (B, D, H, W) -> (B, 2D, H,
    W).
    """
    outputs = []
    for axis, lines in enumerate((image, image.mT)):  # (B, D, lines, S)
        S = lines.shape[-1]
        y = layer.D_skip[axis][:, None, None] * lines
        for direction in (0, 1):
            parameters = (layer.log_A_real, layer.A_imag, layer.B, layer.C)
            log_A_real, A_imag, B, C = (p[axis, direction] for p in parameters)
            dt = layer.log_dt[axis, direction].exp() / S

            along = lines.flip(-1) if direction else lines
            each = [
                s4d_recurrence(line, dt, -log_A_real.exp(), A_imag, B, C, torch.zeros_like(dt))
                for line in along.unbind(2)
            ]
            result = torch.stack(each, dim=2)
            y = y + (result.flip(-1) if direction else result)

        outputs.append(y.mT if axis else y)
    return torch.cat(outputs, dim=1)
