"""How processes meet, wait for each other, and notice that one is gone."""

import contextlib
import datetime
import types

import pytest
import torch.distributed as dist

from diffussm_cli.errors import RunError
from diffussm_cli.machine import processes as distributed
from diffussm_cli.machine.processes import World, first_works, gather, peer_errors, process_group

LOST = {
    "gloo": "[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:36431",
    "gloo reset": "[pair.cc:537] Read error [127.0.0.1]:55: Connection reset by peer",
    "gloo timeout": (
        "[unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete"
    ),
    "NCCL": (
        "NCCL error in: a.cpp:1970, remote process exited or there was a network error, NCCL "
        "version 2.27\\nncclRemoteError: A call failed possibly due to a network error or a "
        "remote process exiting prematurely."
    ),
}
OURS = [
    "NCCL error: unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
    (
        "NCCL error: invalid usage: Duplicate GPU detected : rank 0 and rank 1 both on CUDA "
        "device 1000"
    ),
    "No backend type associated with device type cuda for gloo",
    "Tensors must be contiguous for ProcessGroupGloo",
]


@pytest.mark.parametrize("message", LOST.values(), ids=LOST)
def test_lost_connection_is_one_line_error_with_cause(message):
    with (
        pytest.raises(RunError, match="another process of this job has ended") as caught,
        peer_errors(),
    ):
        raise RuntimeError(message)
    assert message.split()[-3:] == str(caught.value).rstrip(")").split()[-3:]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("message", OURS)
def test_other_errors_of_gloo_and_nccl_keep_their_traceback(message):
    with pytest.raises(RuntimeError, match=message[:20]), peer_errors():
        raise RuntimeError(message)


def test_gather_alone_waits_for_days(monkeypatch):
    groups, waited = [], []
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **k: groups.append((backend, k["timeout"]))
    )
    monkeypatch.setattr(
        dist, "new_group", lambda backend, timeout: groups.append((backend, timeout)) or "patient"
    )
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(dist, "all_gather_object", lambda found, value, group: waited.append(group))
    with process_group(World(0, 2), cuda=True):
        gather(1, World(0, 2))
        with first_works(World(0, 2)):
            assert waited == ["patient"]
    assert waited == ["patient", "patient"]
    assert groups[0] == ("cpu:gloo,cuda:nccl", datetime.timedelta(minutes=10))
    assert groups[1] == ("gloo", distributed.PATIENCE)
    assert datetime.timedelta(days=1) < distributed.PATIENCE


class Backend:
    """NCCL's part of a group, which notes how it ends."""

    def __init__(self, ends):
        self.ends = ends

    def _get_backend(self, device):
        assert device.type == "cuda"
        return self

    def abort(self):
        self.ends.append("abort")


@pytest.mark.parametrize(
    ("cuda", "error", "expected"),
    [
        (True, RunError, ["abort", "destroy"]),
        (True, None, ["destroy"]),
        (False, RunError, ["destroy"]),
    ],
)
def test_after_an_error_nccl_drops_its_work_before_the_group_ends(
    monkeypatch, cuda, error, expected
):
    """Its orderly end waits for kernels, which never finish if another process is lost."""
    ends = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: None)
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    monkeypatch.setattr(dist, "group", types.SimpleNamespace(WORLD=Backend(ends)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ends.append("destroy"))
    with (
        pytest.raises(error) if error else contextlib.nullcontext(),
        process_group(World(0, 2), cuda),
    ):
        if error:
            raise error("out of memory")
    assert ends == expected


def test_work_is_shared_in_neighbouring_pieces():
    assert [World(rank, 3).share(10) for rank in range(3)] == [range(3), range(3, 6), range(6, 10)]
    assert World().share(10) == range(10)
    assert [len(World(rank, 3).share(2)) for rank in range(3)] == [0, 1, 1]
