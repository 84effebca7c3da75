"""Train one model in several processes, replicated (DDP) or sharded (FSDP2), and gather sharded
tensors.
"""

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from diffussm_cli.machine.processes import World
from diffussm_cli.model.backbone import Backbone
from diffussm_cli.model.mixer import StateSpace


def compile_model(model: Backbone) -> None:
    """Compile the forward and backward pass of a model's blocks at their first call.

    Call it before `replicate` or `shard`, and after copying the model. Blocks of one kind share a
    graph. In a sharded model a block has a graph for each of its units, because FSDP2 gathers
    parameters between them.
    """
    if torch.__version__ < (2, 7):  # type: ignore[operator]
        # DDP's graph splitter of these versions rejects graphs with a torch.autograd.Function.
        torch._dynamo.config.optimize_ddp = False
    warnings.filterwarnings(
        "ignore", "Torchinductor does not support code generation for complex operators"
    )
    model.compile_blocks()


def replicate(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a model so that its gradients are averaged over all processes (DDP).

    Its only buffer, the table of positions, is the same everywhere, so that no step sends it.
    """
    devices = [device] if device.type == "cuda" else None
    # The argument of DDP for this has another name from torch 2.14 on.
    buffers = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, buffers)
    return DistributedDataParallel(model, devices, gradient_as_bucket_view=True)


def shard(model: Backbone, world: World, device: torch.device, dtype: torch.dtype) -> None:
    """Shard a model's parameters over all processes (FSDP2), with one unit per block.

    Dense layers are gathered in `dtype`. Each SSM is a separate unit, always in float32.
    """
    mesh = init_device_mesh(device.type, (world.size,))
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    exact = MixedPrecisionPolicy(
        param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False
    )

    for module in model.modules():
        if isinstance(module, StateSpace):
            fully_shard(module, mesh=mesh, mp_policy=exact)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def last_part_only(model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """A context for forward and backward of one part of a batch; only the last part synchronises
    gradients.

    Between the parts FSDP2 keeps the gathered parameters, which do not change before the
    optimiser's step.
    """
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)
        return views_are_fine()
    return contextlib.nullcontext()


@contextlib.contextmanager
def views_are_fine() -> Iterator[None]:
    """Silence FSDP2's warning about units that return views; it concerns in-place changes, which
    our blocks avoid.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")
        yield


def norm_of(tensors: Iterable[Tensor]) -> Tensor:
    """The L2 norm of all tensors together, sharded or not; no process waits for its device."""
    norm = torch.nn.utils.get_total_norm(list(tensors))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself, or the full tensor if it is sharded; then every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The parts of tensors that this process holds."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """Move a full tensor to the device of `like`, and shard it if `like` is sharded."""
    value = value.to(like.device)
    return (
        distribute_tensor(value, like.device_mesh, like.placements)
        if isinstance(like, DTensor)
        else value
    )


def load_full(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load full weights by name into a model, sharded or not."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(shard_like(weights[name].to(p.dtype), p))
