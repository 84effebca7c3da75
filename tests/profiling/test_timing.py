"""The measuring itself: who takes turns, what is scaled, what the shares are. No time is asserted."""

import contextlib
import types

import pytest
import torch
import torch.profiler
from torch.autograd import DeviceType

from diffussm_cli.config import load_config
from diffussm_cli.profiling import memory, timing, work
from diffussm_cli.profiling.flops import cost
from diffussm_cli.profiling.work import Setting

CPU = torch.device("cpu")


def test_calls_take_turns_after_one_warm_up_each():
    order = []
    times = timing.take_turns([lambda: order.append("a"), lambda: order.append("b")], Setting(CPU, repeats=3))
    assert order == ["a", "b"] * 4
    assert [len(t) for t in times] == [3, 3]


def test_median_and_quartiles():
    assert timing.summary([5, 1, 3, 2, 4]) == {"median_ms": 3, "low_ms": 2, "high_ms": 4}
    assert timing.summary([7]) == {"median_ms": 7, "low_ms": 7, "high_ms": 7}


def test_exponent_is_the_slope():
    lengths = [1000, 4000, 16000]
    assert timing.exponent(lengths, [3 * n**1.25 for n in lengths]) == pytest.approx(1.25)


def test_shares_add_up_and_know_the_ssm():
    config, setting = load_config("mnist"), Setting(CPU, batch_size=4)
    model = work.build(config, setting, 2)
    call = work.workload(model, config, work.FORWARD, setting)
    call()
    parts = timing.shares(model, call, CPU)
    assert sum(parts.values()) == pytest.approx(1)
    assert parts["products"] > 0
    assert parts["SSM"] > 0
    assert parts["attention"] == 0
    assert not model.blocks[0].s4d._forward_hooks


def test_shares_on_a_gpu_count_each_kernel_once(monkeypatch):
    """There a profile lists time twice: under the operator, and under the kernel or range that it ran on the device."""
    cpu, gpu = DeviceType.CPU, DeviceType.CUDA

    def event(key, own, whole, kind):
        times = {"self_device_time_total": own, "device_time_total": whole}
        return types.SimpleNamespace(key=key, device_type=kind, self_cpu_time_total=9, cpu_time_total=9, **times)

    events = [event("aten::addmm", 60, 60, cpu), event("aten::gelu", 20, 20, cpu), event(timing.SSM, 0, 20, cpu)]
    events += [event("aten::_fft_r2c", 20, 20, cpu), event("cudaLaunchKernel", 0, 0, cpu)]
    events += [event("gemm_kernel", 60, 60, gpu), event("gelu_kernel", 20, 20, gpu), event("fft_kernel", 20, 20, gpu)]
    events += [event(timing.SSM, 20, 20, gpu)]
    profiler = types.SimpleNamespace(key_averages=lambda: events)
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: contextlib.nullcontext(profiler))
    parts = timing.shares(torch.nn.Linear(1, 1), lambda: None, torch.device("cuda"))
    assert parts == pytest.approx({"products": 0.6, "attention": 0, "SSM": 0.2, "rest": 0.2})


def test_events_are_recorded_on_the_device_that_is_measured(monkeypatch):
    """Not on the current device, whose stream would be empty."""
    recorded = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream=None):
            recorded.append(stream)

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 3.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    assert timing._milliseconds(lambda: recorded.append("call"), torch.device("cuda:1")) == 3.5
    assert recorded == ["stream of cuda:1", "call", "stream of cuda:1"]


@pytest.mark.slow
def test_what_does_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 50 << 20)
    config = load_config("s-256", ["data.resolution=64"])
    assert timing.measure([config], work.FORWARD, Setting(CPU, repeats=1)) == [None]


def test_measured_models_get_their_own_times(monkeypatch):
    """Product 1 ms, a whole model 2 ms, half of another 9 ms and 3 ms without any block: 15 ms, twice 1 ms off."""
    monkeypatch.setattr(timing, "peak_bytes", lambda *_: 7)
    monkeypatch.setattr(timing, "take_turns", lambda calls, _: [[1] * 3, [2] * 3, [9, 10, 8], [3, 4, 2]])
    whole, half = load_config("digits"), load_config("digits", ["model.depth=4"])
    found = timing.measure([whole, half], work.FORWARD, Setting(CPU, batch_size=2, depth=2))
    assert [(m["median_ms"], m["low_ms"], m["high_ms"]) for m in found] == [(2, 2, 2), (15, 14.5, 15.5)]
    assert [(m["blocks_measured"], m["scaled"], m["peak_bytes"]) for m in found] == [(2, False, 7), (2, True, 7)]
    assert found[0]["images_per_second"] == pytest.approx(1e3)
    macs, product = cost(whole).gflops * 1e9 * 2, 4096 * 1152 * 2304
    assert found[0]["of_product_rate"] == pytest.approx(macs / 2 / product)
