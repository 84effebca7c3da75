"""What an optimiser step would take on a GPU that is not here: a prediction by the roofline of each
operator.

Every operator takes the longest of three times: its operations at the rate of products, its bytes
at the bandwidth of memory, and the shortest time of a kernel. Operators and shapes are those of a
step on the meta device, which computes nothing. Nothing of this has been compared with a GPU yet.
"""

import contextlib
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from diffussm_cli.config import Config
from diffussm_cli.machine.gpus import GPU, GPUS
from diffussm_cli.model import Backbone, build_model, count_parameters
from diffussm_cli.profiling.flops import passes_without_gradient
from diffussm_cli.training.muon import Muon, matrices_of
from diffussm_cli.training.optimizer import make_optimizer

# The shares of the data sheet that are assumed to be reached.
PRODUCTS_REACH = 0.65
COPIES_REACH = 0.83  # of the bandwidth, by operators that read and write in the order of memory
STRIDED_REACH = 0.58  # by those that do not
TRANSFORMS_REACH = 0.67
INSTRUCTIONS_REACH = 0.5  # of the rate of float32, by kernels that are bound by their instructions
KERNEL_SECONDS = 2.2e-6  # the shortest time of a kernel
LAUNCH_SECONDS = 8e-6  # of the host, per kernel: a step is never faster than its launches
ASSUMPTIONS = (
    f"a prediction, never compared with a GPU: eager code, {PRODUCTS_REACH:.0%} of the data "
    f"sheet's rate in products, {COPIES_REACH:.0%} of its bandwidth in copies, "
    f"{STRIDED_REACH:.0%} in strided ones, {TRANSFORMS_REACH:.0%} in FFTs, "
    f"{INSTRUCTIONS_REACH:.0%} of the instructions a second in the convolution by Triton, "
    f"{KERNEL_SECONDS * 1e6:g} us for the shortest kernel, {LAUNCH_SECONDS * 1e6:g} us of the host "
    "per launch; one GPU, and no waiting for data"
)


# ------------------------------------------------------------------------------------- an operator
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
TRANSFORMS = {"_fft_r2c", "_fft_c2r", "_fft_c2c"}
ATTENTION = {  # products as large as that of queries and keys
    "_scaled_dot_product_flash_attention": 2,
    "_scaled_dot_product_flash_attention_backward": 5,
}
# The kernels of `model/s4d/fused.py`: instructions of a warp per chunk, and images of a tile, as
# compiled for sm_90 at N = 64.
LOOPS = {"chunk_scan": (347, 32), "chunk_sums": (378, 16)}
LOOP_WARPS, LOOP_TOKENS = 4, 64
WRITES_ONLY = {"copy_", "fill_", "zero_", "zeros", "zeros_like", "new_zeros", "ones_like", "arange"}
MOVES_NOTHING = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach"}
MOVES_NOTHING |= {"_unsafe_view", "_reshape_alias", "lift_fresh"}


@dataclass
class Work:
    """What an operator does on a GPU: kernels, bytes moved, operations, and what kind of work."""

    kernels: int
    moved: float
    operations: float = 0.0
    kind: str = "copies"  # or strided, transforms, products, products in float32, instructions

    def seconds(self, gpu: GPU) -> float:
        """The longest of the times of operations, bytes and kernels."""
        reach = {"strided": STRIDED_REACH, "transforms": TRANSFORMS_REACH}
        bandwidth = reach.get(self.kind, COPIES_REACH) * gpu.bandwidth
        rates = {
            "products in float32": PRODUCTS_REACH * gpu.fp32,
            "instructions": INSTRUCTIONS_REACH * gpu.fp32,
        }
        return max(
            self.operations / rates.get(self.kind, PRODUCTS_REACH * gpu.bf16),
            self.moved / bandwidth,
            self.kernels * KERNEL_SECONDS,
        )


