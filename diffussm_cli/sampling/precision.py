"""The precision of the matrix products while images are drawn."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from diffussm_cli.model.block import HourglassLinear


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to `dtype` unless it is float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@contextlib.contextmanager
def products_cast(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Cast the weights of matrix products for a while, so that autocast does not cast them at each
    call.
    """
    parameters = _product_parameters(model)
    originals = [p.data for p in parameters]
    try:
        cast_products(model, dtype)
        yield
    finally:
        for p, data in zip(parameters, originals):
            p.data = data


def cast_products(model: nn.Module, dtype: torch.dtype) -> None:
    """Permanently cast the weights of matrix products to `dtype`.

    Results under autocast to `dtype` do not change; a no-op for float32.
    """
    if dtype != torch.float32:
        for p in _product_parameters(model):
            p.data = p.data.to(dtype)


def _product_parameters(model: nn.Module) -> list[nn.Parameter]:
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | HourglassLinear)]
    return [p for layer in layers for p in layer.parameters(recurse=False)]
