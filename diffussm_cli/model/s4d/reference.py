"""The S4D kernel and layer by their definitions: slow and simple, for testing the fast versions.

B batch   D channels   L tokens   N state size: N/2 complex modes
"""

import torch
from torch import Tensor


def s4d_kernel_naive(
    dt: Tensor, A_real: Tensor, A_imag: Tensor, B: Tensor, C: Tensor, L: int
) -> Tensor:
    """Reference for `s4d_kernel`, with the same arguments: the definition, in complex
    arithmetic.
    """
    A, B, C = torch.complex(A_real, A_imag), torch.view_as_complex(B), torch.view_as_complex(C)
    dtA = dt[..., None] * A
    C_bar = C * B * (torch.exp(dtA) - 1) / A
    # (..., D, N/2, L)
    powers = torch.exp(dtA[..., None] * torch.arange(L, device=dt.device, dtype=dt.dtype))
    return 2 * (C_bar[..., None] * powers).sum(-2).real


def s4d_recurrence(
    u: Tensor, dt: Tensor, A_real: Tensor, A_imag: Tensor, B: Tensor, C: Tensor, D_skip: Tensor
) -> Tensor:
    """Reference for kernel and convolution together, in one direction: the state space model as a
    recurrence.

    x_l = exp(dt A) x_{l-1} + B (exp(dt A) - 1)/A u_l,  y_l = 2 Re C x_l + D u_l;  u (B, D, L) -> y
    (B, D, L).
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
