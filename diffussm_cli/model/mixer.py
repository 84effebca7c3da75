"""What the rest of the package knows of a layer that mixes tokens, and how kernels are kept while
images are drawn.

B batch   D channels   J positions   M tokens per position   H x W grid of tokens   L = H W tokens
"""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
COMPLEX_PRODUCT = 3  # 4 products and 2 sums, two per multiply-add


def fft_macs(n: int) -> float:
    """Multiply-adds of a real transform of length n: 5/2 n log2 n real operations, two per
    multiply-add.
    """
    return 5 / 2 * n * math.log2(n) / 2


class Sizes(SimpleNamespace):
    """What a mixer is made from: `D`, `scan`, the order of the positions, `grid`, the tokens (H, W)
    that the model is built for (a mixer also accepts other grids), and those fields of `model` that
    its row in `config/mixers.py` names.
    """

    def __getattr__(self, name: str) -> Any:
        if name == "N":  # the paper's letter
            return self.d_state
        raise AttributeError(
            f"the row of this mixer in config/mixers.py does not name the field {name!r}"
        )


class Mixer(nn.Module, ABC):
    """A layer that mixes tokens: U (B, D, J, M), grid (H, W/M) -> Y (B, 2D, J, M).

    Token (j, m) is number l = j M + m of the sequence. A mixer that needs the image gets it from
    `scan` of its sizes.

    Parameters that a mixer holds itself, rather than in a Linear or another layer, are no matrices
    to the optimiser: they have no weight decay, and Muon leaves them to AdamW.

    Costs are of one image with L tokens in a grid (H, W) of tokens; L is larger than H W if there
    are text tokens.
    """

    @classmethod
    @abstractmethod
    def of(cls, sizes: Sizes) -> "Mixer":
        """Make the mixer from the sizes of a block."""

    def reset_parameters(self) -> None:
        """Draw, in place, the parameters that are not as the network initialises them: before this
        it gives every Linear Xavier's weights and a bias of zero.
        """

    @abstractmethod
    def macs(self, L: int, grid: tuple[int, int]) -> dict[str, float]:
        """Multiply-adds of a forward pass by the name of the part, without those of kernels."""

    def kernel_macs(self, L: int, grid: tuple[int, int]) -> float:  # noqa: ARG002
        """Multiply-adds that are spent once per weight update, on kernels."""
        return 0

    @abstractmethod
    def saved(self) -> float:
        """Numbers per token that autograd saves inside the mixer, in the dtype of the activations.
        U and Y themselves are counted by the block.
        """

    def saved_kernels(self, L: int, grid: tuple[int, int]) -> float:  # noqa: ARG002
        """Numbers that autograd saves of the kernels, in float32."""
        return 0


class StateSpace(Mixer):
    """A mixer whose parameters are those of state spaces, and whose kernels depend on its weights
    alone.

    The optimiser gives the parameters a group of their own, and FSDP a unit in float32. They stay
    at least float32 under `.half()`, `.to(bfloat16)` and autocast, because rounding log_dt alone to
    bfloat16 changes a kernel by 35%.
    """

    def keep(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` returns: kept inside `kept_kernels`, without gradients, and otherwise made at
        each call.
        """
        # Compiled code makes kernels at each call: what is kept would be another program.
        kept = None if torch.compiler.is_compiling() or torch.is_grad_enabled() else _kept.get(self)
        if kept is None:
            return make()
        if key not in kept:
            kept[key] = make()
        return kept[key]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StateSpace":
        """Called by `.to`, `.cuda`, `.half` and the like: changes the device; precision stays at
        least float32.
        """

        def keep_precision(t: Tensor) -> Tensor:
            moved = fn(t.new_empty(0))
            if moved.dtype in (torch.float32, torch.float64):
                return fn(t)
            return t.to(moved.device, torch.float32)

        return super()._apply(keep_precision, recurse)


# What each layer keeps inside `kept_kernels`. It is not in the layer, so that copies of a model do
# not take it.
_kept: dict[nn.Module, dict[Any, Any]] = {}


@contextlib.contextmanager
def kept_kernels(*models: nn.Module) -> Iterator[None]:
    """While images are drawn: make the kernels of models once, and not at each denoising step.

    The weights must not change inside. Gradients never meet a kept kernel. At the end the memory is
    freed: for S4D, 0.55 GB for XL at 256, 8.8 GB at 1024. If a model is already in such a context,
    the outer one ends it.
    """
    layers = [
        m
        for model in models
        for m in model.modules()
        if isinstance(m, StateSpace) and m not in _kept
    ]

    _kept.update({layer: {} for layer in layers})
    try:
        yield
    finally:
        for layer in layers:
            del _kept[layer]
