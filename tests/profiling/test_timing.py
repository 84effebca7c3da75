"""Measuring: what is run, who takes turns, what the figures are. No time is asserted."""

import pytest
import torch

from diffussm_cli.config import load_config
from diffussm_cli.profiling import timing
from diffussm_cli.profiling.flops import cost
from diffussm_cli.profiling.timing import Setting

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", timing.KINDS)
@pytest.mark.parametrize("preset", ["digits", "mnist-dit"])
def test_workload_does_the_work_of_its_name(kind, preset):
    config, setting = load_config(preset, ["model.depth=1"]), Setting(CPU, batch_size=2)
    model = timing.random_model(config, setting)
    seen = []
    model.register_forward_hook(
        lambda m, args, out: seen.append((len(args[0]), m.training, out.requires_grad))
    )
    timing.workload(model, config, kind, setting)()
    expected = {
        "forward": (2, False, False),
        "forward+backward": (2, True, True),
        "guided step": (4, False, False),
    }
    assert seen == [expected[kind]]


def test_random_models_have_no_zero_weights_and_finite_output():
    model = timing.random_model(load_config("digits"), Setting(CPU))
    assert all(p.abs().sum() > 0 for p in model.parameters())
    output = model(torch.randn(1, 1, 8, 8), torch.tensor([5]), torch.tensor([1]))
    assert torch.isfinite(output).all()


def test_reference_product_has_its_stated_multiply_adds():
    call, macs = timing.product(Setting(CPU), rows=3, width=5)
    assert call().shape == (3, 10)
    assert macs == 3 * 5 * 10


def test_calls_take_turns_after_one_warm_up_each():
    order = []
    calls = [lambda: order.append("a"), lambda: order.append("b")]
    times = timing.take_turns(calls, Setting(CPU, repeats=3))
    assert order == ["a", "b"] * 4
    assert [len(t) for t in times] == [3, 3]


def test_median_and_quartiles_are_those_of_the_times():
    assert timing.summary([5, 1, 3, 2, 4]) == {"median_ms": 3, "low_ms": 2, "high_ms": 4}
    assert timing.summary([7]) == {"median_ms": 7, "low_ms": 7, "high_ms": 7}


def test_exponent_is_the_slope():
    lengths = [1000, 4000, 16000]
    assert timing.exponent(lengths, [3 * n**1.25 for n in lengths]) == pytest.approx(1.25)


def test_model_that_does_not_fit_is_left_out_and_the_others_are_measured(monkeypatch):
    """2.7 GB of weights where 300 MB are free."""
    monkeypatch.setattr(timing, "available_bytes", lambda device: 300 << 20)
    configs = [load_config("xl-256"), load_config("digits")]
    none, measured = timing.measure(configs, timing.FORWARD, Setting(CPU, repeats=1))
    assert none is None
    assert measured["median_ms"] > 0
    assert torch.empty(400 << 20, dtype=torch.uint8).fill_(1)[-1] == 1  # no limit stays behind


def test_measured_models_get_their_own_times(monkeypatch):
    """The product takes 1 ms, one model 2 ms, another 8 to 10 ms."""
    monkeypatch.setattr(timing, "take_turns", lambda calls, _: [[1] * 3, [2] * 3, [9, 10, 8]])
    configs = [load_config("digits"), load_config("digits", ["model.depth=4"])]
    first, second = timing.measure(configs, timing.FORWARD, Setting(CPU, batch_size=2))
    assert (first["median_ms"], first["low_ms"], first["high_ms"]) == (2, 2, 2)
    assert (second["median_ms"], second["low_ms"], second["high_ms"]) == (9, 8.5, 9.5)
    assert first["images_per_second"] == pytest.approx(1e3)
    assert first["peak_bytes"] is None  # a CPU does not tell
    macs = cost(configs[0]).gflops * 1e9 * 2
    assert first["of_product_rate"] == pytest.approx(macs / 2 / (4096 * 1152 * 2304))


@pytest.mark.parametrize("condition", ["classes", "text"])
def test_guided_step_counts_as_two_passes(monkeypatch, condition):
    monkeypatch.setattr(timing, "take_turns", lambda calls, _: [[1], [1]])
    text = ["data.text=x", "model.text_width=12", "model.num_classes=0"]
    config = load_config("digits", text if condition == "text" else [])
    rates = [
        timing.measure([config], kind, Setting(CPU))[0]["of_product_rate"]
        for kind in (timing.FORWARD, timing.GUIDED)
    ]
    assert rates[1] == pytest.approx(2 * rates[0])


@pytest.mark.parametrize("kind", timing.KINDS)
def test_peak_on_cuda_is_that_of_one_model(kind):
    """Weights at least, and not those of the model measured before it."""
    from tests.conftest import device

    if device().type != "cuda":
        pytest.skip("needs pytest --device cuda")
    # so many blocks that their weights exceed what training one takes
    configs = [load_config("s-256", [f"model.depth={depth}"]) for depth in (16, 1)]
    large, small = timing.measure(configs, kind, Setting(device(), repeats=1))
    weights = [4 * cost(config).parameters for config in configs]
    assert large["peak_bytes"] > weights[0] > small["peak_bytes"] > weights[1]


def test_memory_of_gpu_is_what_is_free_there(monkeypatch):
    free = {torch.device("cuda:1"): 5 << 30}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], 80 << 30))
    assert timing.available_bytes(torch.device("cuda:1")) == 5 << 30
