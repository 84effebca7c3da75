"""How the formulas of this package are executed: in slices that fit the cache, and in full float32."""

import contextlib

import torch

from diffussm_cli.machine.device import full_float32

SLICE = {True: 1 << 19, False: 1 << 26}  # numbers in a slice of u: for a CPU's cache, and for other devices


def slices_of(count: int, numbers: int, device: torch.device) -> list[slice]:
    """Slices of `count` things of so many numbers each; one when compiled, for which sizes must not vary."""
    size = count if torch.compiler.is_compiling() else max(1, SLICE[device.type == "cpu"] // numbers)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def full_float32_products() -> contextlib.AbstractContextManager:
    """For products of the kernel. In compiled code the user's choice holds: it cannot change global switches."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else full_float32()


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    if device.type == "meta":  # knows no autocast
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
