"""The convolution by Triton, in its interpreter, against the one by FFT in float64."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffussm_cli.errors import ConfigError
from diffussm_cli.model.s4d import numerics
from diffussm_cli.model.s4d.convolution import Convolution, KernelSpectra
from diffussm_cli.model.s4d.layer import S4D
from diffussm_cli.model.s4d.numerics import wants_toeplitz

pytest.importorskip("triton")

# B, J, M: more images than a tile, more tokens than one or two, a length that no tile divides, M
# tokens side by side.
SHAPES = [(3, 50, 2), (17, 40, 1), (2, 65, 3), (1, 1, 1)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


def errors(B, J, M, dtype):
    """Relative errors against float64 of y, du and dK, and of y before it is rounded to the dtype
    of u.
    """
    from diffussm_cli.model.s4d import toeplitz

    torch.manual_seed(0)
    D = 2
    u = torch.randn(M, D, B, J).permute(2, 1, 3, 0).to(dtype).requires_grad_()
    K = torch.randn(2, D, J * M, requires_grad=True)
    y = toeplitz.ToeplitzConvolution.apply(u, K)
    dy = torch.randn(y.shape).to(dtype)  # another layout in memory than y's
    du, dK = torch.autograd.grad(y, (u, K), dy)
    exact_u, exact_K = (t.detach().double().requires_grad_() for t in (u, K))
    exact = Convolution.apply(exact_u, KernelSpectra.apply(exact_K))
    exact_du, exact_dK = torch.autograd.grad(exact, (exact_u, exact_K), dy.double())
    assert y.dtype == du.dtype == dtype
    before = toeplitz.convolve(u.detach(), K.detach(), torch.float32)
    return error(y, exact), error(du, exact_du), error(dK, exact_dK), error(before, exact)


@pytest.mark.slow
def test_triton_values_and_gradients_equal_fft():
    code = (
        "import json; from tests.model.s4d.test_toeplitz import *\n"
        "print(json.dumps({name: [errors(*shape, d) for shape in SHAPES] for name, d in "
        "DTYPES.items()}))"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # must be set before triton is imported
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name, found in json.loads(done.stdout).items():
        # of a result; the interpreter cuts bfloat16 off
        rounding = 1e-6 if name == "float32" else 6e-3
        assert len(found) == len(SHAPES)
        for y, du, dK, before in found:
            assert max(y, du) < rounding
            assert max(dK, before) < 1e-6


def test_triton_kernel_compiles_for_nvidia_gpus_with_tensor_cores(monkeypatch, tmp_path):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from diffussm_cli.model.s4d import toeplitz

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kinds = {
        "u": "*bf16",
        "y": "*bf16",
        "dy": "*bf16",
        "du": "*bf16",
        "K": "*fp32",
        "parts": "*fp32",
    }
    for kernel in (toeplitz._forward, toeplitz._backward_input, toeplitz._backward_taps):
        names = {
            n: ("i32",) * 3 if n.endswith("_strides") else kinds.get(n, "i32")
            for n in kernel.arg_names
        }
        built = triton.compile(
            ASTSource(fn=kernel, signature=names, constexprs={}), target=GPUTarget("cuda", 80, 32)
        )
        assert "mma.sync" in built.asm["ptx"]
        # bytes of shared memory that the smallest GPUs of this kind have
        assert built.metadata.shared <= 99 << 10


def test_triton_is_used_only_on_request_and_on_cuda(monkeypatch):
    class OnGPU:
        is_cuda = True

        def __init__(self, *shape):
            self.shape = shape

        def numel(self):
            return torch.Size(self.shape).numel()

    assert not wants_toeplitz(OnGPU(1, 2, 8, 2))
    monkeypatch.setenv("DIFFUSSM_CONVOLUTION", "triton")
    assert wants_toeplitz(OnGPU(1, 2, 2048, 2))
    assert not wants_toeplitz(OnGPU(1, 2, 2049, 2))
    assert not wants_toeplitz(OnGPU(256, 1152, 2048, 2 * 2))
    assert not wants_toeplitz(torch.zeros(1, 2, 8, 2))
    assert S4D(2, 4)(torch.randn(1, 2, 8, 2)).shape == (1, 4, 8, 2)
    with monkeypatch.context() as patch:
        patch.setattr(numerics, "find_spec", lambda _: None)
        with pytest.raises(ConfigError, match="triton is not installed"):
            wants_toeplitz(OnGPU(1, 2, 8, 2))
    monkeypatch.setenv("DIFFUSSM_CONVOLUTION", "cudnn")
    with pytest.raises(ConfigError, match="DIFFUSSM_CONVOLUTION: 'cudnn' must be fft or triton"):
        S4D(2, 4)(torch.randn(1, 2, 8, 2))