def work_of(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> Work:
    """The work of an operator of ATen on tensors of these shapes, strides and dtypes.

    Two costs of CUDA are included that the operator's name hides: a product whose bias runs along
    its columns copies it into the result first, and the inverse of a real transform clones its
    input.
    """
    read = [] if name in WRITES_ONLY else inputs
    if name == "copy_":
        read = inputs[1:]
    moved = sum(_bytes(t) for t in [*read, *outputs])

    if name in PRODUCTS:
        return _product(name, inputs, outputs[0], moved)
    if name in ATTENTION:
        q, k = inputs[1:3] if "backward" in name else inputs[:2]
        once = 2.0 * q.numel() * k.shape[-2]
        return Work(1, moved, ATTENTION[name] * once, "products")
    if name in LOOPS:
        return Work(1, moved, _instructions(name, inputs), "instructions")

    # The rest moves numbers and hardly computes.
    if name in TRANSFORMS:
        clone = _bytes(inputs[0]) if name == "_fft_c2r" else 0
        return Work(2 if clone else 1, moved + 2 * clone, 0.0, "transforms")
    strided = any(not _dense(t) for t in [*read, *outputs])
    return Work(1, moved, 0.0, "strided" if strided else "copies")


def _product(name: str, inputs: list[Tensor], output: Tensor, moved: float) -> Work:
    """A matrix product, and the copy of a bias that is not fused."""
    factor = inputs[-2]
    operations = 2.0 * output.numel() * factor.shape[-1]
    has_bias = name in ("addmm", "baddbmm")
    fused = not has_bias or (name == "addmm" and inputs[0].ndim == 1)
    if not fused:
        moved += 2 * _bytes(output)
    kind = "products" if factor.dtype == torch.bfloat16 else "products in float32"
    return Work(1 if fused else 2, moved, operations, kind)


def _instructions(name: str, inputs: list[Tensor]) -> float:
    """What the convolution by Triton issues, as operations: each instruction of a warp takes the
    time of 32 multiply-adds.
    """
    M, _, B, J = inputs[0].shape
    rows = inputs[-1].shape[1]  # channels and directions
    of_a_chunk, images = LOOPS[name]
    loops = rows * math.ceil(B / images) * math.ceil(J * M / LOOP_TOKENS)
    return 2.0 * 32 * LOOP_WARPS * loops * of_a_chunk


def _bytes(t: Tensor) -> float:
    """Bytes that reading or writing a tensor moves.

    Memory moves in sectors of 32 bytes, so that numbers that lie apart cost more than their size.
    An expanded dimension is read once.
    """
    sizes = [(stride, size) for stride, size in zip(t.stride(), t.shape) if size > 1 and stride]
    apart = min((stride for stride, _ in sizes), default=1) * t.element_size()
    sector = max(t.element_size(), min(apart, 32))
    return math.prod(size for _, size in sizes) * sector


def _dense(t: Tensor) -> bool:
    """Whether a tensor fills its memory without gaps, in any order of its dimensions."""
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


class Tally(TorchDispatchMode):
    """Collects the work of every operator on the meta device, by name and dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[str, Work]] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        name = operator.overloadpacket.__name__
        if operator.is_view or name in MOVES_NOTHING:
            return result

        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.numel()]
        if outputs:
            dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in [*inputs, *outputs]})
            self.done.append((f"{name} {'/'.join(dtypes)}", work_of(name, inputs, outputs)))
        return result


class Autocast(TorchFunctionMode):
    """What autocast to bfloat16 does on CUDA, for the meta device, which has none."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        F = torch.nn.functional

        # The attention that CUDA takes.
        if function is F.scaled_dot_product_attention:
            q, k, v = (t.to(torch.bfloat16) for t in args[:3])
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]

        # The dtypes that autocast takes.
        narrow = (F.linear, F.conv2d, torch.addmm, torch.baddbmm, torch.bmm, torch.matmul)
        if function in (*narrow, Tensor.__matmul__, Tensor.matmul):
            args, kwargs = _cast((args, kwargs or {}), torch.bfloat16)
        elif function in (F.layer_norm, F.softmax, torch.cumsum):
            args, kwargs = _cast((args, kwargs or {}), torch.float32)
        return function(*args, **(kwargs or {}))


