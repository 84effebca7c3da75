"""One model trained by several processes: copies (DDP), or parts (FSDP2). Tensors of parts become whole here."""

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from diffussm_cli.machine.device import check_compiler
from diffussm_cli.machine.processes import World
from diffussm_cli.model.s4d.layer import S4D


def compile_model(model: nn.Module, device: torch.device) -> None:
    """Have the forward and backward pass of a model compiled at its first call. Raises ConfigError without a compiler.

    To be called before `replicate` or `shard`, and after copies of the model are made. The whole model is one graph; of
    a model that is held in parts each unit is one, as FSDP2 gathers its parameters in between.
    """
    check_compiler(device)
    if torch.__version__ < (2, 7):  # there DDP's graph splitter refuses graphs that hold a torch.autograd.Function
        torch._dynamo.config.optimize_ddp = False
    warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex operators")
    model.compile()


def replicate(model: nn.Module, device: torch.device) -> nn.Module:
    """What to call in place of a model whose gradients are to be means over all processes (DDP)."""
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, devices, gradient_as_bucket_view=True)


def shard(model: nn.Module, world: World, device: torch.device, dtype: torch.dtype) -> None:
    """Split a model's parameters over all processes (FSDP2), a unit a block.

    Dense layers are gathered in `dtype`; the SSM is a unit of its own, in float32 whatever `dtype` is.
    """
    mesh = init_device_mesh(device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in model.modules():
        if isinstance(module, S4D):
            fully_shard(module, mesh=mesh, mp_policy=exact)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def last_part_only(model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Around forward and backward of a part of a batch: gradients travel with the last one only."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        return views_are_fine()
    return contextlib.nullcontext()


@contextlib.contextmanager
def views_are_fine() -> Iterator[None]:
    """FSDP2 warns of units that give views, lest somebody change one in place; our blocks do not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")
        yield


def norm_of(tensors: Iterable[Tensor]) -> Tensor:
    """L2 norm of all together, of parts too; no process waits for its device."""
    norm = torch.nn.utils.get_total_norm(list(tensors))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of one that is held in parts; then every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this process holds of tensors."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on the device of another, in parts if that one is."""
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value


def load_full(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Whole weights by name into a model, held in parts or not."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(shard_like(weights[name].to(p.dtype), p))
