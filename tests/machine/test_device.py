"""Devices and precisions by name."""

import contextlib
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from diffussm_cli.data.opening import open_source
from diffussm_cli.errors import ConfigError
from diffussm_cli.machine import device
from diffussm_cli.machine.device import (
    full_float32,
    is_out_of_memory,
    keep_freed_memory,
    pick_device,
    pick_dtype,
)
from diffussm_cli.training.loop import Trainer
from tests.conftest import float32_arithmetic

CPU = torch.device("cpu")


def test_device_is_chosen_by_name():
    assert pick_device("cpu") == CPU
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFUSSM_DEVICE", "tpu")
        with pytest.raises(ConfigError, match="DIFFUSSM_DEVICE: 'tpu' is not .*unset"):
            pick_device("auto")
    for name in ("tpu", "cuda:99", "meta-ish"):
        with pytest.raises(ConfigError, match=f"device: '{name}' is not available here"):
            pick_device(name)


@pytest.mark.parametrize(
    ("cuda", "mps", "named", "expected"),
    [
        (True, True, None, "cuda"),
        (False, True, None, "mps"),
        (False, False, None, "cpu"),
        (True, True, "cpu", "cpu"),
    ],
)
def test_auto_is_cuda_then_mps_then_the_cpu_unless_the_environment_names_one(
    monkeypatch, cuda, mps, named, expected
):
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(*size))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    for variable in ("LOCAL_RANK", "DIFFUSSM_DEVICE"):
        monkeypatch.delenv(variable, raising=False)
    if named:
        monkeypatch.setenv("DIFFUSSM_DEVICE", named)
    assert pick_device("auto") == torch.device(expected)


@pytest.mark.parametrize(
    "name", ["meta", "cuda:-1", "cuda:99999999999999999999", "", "hpu", "mps:7"]
)
def test_unusable_device_is_one_line_error(name):
    with pytest.raises(ConfigError, match=f"device: '{name}' is not available here"):
        pick_device(name)


@pytest.mark.parametrize(
    ("name", "local_rank", "current"),
    [
        ("cuda", "3", "cuda:3"),
        ("auto", "2", "cuda:2"),
        ("cuda:1", "3", "cuda:1"),
        ("cuda", None, None),
    ],
)
def test_cuda_device_becomes_the_current_one(monkeypatch, name, local_rank, current):
    """NCCL, FSDP and events use the current device, whichever the tensors are on."""
    chosen, zeros = [], torch.zeros
    for probe in ("zeros", "empty"):
        monkeypatch.setattr(torch, probe, lambda *size, device: zeros(*size))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for variable in ("LOCAL_RANK", "DIFFUSSM_DEVICE"):
        monkeypatch.delenv(variable, raising=False)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    device = pick_device(name)
    assert device == torch.device(current or "cuda")
    assert chosen == ([torch.device(current)] if current else [])


SHARED = {  # train.device, what the launcher sets, GPUs of this machine, and the end of the line
    "torchrun": (
        "cuda:0",
        {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        2,
        "use cuda, a GPU for",
    ),
    "another launcher": (
        "cuda",
        {"WORLD_SIZE": "4"},
        8,
        "LOCAL_RANK is not set; start them with torchrun",
    ),
    "a GPU for each": (
        "cuda",
        {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "3"},
        4,
        None,
    ),
    "a machine for each": (
        "cuda:0",
        {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        8,
        None,
    ),
    "each sees its own": ("cuda", {"WORLD_SIZE": "4"}, 1, None),
}


@pytest.mark.parametrize(("name", "launched", "count", "line"), SHARED.values(), ids=SHARED)
def test_processes_of_machine_do_not_share_a_gpu(monkeypatch, name, launched, count, line):
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(*size))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for variable in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in launched.items():
        monkeypatch.setenv(variable, value)
    if line is None:
        assert pick_device(name).type == "cuda"
        return
    with pytest.raises(
        ConfigError, match=f"device: '{name}' would be shared by . processes.*{line}"
    ):
        pick_device(name)


def test_workers_take_one_thread_each_and_the_caller_the_rest():
    """In a fresh process: there the number of the main thread is not decided yet."""
    code = """
import torch
from diffussm_cli.machine.device import helpers
with helpers(2) as pool:
    print(*pool.map(lambda _: torch.get_num_threads(), range(4)))
print(torch.get_num_threads())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["1 1 1 1", str(torch.get_num_threads())]


def test_thread_pool_is_made_only_in_its_own_place():
    """A thread that shares the cores with the one that computes slows it down."""
    root = Path(device.__file__).parents[1]
    made = {
        p.name
        for p in root.rglob("*.py")
        for word in ("ThreadPoolExecutor(", "Thread(")
        if word in p.read_text()
    }
    assert made == {"device.py"}


def test_bf16_needs_hardware(monkeypatch):
    for fast in (True, False):
        monkeypatch.setattr(device, "has_bf16", lambda _, fast=fast: fast)
        assert pick_dtype("fp32", CPU) == torch.float32
        assert pick_dtype("auto", CPU) == (torch.bfloat16 if fast else torch.float32)
    with pytest.raises(ConfigError, match="bf16 has no hardware support on this cpu"):
        pick_dtype("bf16", CPU)


def test_torch_without_onednn_has_no_bf16(monkeypatch):
    """As on Apple's processors."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", types.SimpleNamespace())
    assert not device.has_bf16(CPU)


def test_step_in_bf16_keeps_weights_and_loss_in_float32(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "has_bf16", lambda _: True)
    config = tiny("train.precision=bf16")
    trainer = Trainer(config, open_source(config), tmp_path)
    inside = set()
    trainer.step.model.blocks[0].W0.register_forward_hook(lambda *call: inside.add(call[2].dtype))
    records = list(trainer.run())
    assert inside == {torch.bfloat16}
    assert {p.dtype for p in trainer.step.model.parameters()} == {torch.float32}
    assert 0 < records[-1]["loss"] < 10


@pytest.mark.parametrize(
    "older", [False, True], ids=["as this torch has it", "as torch 2.6 had it"]
)
def test_full_float32_holds_inside_block_and_is_restored_after(monkeypatch, older):
    torch.set_float32_matmul_precision("medium")
    before = float32_arithmetic()
    try:
        if older:
            monkeypatch.delattr(type(torch.backends), "fp32_precision", raising=False)
        with contextlib.suppress(KeyError), full_float32():
            monkeypatch.undo()
            inside = float32_arithmetic()
            raise KeyError
        assert inside == dict.fromkeys(before, True)
        assert float32_arithmetic() == before == {"products": False, "convolutions": False}
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_out_of_memory_is_recognised():
    with pytest.raises(RuntimeError) as failed:
        torch.empty(1 << 60)
    assert is_out_of_memory(failed.value)
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


@pytest.mark.parametrize(
    ("platform", "has_it"), [("linux", True), ("linux", False), ("darwin", True)]
)
def test_only_glibc_is_told_to_keep_large_freed_blocks(monkeypatch, platform, has_it):
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, told = -1, -3, {}  # as malloc.h has them
    # musl has none
    library = types.SimpleNamespace(**({"mallopt": told.__setitem__} if has_it else {}))
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(device.sys, "platform", platform)
    keep_freed_memory()
    wanted = {M_MMAP_THRESHOLD: 2**30, M_TRIM_THRESHOLD: 2**31 - 1}
    assert told == (wanted if platform == "linux" and has_it else {})
