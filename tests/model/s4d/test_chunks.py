"""The convolution chunk by chunk, against the one by FFT and against slow forms."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffussm_cli.errors import ConfigError
from diffussm_cli.model.s4d import chunks
from diffussm_cli.model.s4d.chunks import Toeplitz, chunk_convolution, chunk_length, states_before
from diffussm_cli.model.s4d.layer import S4D
from diffussm_cli.profiling.roofline import Tally
from tests.conftest import device, randn, relative


@pytest.fixture(autouse=True)
def chosen(monkeypatch):
    monkeypatch.setenv("DIFFUSSM_CONVOLUTION", "chunk")


def layer(dtype=torch.float64, D=3, N=8):
    torch.manual_seed(0)
    return S4D(D, N).to(device(), dtype)


def results(s4d, u, dy):
    """y, du and the gradients of the parameters."""
    u = u.detach().requires_grad_()
    y = s4d(u)
    return [y.detach(), *torch.autograd.grad(y, [u, *s4d.parameters()], dy)]


def both(monkeypatch, J, M, dtype):
    """The results by chunks, with u in a dtype, and by FFT in float64."""
    s4d = layer(torch.float32 if dtype == torch.bfloat16 else dtype)
    u, dy = randn(2, 3, J, M).to(dtype), randn(2, 6, J, M, seed=1).to(dtype)
    ours = results(s4d, u, dy)
    assert ours[0].dtype == ours[1].dtype == dtype
    monkeypatch.setenv("DIFFUSSM_CONVOLUTION", "fft")
    return ours, results(s4d.double(), u.double(), dy.double())


LENGTHS = [1, 2, 5, 127, 128, 129, 196, 784, 1024, 4097, 16384]


@pytest.mark.parametrize("M", [1, 2])
@pytest.mark.parametrize("L", LENGTHS)
def test_chunks_equal_ffts_with_gradients(monkeypatch, L, M):
    ours, exact = both(monkeypatch, -(-L // M), M, torch.float64)
    assert [relative(a, b) for a, b in zip(ours, exact)] == pytest.approx([0] * 8, abs=1e-11)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("L", [196, 1024, 16384])
def test_chunks_are_as_precise_as_their_dtype(monkeypatch, dtype, bound, L):
    ours, exact = both(monkeypatch, L // 2, 2, dtype)
    assert max(relative(a, b) for a, b in zip(ours, exact)) < bound


@pytest.mark.parametrize("L", [1, 100, 128, 129, 196, 257, 1024, 3000])
def test_chunks_are_filled_evenly(L):
    T = chunk_length(L)
    n = -(-L // T)
    assert T <= chunks.CHUNK
    assert n == -(-L // chunks.CHUNK)  # no more chunks than needed
    assert n * T - L < n  # less than one token of each chunk is empty


def test_toeplitz_matrices_hold_the_taps_of_both_directions():
    taps = torch.tensor([[[1.0, 2, 3]], [[4.0, 5, 6]]])
    forward, backward = Toeplitz.apply(taps, torch.float32)[:, 0]
    assert forward.tolist() == [[1, 2, 3], [0, 1, 2], [0, 0, 1]]
    assert backward.tolist() == [[4, 0, 0], [5, 4, 0], [6, 5, 4]]


def test_gradient_of_toeplitz_matrices_sums_their_diagonals():
    taps = randn(2, 3, 7, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: Toeplitz.apply(t, torch.float64), (taps,))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 13])
def test_states_follow_the_recurrence_from_chunk_to_chunk(n):
    D, B, modes, T = 2, 3, 4, 5
    s = randn(2, D, B, n, 2 * modes, dtype=torch.float64)
    x = -randn(2, D, modes, seed=1, dtype=torch.float64).abs() / 10
    y = randn(2, D, modes, seed=2, dtype=torch.float64)
    found = torch.complex(*states_before(s, x, y, T).chunk(2, dim=-1))
    added = torch.complex(*s.chunk(2, dim=-1))
    for direction, order in enumerate([range(n), reversed(range(n))]):
        state = torch.zeros_like(added[0, :, :, 0])
        for i in order:
            torch.testing.assert_close(found[direction, :, :, i], state)
            decay = torch.exp(torch.complex(x, y)[direction] * T)
            state = decay[:, None] * state + added[direction, :, :, i]


def tally(L, width=4, N=8, B=2):
    """The work of a forward pass of the convolution."""
    s4d = S4D(width, N).to("meta")
    kernel = s4d.chunked(L)
    with Tally() as counted:
        chunk_convolution(torch.empty(B, width, L // 2, 2, device="meta"), kernel)
    return [work for _, work in counted.done]


def test_cost_is_linear_in_the_length():
    """Of L tokens: T products within a chunk and 2N for the states, in each direction."""
    width, N, B, T = 4, 8, 2, chunks.CHUNK
    for L in (1024, 4096):
        operations = sum(work.operations for work in tally(L, width, N, B))
        assert operations == 2 * width * B * L * (2 * T + 4 * N)
    long, longer = (sum(work.moved for work in tally(L)) for L in (16384, 32768))
    assert longer / long == pytest.approx(2, rel=0.1)


def test_states_and_their_gradients_move_few_numbers():
    """By hand, for each number that the chunks add.

    Four fused products read two numbers of half of them and write one, which makes 6; parts,
    numbers and directions are copied together, which makes 6 more. The gradient scans once more,
    and multiplies and sums it with the states.
    """
    D, B, n, half = 8, 4, 16, 4
    s = torch.empty(2, D, B, n, 2 * half, device="meta").requires_grad_()
    x = torch.empty(2, D, half, device="meta")
    with Tally() as forward:
        before = states_before(s, x, x, 128)
    with Tally() as backward:
        before.sum().backward()
    scan, gradient = (
        sum(w.moved for _, w in tally.done) / (4 * s.numel()) for tally in (forward, backward)
    )
    assert scan == pytest.approx(12, rel=0.05)
    assert gradient == pytest.approx(24, rel=0.05)
    assert sum(w.kernels for _, w in forward.done) < 2 * 4 * n + 30


def test_nothing_waits_for_a_copy_from_the_host():
    """A tensor that is made on the host and moved makes every step wait for the device."""

    class Devices(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            assert all(t.device.type == "meta" for t in tensors), operator
            return operator(*args, **(kwargs or {}))

    s4d, u = S4D(4, 8).to("meta"), torch.empty(2, 4, 300, 2, device="meta")
    with Devices():
        s4d(u).sum().backward()


def test_chunks_compile_into_one_graph_with_equal_gradients():
    s4d, u, dy = layer(), randn(2, 3, 150, 2), randn(2, 6, 150, 2, seed=1)
    eager = results(s4d, u.double(), dy.double())
    s4d.compile(fullgraph=True, backend="aot_eager")
    compiled = results(s4d, u.double(), dy.double())
    assert [relative(a, b) for a, b in zip(compiled, eager)] == pytest.approx([0] * 8, abs=1e-12)


def test_ffts_are_the_default_to_the_last_bit(monkeypatch):
    s4d, u, dy = layer(torch.float32), randn(2, 3, 50, 2), randn(2, 6, 50, 2, seed=1)
    by_chunks = results(s4d, u, dy)
    monkeypatch.setenv("DIFFUSSM_CONVOLUTION", "fft")
    by_fft = results(s4d, u, dy)
    monkeypatch.delenv("DIFFUSSM_CONVOLUTION")
    assert all(torch.equal(a, b) for a, b in zip(results(s4d, u, dy), by_fft))
    assert not torch.equal(by_chunks[0], by_fft[0])


def test_unknown_convolution_is_one_line(monkeypatch):
    monkeypatch.setenv("DIFFUSSM_CONVOLUTION", "cudnn")
    with pytest.raises(ConfigError, match="CONVOLUTION: 'cudnn' must be fft, chunk or triton"):
        layer()(randn(1, 3, 8, 2, dtype=torch.float64))
