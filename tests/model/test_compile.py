"""torch.compile of the whole model or of its blocks: each graph is made once, with eager values and
gradients.
"""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from diffussm_cli.model import DiffuSSM, DiT
from tests.conftest import device, fill

SIZES = {"input_size": 4, "in_channels": 2, "hidden_size": 16, "depth": 2, "num_classes": 3}
MODELS = {
    "diffussm": lambda: DiffuSSM(d_state=4, **SIZES),
    "dit": lambda: DiT(heads=2, **SIZES),
}
# every mixer and every order of positions, with the convolution
MIXED = lambda: DiffuSSM(  # noqa: E731
    mixer="s4d,axial,linear,conv,attention",
    scan="four",
    local=3,
    heads=2,
    d_state=4,
    **SIZES | {"depth": 5},
)
CURES = {"qk_norm": True, "rope": True, "local": 3, "stem": 3}
CHECKPOINTED = lambda: DiffuSSM(d_state=4, gradient_checkpointing=True, **SIZES)  # noqa: E731


def inputs(B):
    generator = torch.Generator().manual_seed(B)
    x = torch.randn(B, 2, 4, 4, generator=generator)
    t, y = (torch.randint(high, (B,), generator=generator) for high in (1000, 3))
    return x.to(device()), t.to(device()), y.to(device())


def train_step(model, B):
    """A step of plain gradient descent; the output and the gradients."""
    output = model.train()(*inputs(B))
    output.square().mean().backward()
    gradients = [p.grad for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(0.1 * p.grad)
            p.grad = None
    return output.detach(), gradients


@torch.no_grad()
def evaluate(model, B):
    return model.eval()(*inputs(B)), []


def assert_equal(compiled, eager):
    (ours, our_gradients), (theirs, their_gradients) = compiled, eager
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for a, b in zip(our_gradients, their_gradients):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


# What is called in turn with which batch size, and how many graphs have been compiled afterwards.
COURSE = [
    (train_step, 4, 1),
    (train_step, 4, 1),  # the parameters have changed
    (evaluate, 4, 2),  # without gradients it is another program
    (train_step, 4, 2),
    (evaluate, 4, 2),
    (train_step, 6, 3),  # one for all batch sizes
    (train_step, 7, 3),
    (train_step, 4, 3),
]


@pytest.mark.filterwarnings("ignore")  # the compiler's own, where a graph breaks
@pytest.mark.parametrize(
    ("make", "course"),
    [
        (MODELS["diffussm"], COURSE),
        (MODELS["dit"], COURSE),
        (CHECKPOINTED, COURSE[:2]),
        (MIXED, COURSE[:3]),
    ],
    ids=["diffussm", "dit", "checkpointed", "mixed"],
)
def test_compiled_model_has_one_graph_for_all_layers_and_steps(make, course):
    """No graph break; nothing is compiled again but for gradients or none, and once for another
    batch size.
    """
    torch._dynamo.reset()
    counters.clear()
    eager = fill(make())
    compiled, backend = copy.deepcopy(eager), CompileCounterWithBackend("eager")
    compiled.compile(backend=backend)
    for call, B, graphs in course:
        assert_equal(call(compiled, B), call(eager, B))
        assert not counters["graph_break"]
        assert backend.frame_count == graphs, (call.__name__, B)


KINDS = {  # models of four blocks, and how many kinds of blocks they have
    "diffussm": (lambda: DiffuSSM(d_state=4, **SIZES | {"depth": 4}), 1),
    "dit": (lambda: DiT(heads=2, **SIZES | {"depth": 4}), 1),
    "checkpointed": (
        lambda: DiffuSSM(d_state=4, gradient_checkpointing=True, **SIZES | {"depth": 4}),
        1,
    ),
    "dit with cures": (lambda: DiT(heads=2, **CURES, **SIZES | {"depth": 4}), 1),
    "two mixers, skips": (
        lambda: DiffuSSM(mixer="s4d,conv", skips=True, d_state=4, **SIZES | {"depth": 4}),
        2,
    ),
}


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(("make", "kinds"), KINDS.values(), ids=KINDS)
def test_blocks_of_one_kind_share_their_graph(make, kinds):
    """As many graphs as kinds of blocks, however many blocks there are; none is left to eager
    execution.
    """
    torch._dynamo.reset()
    counters.clear()
    eager = fill(make())
    compiled, backend = copy.deepcopy(eager), CompileCounterWithBackend("eager")
    # a model may have more kinds than dynamo allows by itself
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled.compile_blocks(backend=backend)
        for call, graphs in ((train_step, kinds), (train_step, kinds), (evaluate, 2 * kinds)):
            assert_equal(call(compiled, 4), call(eager, 4))
            assert not counters["graph_break"]
            assert backend.frame_count == graphs
