"""`train.compile=true`: the course of eager training and several processes."""

import copy
import json
import shutil

import pytest
import torch
import torch.distributed
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.torch_version import TorchVersion

from diffussm_cli import runs
from diffussm_cli.machine.processes import World
from diffussm_cli.model import DiffuSSM
from diffussm_cli.training import parallel
from tests.conftest import fill
from tests.helpers import SETTINGS, run

pytest.importorskip("sklearn")
CPU = torch.device("cpu")
COMPILED = [*SETTINGS, "--set", "train.compile=true", "--set", "train.precision=fp32"]


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile needs a C++ compiler",
)
# the compiler's own, about complex numbers and deprecated parts of itself
@pytest.mark.filterwarnings("ignore")
def test_compiled_run_trains_as_an_eager_one(tmp_path):
    """Losses, gradient norms and, by the optimiser's first moments, the gradients of every
    parameter.
    """
    settings = [
        *COMPILED,
        "--set",
        "model.depth=1",
        "--set",
        "train.log_every=1",
        "--set",
        "train.sample_every=4",
    ]
    results = {}
    for name in ("compiled", "eager"):
        out = tmp_path / name
        more = [] if name == "compiled" else ["--set", "train.compile=false"]
        result = run("train", "--preset", "digits", "--out", out, *settings, *more)
        assert result.exit_code == 0, result.output
        assert ("compiling: the first step takes" in result.stderr) == (name == "compiled")
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        moments = runs.read_tensors(runs.list_checkpoints(out)[-1] / runs.OPTIMIZER)
        results[name] = records, {k: v for k, v in moments.items() if k.endswith("/exp_avg")}
        assert list((out / "samples").glob("*.png"))
        weights = runs.read_tensors(out / "final" / runs.MODEL)
        assert not any("_orig_mod" in key for key in weights)
    (records, moments), (expected, expected_moments) = results.values()
    for ours, theirs in zip(records, expected, strict=True):
        assert [ours[k] for k in ("step", "loss", "grad_norm")] == pytest.approx(
            [theirs[k] for k in ("step", "loss", "grad_norm")], rel=1e-3
        )
    for name, moment in moments.items():
        difference = (moment - expected_moments[name]).norm() / expected_moments[name].norm()
        assert difference < 1e-2, name


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore")  # FSDP2's, of views
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_models_of_several_processes_are_compiled_once(kind):
    """The blocks of a copy share a graph; held in parts, a block has breaks where FSDP2 gathers a
    unit.
    """
    torch._dynamo.reset()
    counters.clear()
    backend = CompileCounterWithBackend("eager")
    model = fill(DiffuSSM(4, 1, hidden_size=16, depth=2, d_state=4, num_classes=0)).to(CPU)
    eager = copy.deepcopy(model)
    model.compile_blocks(backend=backend)
    if kind == "fsdp":
        parallel.shard(model, World(0, 1), CPU, torch.float32)
    forward = parallel.replicate(model, CPU) if kind == "ddp" else model
    graphs = []
    for _ in range(2):
        for network in (eager, forward):
            network.zero_grad()
            network(torch.ones(3, 1, 4, 4), torch.tensor([1, 2, 3])).square().sum().backward()
        graphs.append(backend.frame_count)
        for ours, theirs in zip(model.parameters(), eager.parameters()):
            torch.testing.assert_close(
                parallel.full_tensor(ours.grad), theirs.grad, rtol=1e-3, atol=1e-4
            )
    assert graphs[0] == graphs[1]
    if kind == "ddp":
        assert graphs[0] == 1
        assert not counters["graph_break"]


@pytest.mark.parametrize(
    ("version", "split"), [("2.6.0+cu124", False), ("2.7.0", True), ("2.10.1", True)]
)
def test_graphs_are_not_split_for_ddp_where_torch_cannot(monkeypatch, version, split):
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    with torch._dynamo.config.patch(optimize_ddp=True):
        parallel.compile_model(DiffuSSM(4, 1, hidden_size=16, depth=1, d_state=4))
        assert torch._dynamo.config.optimize_ddp == split
