"""The convolution by Triton: in its interpreter against FFTs in float64, and compiled for GPUs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from diffussm_cli.errors import ConfigError
from diffussm_cli.model.s4d import numerics
from diffussm_cli.model.s4d.layer import S4D
from diffussm_cli.profiling.roofline import Tally
from tests.conftest import relative

triton = pytest.importorskip("triton")

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def chosen(monkeypatch):
    monkeypatch.setenv("DIFFUSSM_CONVOLUTION", "triton")


# ------------------------------------------------------------------------------- in the interpreter
# B, J, M and N: less than a chunk, a chunk, a little more, several; more images than a tile; text
# tokens or not; an M that divides no chunk; fewer modes than a tile, or as many as two.
SHAPES = [
    (1, 1, 1, 8),
    (2, 1, 2, 2),
    (2, 5, 1, 8),
    (1, 64, 1, 8),
    (1, 65, 1, 8),
    (2, 75, 2, 40),
    (17, 50, 2, 8),
    (33, 36, 2, 8),
    (2, 30, 3, 8),
    (1, 40, 4, 8),
]
FEW = SHAPES[::3]
# The interpreter cuts bfloat16 off, which makes twice the error of rounding.
BOUNDS = {"float64": 1e-13, "float32": 1e-5, "bfloat16": 3e-2}
NAMES = ["y", "u", "log_dt", "log_A_real", "A_imag", "B", "C", "D_skip"]


def results(s4d, u, dy, call=None):
    """y, du and the gradients of the parameters."""
    u = u.detach().requires_grad_()
    y = (call or s4d)(u)
    assert y.dtype == u.dtype
    return [y.detach(), *torch.autograd.grad(y, [u, *s4d.kernel_parameters()], dy)]


def inputs(B, J, M, N, dtype, D=2):
    torch.manual_seed(0)
    s4d = S4D(D, N).to(torch.float32 if dtype == BF16 else dtype)
    u = torch.randn(M, D, B, J).permute(2, 1, 3, 0).to(dtype)
    dy = torch.randn(B, 2 * D, J, M).to(dtype)  # another layout in memory than that of y
    return s4d, u, dy


def errors(shape, dtype):
    """Of y and of every gradient, against the convolution by FFT in float64."""
    s4d, u, dy = inputs(*shape, dtype)
    ours = results(s4d, u, dy)
    os.environ["DIFFUSSM_CONVOLUTION"] = "fft"
    exact = results(s4d.double(), u.double(), dy.double())
    os.environ["DIFFUSSM_CONVOLUTION"] = "triton"
    return dict(zip(NAMES, map(relative, ours, exact)))


def differences():
    """Of a compiled and of a checkpointed layer from a plain one."""
    s4d, u, dy = inputs(2, 40, 2, 8, torch.float64)
    plain = results(s4d, u, dy)
    again = results(s4d, u, dy, lambda u: checkpoint(s4d, u, use_reentrant=False))
    s4d.compile(fullgraph=True, backend="aot_eager")
    compiled = results(s4d, u, dy)
    return [max(map(relative, other, plain)) for other in (again, compiled)]


@pytest.fixture(scope="module")
def interpreted():
    """All that needs the interpreter, in a process in which triton is imported with it."""
    code = (
        "import json; from tests.model.s4d.test_fused import *\n"
        "of = lambda dtype, shapes: [errors(shape, dtype) for shape in shapes]\n"
        "found = {'float64': of(torch.float64, SHAPES), 'float32': of(torch.float32, FEW)}\n"
        "found |= {'bfloat16': of(BF16, FEW)}\n"
        "print(json.dumps(found | {'differences': differences()}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_INTERPRET": "1", "DIFFUSSM_CONVOLUTION": "triton"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BOUNDS)
def test_triton_equals_ffts_with_gradients(interpreted, dtype):
    shapes = SHAPES if dtype == "float64" else FEW
    assert len(interpreted[dtype]) == len(shapes)
    for shape, found in zip(shapes, interpreted[dtype]):
        assert max(found.values()) < BOUNDS[dtype], (shape, found)


@pytest.mark.slow
def test_triton_gives_the_same_compiled_and_checkpointed(interpreted):
    assert max(interpreted["differences"]) < 1e-13


# ----------------------------------------------------------------------------------------- compiled
def compiled(kernel, capability, **constants):
    """A kernel as `fused.py` launches it for bfloat16, compiled for a GPU that need not be here."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {"x": "*bf16", "u": "*bf16", "y": "*bf16", "dy": "*bf16"}
    pointers |= dict.fromkeys(["taps", "re", "im", "powers", "dtaps", "W"], "*fp32")
    names = kernel.arg_names
    types = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        # sizes and addresses are multiples of 16, as those of XL are
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


