"""S4D: golden values, kernel against its definition, convolution against the recurrence, precision,
cache.
"""

import math

import pytest
import torch

from diffussm_cli.model.mixer import kept_kernels
from diffussm_cli.model.s4d import layer as layer_module
from diffussm_cli.model.s4d import numerics
from diffussm_cli.model.s4d.convolution import (
    Convolution,
    KernelSpectra,
    convolve,
    fft_length,
    kernel_spectra,
)
from diffussm_cli.model.s4d.kernel import s4d_kernel
from diffussm_cli.model.s4d.layer import S4D
from diffussm_cli.model.s4d.reference import s4d_kernel_naive, s4d_recurrence
from tests.conftest import device, float32_arithmetic, golden, randn, relative

SSM_NAMES = {"log_dt", "log_A_real", "A_imag", "B", "C", "D_skip"}


def golden_parameters(dtype):
    g = golden("s4d_kernel")
    A = g["A"]
    pairs = [torch.view_as_real(g[name]).to(dtype) for name in ("B", "C")]
    return g, (g["dt"].to(dtype), A.real.to(dtype), A.imag.to(dtype), *pairs)


def layer(D=6, N=8, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return S4D(D, N).to(device(), dtype)


def parameters(s4d, direction):
    dt, A_real = s4d.log_dt.exp()[direction], -s4d.log_A_real.exp()[direction]
    return dt, A_real, s4d.A_imag[direction], s4d.B[direction], s4d.C[direction]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kernel", [s4d_kernel, s4d_kernel_naive])
def test_kernel_equals_reference_implementation(dtype, tolerance, kernel):
    g, p = golden_parameters(dtype)
    assert relative(kernel(*p, L=g["kernel"].shape[-1]), g["kernel"]) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_convolutions_equal_reference_implementation(dtype, tolerance):
    g, p = golden_parameters(dtype)
    K = s4d_kernel(*p, L=g["u"].shape[-1])
    causal, anticausal = convolve(g["u"].to(dtype), kernel_spectra(torch.stack([K, K]))).chunk(
        2, dim=1
    )
    assert relative(causal, g["y_causal"]) < tolerance
    assert relative(anticausal, g["y_anticausal"]) < tolerance


@pytest.mark.parametrize("L", [1, 2, 3, 7, 64, 97, 196, 1000])
def test_two_level_kernel_equals_definition_with_gradients(L):
    values, gradients = [], []
    for kernel in (s4d_kernel, s4d_kernel_naive):
        s4d = layer()
        K = kernel(*parameters(s4d, 0), L)
        weight = torch.linspace(-1, 1, L, dtype=torch.float64, device=device()).cos()
        gradients.append(
            torch.autograd.grad(
                (K * weight).sum(), [s4d.log_dt, s4d.log_A_real, s4d.A_imag, s4d.B, s4d.C]
            )
        )
        values.append(K)
    torch.testing.assert_close(values[0], values[1], rtol=1e-10, atol=1e-12)
    for fast, slow in zip(*gradients):
        torch.testing.assert_close(fast, slow, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("L", [1, 2, 5, 31, 64, 100])
def test_layer_equals_recurrence_in_both_directions(L):
    s4d, u = layer(), randn(3, 6, L, dtype=torch.float64)
    forward, backward = s4d(u).chunk(2, dim=1)
    expected = s4d_recurrence(u, *parameters(s4d, 0), s4d.D_skip[0])
    reversed_ = s4d_recurrence(u.flip(-1), *parameters(s4d, 1), s4d.D_skip[1]).flip(-1)
    torch.testing.assert_close(forward, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(backward, reversed_, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("L", [1, 2, 9, 16])
def test_hand_written_backward_of_convolution_equals_autograd(L):
    u, K = (randn(s, 3, L, seed=s, dtype=torch.float64).requires_grad_() for s in (4, 2))
    weight = randn(4, 6, L, dtype=torch.float64)
    results = []
    for y in (
        Convolution.apply(u[..., None], KernelSpectra.apply(K))[..., 0],
        convolve(u, kernel_spectra(K)),
    ):
        results.append((y, *torch.autograd.grad((y * weight).sum(), (u, K))))
    for by_hand, automatic in zip(*results):
        torch.testing.assert_close(by_hand, automatic, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("J", "M"), [(5, 2), (8, 1), (3, 4)])
@pytest.mark.parametrize("kept", [0, 1 << 20])
@pytest.mark.parametrize("numbers", [1, 50, 1 << 20])
def test_slices_keep_values_and_gradients(monkeypatch, J, M, numbers, kept):
    """Whatever is sliced or kept, and with tokens in planes: the convolution of the tokens in
    order, its gradients.
    """
    monkeypatch.setattr(numerics, "KEPT_NUMBERS", kept)
    monkeypatch.setattr(numerics, "SLICE", {True: numbers, False: numbers})
    s4d, planes = layer(), randn(2, M, 6, J, dtype=torch.float64).requires_grad_()
    u = planes.permute(0, 2, 3, 1)  # (B, D, J, M)
    K = s4d.taps(J * M)
    expected = convolve(u.flatten(2), kernel_spectra(K)).unflatten(2, (J, M))
    torch.testing.assert_close(s4d(u), expected, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(s4d(u), expected, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(expected)
    ours, theirs = (
        torch.autograd.grad((y * weight).sum(), [planes, *s4d.parameters()])
        for y in (s4d(u), expected)
    )
    for ours_, theirs_ in zip(ours, theirs):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-9, atol=1e-11)


def test_spectra_too_large_to_keep_are_made_slice_by_slice(monkeypatch, kernels_built):
    s4d, u = layer(), randn(2, 6, 33, dtype=torch.float64)
    with torch.no_grad():
        expected = s4d(u)
        monkeypatch.setattr(layer_module, "KEEP_BYTES", 16 * 6 * 33)
        monkeypatch.setattr(numerics, "SLICE", {True: 2 * 33 * 4, False: 1})
        kernels_built.clear()
        with kept_kernels(s4d):
            for _ in range(2):
                torch.testing.assert_close(s4d(u), expected, rtol=1e-10, atol=1e-12)
    assert kernels_built == [33, 33] * 2  # of 4 channels and of 2


def test_memory_kept_for_backward_grows_with_sequence_alone(monkeypatch):
    """Five numbers per channel and token: u and the spectra of two kernels; no exponential of their
    modes.
    """
    monkeypatch.setattr(numerics, "KEPT_NUMBERS", 0)

    def kept(L):
        found = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: found.update({t.data_ptr(): t.numel() * t.element_size() // 4}) or t,
            lambda t: t,
        ):
            s4d(randn(1, 64, L))
        return sum(found.values())

    s4d = S4D(64, 64).to(device())
    assert kept(4096) - kept(256) == pytest.approx(5 * 64 * (4096 - 256), rel=0.02)


@pytest.mark.parametrize("numbers", [1, 100, 1 << 20])
def test_gradients_of_kernel_equal_those_of_its_definition(monkeypatch, numbers):
    """Of every argument, at lengths that are squares and that are not,
    whatever the slices of rows.
    """
    monkeypatch.setattr(numerics, "SLICE", {True: numbers, False: numbers})
    generator = torch.Generator().manual_seed(0)
    for L in (1, 16, 23):
        dt, re, im = (
            torch.rand(s, generator=generator, dtype=torch.float64)
            for s in ((2, 3), (2, 3, 4), (2, 3, 4))
        )
        B, C = torch.randn(2, 2, 3, 4, 2, generator=generator, dtype=torch.float64)
        skip = torch.randn(2, 3, generator=generator, dtype=torch.float64)
        *arguments, skip = (
            t.detach().to(device()).requires_grad_() for t in (dt, -re - 0.1, 5 * im, B, C, skip)
        )
        weight = randn(2, 3, L, dtype=torch.float64)
        naive = s4d_kernel_naive(*arguments, L) + skip[..., None] * (
            torch.arange(L, device=device()) == 0
        )
        ours = s4d_kernel(*arguments, L, skip)
        torch.testing.assert_close(ours, naive, rtol=1e-10, atol=1e-12)
        gradients = (
            torch.autograd.grad((K * weight).sum(), [*arguments, skip]) for K in (ours, naive)
        )
        for a, b in zip(*gradients):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_kernels_hold_no_denormal_numbers():
    """On which a CPU is a hundred times slower: at the start of training half of the modes decay
    that far.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        K = S4D(64, 64).to(device()).taps(4096)
        bound = torch.finfo(K.dtype).tiny
        assert not ((K != 0) & (K.abs() < bound)).any()
        assert (K == 0).any()  # some did decay


def test_reversal_swaps_directions():
    s4d, u = layer(), randn(2, 6, 33, dtype=torch.float64)
    forward, backward = s4d(u).chunk(2, dim=1)
    with torch.no_grad():
        for p in s4d.parameters():
            p.copy_(p.flip(0))
    swapped_forward, swapped_backward = s4d(u.flip(-1)).chunk(2, dim=1)
    torch.testing.assert_close(swapped_backward.flip(-1), forward)
    torch.testing.assert_close(swapped_forward.flip(-1), backward)


def test_float32_kernel_error_at_the_start_of_training():
    torch.manual_seed(0)
    s4d, exact = S4D(128, 64).to(device()), S4D(128, 64).double().to(device())
    torch.nn.init.zeros_(s4d.D_skip)  # it is as large as the kernel, and has no error
    exact.load_state_dict(s4d.state_dict())
    error = (s4d.taps(4096) - exact.taps(4096)).norm(dim=-1) / exact.taps(4096).norm(dim=-1)
    assert error.max() < 1e-4


@pytest.mark.parametrize("L", [1, 2, 3, 97, 196, 784, 1021, 1024])
def test_fft_length_is_long_enough_even_and_smooth(L):
    n = fft_length(L)
    assert n >= 2 * L - 1
    assert n % 2 == 0
    assert n <= 2.3 * L + 2
    for p in (2, 3, 5, 7):
        while n % p == 0:
            n //= p
    assert n == 1


def test_initial_state_space_is_s4d_lin():
    torch.manual_seed(0)
    s4d = S4D(512, 64)
    assert torch.equal(-s4d.log_A_real.exp(), torch.full((2, 512, 32), -0.5))
    torch.testing.assert_close(s4d.A_imag[1, 5], math.pi * torch.arange(32.0))
    assert 1e-3 <= s4d.log_dt.exp().min() < 1.1e-3
    assert 0.09 < s4d.log_dt.exp().max() <= 0.1
    assert torch.equal(
        torch.view_as_complex(s4d.B.detach()), torch.ones(2, 512, 32, dtype=torch.complex64)
    )
    assert abs(float(torch.view_as_complex(s4d.C.detach()).abs().square().mean()) - 1) < 0.02
    assert sum(p.numel() for p in s4d.parameters()) == 194 * 2 * 512


CASTS = {
    "to bfloat16": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "to device and dtype": lambda m: m.to(device(), torch.float16),
    "type": lambda m: m.type(torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casts_leave_parameters_float32_and_unrounded(cast):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), S4D(6, 8))
    before = {k: v.clone() for k, v in model[1].state_dict().items()}
    cast(model)
    assert model[0].weight.dtype in (torch.bfloat16, torch.float16)
    assert {n: p.dtype for n, p in model[1].named_parameters()} == dict.fromkeys(
        SSM_NAMES, torch.float32
    )
    assert all(torch.equal(v.cpu(), before[k]) for k, v in model[1].state_dict().items())


def test_spectra_and_transforms_are_float32_under_autocast(monkeypatch):
    seen = {}
    for name in ("rfft", "irfft"):
        original = getattr(torch.fft, name)

        def spy(x, *args, original=original, name=name, **kwargs):
            seen.setdefault(name, set()).add(x.dtype)
            return original(x, *args, **kwargs)

        monkeypatch.setattr(torch.fft, name, spy)
    s4d, u = layer(dtype=torch.float32), randn(2, 6, 32)
    exact = s4d(u)
    seen.clear()
    with torch.autocast(device().type, torch.bfloat16):
        y = s4d(u.bfloat16())
        K = s4d.taps(32)
    assert seen == {"rfft": {torch.float32}, "irfft": {torch.complex64}}
    assert y.dtype == torch.bfloat16
    assert relative(y, exact) < 0.01  # the input's own rounding, and the output's
    assert K.dtype == torch.float32


def test_kernel_under_autocast_keeps_its_bits():
    s4d, u = layer(dtype=torch.float32), randn(2, 6, 32)
    with torch.autocast(device().type, torch.bfloat16):
        cast = s4d(u)  # float32 in, float32 out: nothing may be rounded
    assert torch.equal(cast, s4d(u))


def test_gradients_taken_under_autocast_keep_their_bits():
    s4d, u = layer(dtype=torch.float32), randn(2, 6, 32)
    gradients = torch.autograd.grad(s4d(u).square().sum(), list(s4d.parameters()))
    loss = s4d(u).square().sum()
    with torch.autocast(device().type, torch.bfloat16):
        cast = torch.autograd.grad(loss, list(s4d.parameters()))
    for a, b in zip(cast, gradients):
        assert torch.equal(a, b)


@pytest.fixture(params=["by the old switch", "by the new switch"])
def reduced_precision(request):
    """Products of float32 allowed in TensorFloat-32,
    and the switches back as they were afterwards.
    """
    if request.param == "by the old switch":
        torch.set_float32_matmul_precision("medium")
    elif hasattr(torch.backends, "fp32_precision"):
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    else:
        pytest.skip("this torch has one switch only")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("reduced_precision")
def test_reduced_precision_products_do_not_reach_the_kernel(monkeypatch):
    inside = []

    def spied(original):
        def spy(*arguments, **named):
            inside.append(float32_arithmetic()["products"])
            return original(*arguments, **named)

        return spy

    for owner, name in ((torch, "bmm"), (torch.Tensor, "__matmul__")):
        monkeypatch.setattr(owner, name, spied(getattr(owner, name)))
    assert not float32_arithmetic()["products"]
    layer(dtype=torch.float32).taps(16).sum().backward()
    assert inside == [True] * 5  # one, and four in the backward pass
    assert not float32_arithmetic()["products"]


def test_kernels_are_kept_by_length_inside_the_context_only(kernels_built):
    s4d, u = layer(dtype=torch.float32), randn(1, 6, 16)
    with torch.no_grad():
        s4d(u)
        s4d(u)
        assert kernels_built == [16, 16]
        kernels_built.clear()
        with kept_kernels(s4d):
            for L in (16, 20, 16):
                s4d(randn(1, 6, L))
            assert kernels_built == [16, 20]
            with torch.enable_grad():  # training makes them at each step
                s4d(u)
            assert kernels_built == [16, 20, 16]
        s4d(u)
        assert kernels_built == [16, 20, 16, 16]


def test_odd_state_size_is_rejected():
    with pytest.raises(ValueError, match="d_state must be even"):
        S4D(4, 5)