def _cast(values: Any, dtype: torch.dtype) -> Any:
    def change(v: Any) -> Any:
        return v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v

    return tree_map(change, values)


# ------------------------------------------------------------------------------------------ a step
def predict(config: Config, device: str) -> dict[str, Any]:
    """What training a configuration would take on a GPU of `GPUS`, as plain values.

    Args:
        device: a name of `GPUS`.

    Returns:
        `gpu`, its name; `step_seconds` of an optimiser step on the batch, `images_per_second`;
        `seconds` of the training; `launches` of a step; `memory_bytes` of the GPU; `costs`: the
        five largest by operator, in seconds of a step; and `assumptions`.
    """
    gpu = GPUS[device]
    t = config.train
    with torch.device("meta"):
        model = build_model(config, t.gradient_checkpointing)

    # The parts of a batch, and one update of the weights.
    spent: defaultdict[str, float] = defaultdict(float)
    launches = 0
    for times, done in ((t.accumulate, part_of_step(model, config)), (1, update(model, config))):
        for name, work in done:
            spent[name] += times * work.seconds(gpu)
            launches += times * work.kernels

    step = max(sum(spent.values()), launches * LAUNCH_SECONDS)
    return {
        "gpu": gpu.title,
        "step_seconds": step,
        "images_per_second": t.batch_size / step,
        "seconds": step * t.steps,
        "launches": launches,
        "memory_bytes": gpu.memory,
        "costs": dict(sorted(spent.items(), key=lambda item: -item[1])[:5]),
        "assumptions": ASSUMPTIONS,
    }


def part_of_step(model: Backbone, config: Config) -> list[tuple[str, Work]]:
    """The work of the forward and backward passes of one part of the batch.

    Args:
        model: that of the configuration, on the meta device.
    """
    m, t = config.model, config.train
    B = t.batch_size // t.accumulate

    # A batch without numbers.
    with torch.device("meta"):
        x = torch.empty(B, config.data.channels, *config.data.grid)
        step = torch.zeros(B, dtype=torch.long)
        text = torch.empty(B, 1 + m.text_tokens, m.text_width) if m.text_width else None

    # What a step does with them.
    autocast = contextlib.nullcontext() if t.precision == "fp32" else Autocast()
    with Tally() as tally:
        with autocast:
            batch = x, step, step if m.num_classes else None, text
            with torch.no_grad():
                for _ in range(passes_without_gradient(config)):
                    model(*batch)
            output = model(*batch)
        output.float().square().mean().backward()
    return tally.done


def update(model: Backbone, config: Config) -> list[tuple[str, Work]]:
    """The work of one update of the weights: the norm of the gradient, the optimiser and the
    averages, in float32; Muon orthogonalises in bfloat16.

    The norm reads the gradients; AdamW reads four numbers of a parameter and writes three; each
    average reads two and writes one. A kernel takes 320 chunks of 65,536 numbers. What Muon does
    is what its own step does on the meta device.

    Args:
        model: that of the configuration, on the meta device.
    """
    averages = config.train.averages
    optimizer = make_optimizer(model, config.train)
    everything = count_parameters(model)
    matrices = sum(p.numel() for p in matrices_of(optimizer))

    moved = 4.0 * (everything * (1 + 3 * averages) + 7 * (everything - matrices))
    kernels = (2 + averages) * math.ceil(everything / (320 * 65536))
    done = [("optimiser, averages and norm", Work(kernels, moved))]
    if isinstance(optimizer, Muon):
        done += [("Muon", work) for work in _step_of_matrices(optimizer)]
    return done


def _step_of_matrices(optimizer: Muon) -> list[Work]:
    """The work of Muon on its matrices, in a step that is not its first."""
    for p in matrices_of(optimizer):
        p.grad = torch.empty_like(p)
    optimizer.found_inf = torch.empty((), device="meta")
    optimizer.step_of_matrices()
    with Tally() as tally:
        optimizer.step_of_matrices()
    return [work for _, work in tally.done]