def resources(kernel, path):
    """Registers of a thread, and the bytes that it spills."""
    path.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["_scan", "_sums"])
def test_kernel_uses_the_matrix_unit_and_spills_nothing(monkeypatch, tmp_path, name, capability):
    from diffussm_cli.model.s4d import fused

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tile = {"C": fused.CHUNK, "M": 2, "H": 32}
    tile |= {"ADJOINT": False, "IMAGES": 32} if name == "_scan" else {"IMAGES": 16}
    kernel = compiled(getattr(fused, name), capability, **tile)

    assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in kernel.asm["ptx"]
    assert kernel.metadata.shared <= 99 << 10  # what the smallest GPUs of this kind have
    registers, spilled = resources(kernel, tmp_path / "cubin")
    assert registers <= 255
    assert spilled == 0


# --------------------------------------------------------------------------------- without a device
def on_meta(N=8, dtype=BF16):
    return S4D(4, N).to("meta"), torch.empty(2, 4, 300, 2, device="meta", dtype=dtype)


def test_only_u_and_small_tables_are_moved_and_saved():
    s4d, u = on_meta()
    with Tally() as tally:
        y = s4d(u)
    scans = [work for name, work in tally.done if name.startswith("chunk_scan")]
    rows, modes, taps = 2 * 4, 4, 64
    small = rows * (taps + 2 * modes + 2 * modes * (taps + 1))
    assert [work.moved for work in scans] == [2 * (u.numel() + y.numel()) + 4 * small]

    with Tally() as tally:
        y.sum().backward()
    names = [name.split()[0] for name, _ in tally.done if name.startswith("chunk")]
    assert names == ["chunk_scan", "chunk_sums"]
    assert all(p.grad.shape == p.shape for p in s4d.parameters())


def test_instructions_are_those_of_chunks_and_tiles():
    """By hand: 8 rows, one tile of two images, ten chunks of 64 of 600 tokens, four warps."""
    s4d, u = on_meta()
    with Tally() as tally:
        s4d(u)
    (scan,) = [work for name, work in tally.done if name.startswith("chunk_scan")]
    assert scan.operations == 8 * 1 * 10 * 4 * 347 * 64


REFUSED = {
    "needs a GPU, but the device is cpu": (S4D(2, 4), torch.randn(1, 2, 8, 2)),
    "set train.precision=bf16": on_meta(dtype=torch.float32),
    "model.d_state up to 128, and it is 130": on_meta(N=130),
}


@pytest.mark.parametrize("message", REFUSED)
def test_triton_that_cannot_run_is_one_line(message):
    s4d, u = REFUSED[message]
    with pytest.raises(ConfigError, match=f"DIFFUSSM_CONVOLUTION: triton .*{message}"):
        s4d(u)


def test_missing_triton_is_one_line(monkeypatch):
    monkeypatch.setattr(numerics, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="DIFFUSSM_CONVOLUTION: triton is not installed"):
        S4D(2, 4)(torch.randn(1, 2, 8, 2))
