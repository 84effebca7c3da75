"""The measuring itself: who takes turns, what is scaled, what the shares are. No time is asserted."""

import pytest
import torch

from diffussm_cli.config import load_config
from diffussm_cli.profiling import latency
from diffussm_cli.profiling.flops import cost
from diffussm_cli.profiling.latency import Setting, Timing

CPU = torch.device("cpu")


def test_calls_take_turns_after_one_warm_up_each():
    order = []
    times = latency.take_turns([lambda: order.append("a"), lambda: order.append("b")], Setting(CPU, repeats=3))
    assert order == ["a", "b"] * 4
    assert [len(t) for t in times] == [3, 3]


def test_median_and_quartiles():
    assert latency.summary([5, 1, 3, 2, 4]) == Timing(3, 2, 4)
    assert latency.summary([7]) == Timing(7, 7, 7)


def test_exponent_is_the_slope():
    lengths = [1000, 4000, 16000]
    assert latency.exponent(lengths, [3 * n**1.25 for n in lengths]) == pytest.approx(1.25)


@pytest.mark.parametrize("kind", latency.KINDS)
@pytest.mark.parametrize("preset", ["digits", "mnist-dit"])
def test_workloads_do_what_they_say(kind, preset):
    config, setting = load_config(preset), Setting(CPU, batch_size=2)
    model = latency.build(config, setting, 1)
    seen = []
    model.register_forward_hook(lambda m, args, out: seen.append((len(args[0]), m.training, out.requires_grad)))
    latency.workload(model, config, kind, setting)()
    assert seen == [{"forward": (2, False, False), "forward+backward": (2, True, True)}.get(kind, (4, False, False))]


def test_built_models_have_no_zero_weights_and_finite_output():
    config = load_config("digits")
    model = latency.build(config, Setting(CPU), 2)
    assert len(model.blocks) == 2
    assert all(p.abs().sum() > 0 for p in model.parameters())
    assert torch.isfinite(model(torch.randn(1, 1, 8, 8), torch.tensor([5]), torch.tensor([1]))).all()


def test_shares_add_up_and_know_the_ssm():
    config, setting = load_config("mnist"), Setting(CPU, batch_size=4)
    model = latency.build(config, setting, 2)
    call = latency.workload(model, config, latency.FORWARD, setting)
    call()
    parts = latency.shares(model, call, CPU)
    assert sum(parts.values()) == pytest.approx(1)
    assert parts["products"] > 0
    assert parts["SSM"] > 0
    assert parts["attention"] == 0
    assert not model.blocks[0].s4d._forward_hooks


@pytest.mark.slow
def test_peak_memory_is_that_of_weights_and_activations():
    """35 M floats of weights; their gradients come on top in training."""
    config, setting = load_config("s-256", ["data.resolution=64"]), Setting(CPU)
    weights = 4 * 35_520_784
    forward = latency.peak_bytes(config, latency.FORWARD, setting)
    training = latency.peak_bytes(config, latency.TRAINING, setting)
    if forward is None:
        pytest.skip("this system does not tell")
    assert 0.9 * weights < forward < 3 * weights
    assert training - forward > 0.7 * weights
    scaled = latency.peak_bytes(config, latency.FORWARD, Setting(CPU, depth=4))
    assert scaled == pytest.approx(forward, rel=0.25)


@pytest.mark.slow
def test_what_does_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr(latency, "available_bytes", lambda: 50 << 20)
    config = load_config("s-256", ["data.resolution=64"])
    assert latency.measure([config], latency.FORWARD, Setting(CPU, repeats=1)) == [None]


def test_measured_models_get_their_own_times(monkeypatch):
    """Product 1 ms, a whole model 2 ms, half of another 9 ms and 3 ms without any block: 15 ms, twice 1 ms off."""
    monkeypatch.setattr(latency, "peak_bytes", lambda *_: 7)
    monkeypatch.setattr(latency, "take_turns", lambda calls, _: [[1] * 3, [2] * 3, [9, 10, 8], [3, 4, 2]])
    whole, half = load_config("digits"), load_config("digits", ["model.depth=4"])
    found = latency.measure([whole, half], latency.FORWARD, Setting(CPU, batch_size=2, depth=2))
    assert [m.time for m in found] == [Timing(2, 2, 2), Timing(15, 14.5, 15.5)]
    assert [m.blocks for m in found] == [2, 2]
    assert [m.peak_bytes for m in found] == [7, 7]
    assert found[0].images_per_second == pytest.approx(1e3)
    macs, product = cost(whole).gflops * 1e9 * 2, 4096 * 1152 * 2304
    assert found[0].rate == pytest.approx(macs / 2 / product)
