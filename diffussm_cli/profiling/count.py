"""Multiply-adds counted by fvcore from a trace of the model, a check of the formulas in `flops.py`.

fvcore counts linear layers and plain matrix products. Counters for what it skips are added here:
fused attention, transforms, complex products, baddbmm. SSM kernels are counted separately, as they
are computed once per weight update. Any operator that is neither counted nor named in NOT_COUNTED
is an error.
"""

import functools
import importlib
import math
import types
import warnings
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffussm_cli.config import Config
from diffussm_cli.errors import ConfigError
from diffussm_cli.model.local import Local
from diffussm_cli.model.mixer import COMPLEX_PRODUCT, fft_macs, kept_kernels
from diffussm_cli.profiling.flops import shortened

# Elementwise operators on real numbers, and operators that only look up or move values.
NOT_COUNTED = {"mul_", "add", "add_", "sub", "div", "neg", "pow", "exp", "expm1", "sin", "cos"}
NOT_COUNTED |= {"silu", "gelu", "addcmul", "conj_physical", "conj_physical_", "where", "lt"}
NOT_COUNTED |= {
    "log_sigmoid",
    "sigmoid",
    "mean",
    "rms_norm",
    "cumsum",
    "pad",
    "flip",
    "triu",
    "unfold",
    "im2col",
    "linalg_vector_norm",
    # which no layer of the package has, and one that is added may
    "softplus",
    "tanh",
    "relu",
    "log",
    "sqrt",
    "rsqrt",
}
NOT_COUNTED |= {"embedding", "unflatten", "mT", "view_as", "complex", "view_as_real", "ne", "any"}


def count(config: Config) -> dict[str, float]:
    """Gflops per image by kind: products, attention, FFT, spectra; and `kernels`, per weight
    update.

    A model with one block of each kind is traced, and each block is counted as often as the model
    has it. The trace runs on the meta device, so that a large model takes no memory.

    Raises:
        ConfigError: if the model has an operator that is not counted.
    """
    model, missing = shortened(config)
    model.eval()
    m = config.model

    # One image with all conditions that the model takes.
    with torch.device("meta"):
        x = torch.empty(1, config.data.channels, *config.data.grid)
        t = torch.zeros(1, dtype=torch.long)
        text = torch.empty(1, 1 + m.text_tokens, m.text_width)
    inputs = (x, t, t if m.num_classes else None, text if m.text_width else None)

    # With kernels, and with kernels that are kept.
    with_kernels = _trace(model, inputs)
    with torch.no_grad(), kept_kernels(model):
        model(*inputs)
        counted = _trace(model, inputs)

    total: dict[str, float] = Counter(counted[""])  # type: ignore[assignment]
    kernels = 0.0
    for part, times in missing.items():
        of_kernels = Counter(with_kernels[part]) - Counter(counted[part])
        kernels += (1 + times) * of_kernels.total()
        for kind, macs in counted[part].items():
            total[kind] += times * macs
    total["kernels"] = kernels
    return {kind: macs / 1e9 for kind, macs in total.items() if macs}


@torch.no_grad()
def _trace(model: nn.Module, inputs: tuple[Tensor | None, ...]) -> dict[str, Counter]:
    """Multiply-adds by kind of one call of the model, by submodule; the model itself is ""."""
    fvcore = _fvcore()
    for module in model.modules():
        # torch cannot trace a convolution on the meta device
        if isinstance(module, Local):
            module.convolve = module.convolve_naive  # type: ignore[method-assign]
        if isinstance(module, nn.Conv2d):
            module.forward = functools.partial(_as_product, module)  # type: ignore[method-assign]

    analysis = fvcore.FlopCountAnalysis(model, inputs)
    analysis.uncalled_modules_warnings(False).unsupported_ops_warnings(False)
    for operator, handle in _handles(fvcore.jit_handles).items():
        analysis.set_op_handle(f"aten::{operator}", handle)
    counted = analysis.by_module_and_operator()

    operators = {name.removeprefix("aten::") for name in analysis.unsupported_ops()}
    unknown = ", ".join(sorted(operators - NOT_COUNTED))
    if unknown:
        raise ConfigError(f"profile: no counter for {unknown}; add one to profiling/count.py")
    return counted


def _as_product(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution without groups as the product that it is: (B, C, H, W) -> (B, out, H, W)."""
    size, padding = layer.kernel_size, layer.padding
    around = F.unfold(x, size, padding=padding)  # type: ignore[arg-type]
    return (layer.weight.flatten(1) @ around).unflatten(-1, x.shape[-2:])


def _fvcore() -> types.ModuleType:
    with warnings.catch_warnings():
        # fvcore scripts a function when it is imported
        warnings.simplefilter("ignore", FutureWarning)
        return importlib.import_module("fvcore.nn")


def _handles(jit: types.ModuleType) -> dict[str, Callable]:
    """Counters by operator: values of a traced graph (inputs, outputs) -> multiply-adds by kind."""
    shape = jit.get_shape

    def linear(inputs, outputs) -> Counter:
        return Counter(products=jit.linear_flop_jit(inputs, outputs))

    def matmul(inputs, outputs) -> Counter:
        # bmm may have an output argument
        return Counter(products=jit.matmul_flop_jit(inputs[:2], outputs))

    def baddbmm(inputs, outputs) -> Counter:  # noqa: ARG001
        (B, n, k), m = shape(inputs[1]), shape(inputs[2])[-1]
        return Counter(products=B * n * k * m)

    def attention(inputs, outputs) -> Counter:  # noqa: ARG001
        *heads, queries, d = shape(inputs[0])
        keys = shape(inputs[1])[-2]
        return Counter(attention=2 * math.prod(heads) * queries * keys * d)

    def rfft(inputs, outputs) -> Counter:  # noqa: ARG001
        *rows, F = shape(outputs[0])
        return Counter(FFT=math.prod(rows) * fft_macs(2 * (F - 1)))

    def irfft(inputs, outputs) -> Counter:  # noqa: ARG001
        *rows, n = shape(outputs[0])
        return Counter(FFT=math.prod(rows) * fft_macs(n))

    def mul(inputs, outputs) -> Counter:  # noqa: ARG001
        if "Complex" not in (outputs[0].type().scalarType() or ""):
            return Counter()  # elementwise on real numbers
        return Counter(spectra=math.prod(shape(outputs[0])) * COMPLEX_PRODUCT)

    def layer_norm(inputs, outputs) -> Counter:  # noqa: ARG001
        return Counter()  # elementwise too, but fvcore counts it

    return {
        "linear": linear,
        "matmul": matmul,
        "bmm": matmul,
        "baddbmm": baddbmm,
        "scaled_dot_product_attention": attention,
        "fft_rfft": rfft,
        "fft_irfft": irfft,
        "mul": mul,
        "layer_norm": layer_norm,
    }
