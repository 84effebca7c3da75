"""The predicted time of a step on a GPU, against numbers worked out by hand."""

import dataclasses

import pytest
import torch

from diffussm_cli.config import load_config
from diffussm_cli.machine.gpus import GPU, GPUS
from diffussm_cli.model import build_model, count_parameters
from diffussm_cli.model.s4d import S4D
from diffussm_cli.profiling import roofline
from diffussm_cli.profiling.flops import cost, training_operations
from diffussm_cli.profiling.plan import Noise
from diffussm_cli.profiling.roofline import Autocast, Tally, Work, predict
from diffussm_cli.training.batches import make_batch
from diffussm_cli.training.step import Step

# A GPU on which everything reaches 1e12 a second, and where the shortest kernel takes 2.2 us.
ROUND = GPU("round", "round", 1e11, 1e12, 1e12, 1e11)
BF16 = torch.bfloat16


@pytest.fixture
def full_reach(monkeypatch):
    for name in ("PRODUCTS", "COPIES", "STRIDED", "TRANSFORMS"):
        monkeypatch.setattr(roofline, f"{name}_REACH", 1.0)


def on_meta(config):
    with torch.device("meta"):
        return build_model(config)


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def work(call):
    """The work of the one operator that a call makes."""
    with Tally() as tally:
        call()
    ((_, found),) = tally.done
    return found


CASES = {
    # 2 m n k operations, and each factor and the result once
    "product": (lambda: meta(100, 200, dtype=BF16) @ meta(200, 300, dtype=BF16), 1, 220_000, 12e6),
    "product in float32": (lambda: meta(100, 200) @ meta(200, 300), 1, 440_000, 12e6),
    # a bias of a row is fused; a bias of a column is copied into the result, and read again
    "row bias": (lambda: torch.addmm(meta(30), meta(10, 20), meta(20, 30)), 1, 4520, 12e3),
    "column bias": (
        lambda: torch.addmm(meta(10)[:, None], meta(10, 20), meta(20, 30)),
        2,
        4440 + 2 * 1200,
        12e3,
    ),
    "copy": (lambda: meta(1000) + 1, 1, 8000, 0),
    # numbers that are 32 bytes apart move 32 bytes each; the result is dense
    "column": (lambda: meta(1000, 8)[:, 0] + 1, 1, 32_000 + 4000, 0),
    "expanded": (lambda: meta(1000, 1).expand(1000, 5) + 1, 1, 4000 + 20_000, 0),
    "filled": (lambda: meta(1000).fill_(1), 1, 4000, 0),
    # 16 real numbers to 9 complex ones, and back with a clone of the input
    "transform": (lambda: torch.ops.aten._fft_r2c(meta(10, 16), [1], 0, True), 1, 640 + 720, 0),
    "inverse": (
        lambda: torch.ops.aten._fft_c2r(meta(10, 9, dtype=torch.complex64), [1], 0, 16),
        2,
        720 + 640 + 2 * 720,
        0,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_work_of_an_operator(name):
    call, kernels, moved, operations = CASES[name]
    found = work(call)
    assert (found.kernels, found.moved, found.operations) == (kernels, moved, operations)


def test_views_and_new_memory_are_no_work():
    with Tally() as tally:
        meta(4, 6).view(24)[3:].expand(2, 21).mT.detach()
    assert tally.done == []


@pytest.mark.parametrize(
    ("done", "seconds"),
    [
        (Work(1, 1e6, 5e9, "products"), 5e-3),  # operations
        (Work(1, 1e6, 5e9, "products in float32"), 5e-2),
        (Work(1, 3e9, 5e8, "products"), 3e-3),  # bytes
        (Work(1, 3e9, 0, "strided"), 3e-3),
        (Work(4, 100, 0), 8.8e-6),  # kernels
    ],
)
def test_the_longest_of_three_times_counts(full_reach, done, seconds):
    assert done.seconds(ROUND) == pytest.approx(seconds)


def test_only_a_share_of_the_data_sheet_is_reached():
    assert Work(1, 4.8e12 * 0.83).seconds(GPUS["h200"]) == pytest.approx(1)
    assert Work(1, 4.8e12 * 0.58, 0, "strided").seconds(GPUS["h200"]) == pytest.approx(1)
    assert Work(1, 1, 989e12 * 0.65, "products").seconds(GPUS["h100"]) == pytest.approx(1)


def test_attention_is_two_products_and_its_gradient_five():
    q = meta(2, 3, 50, 16).requires_grad_()
    with Tally() as tally:
        with Autocast():
            y = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        y.backward(torch.empty_like(y))
    once = 2 * 2 * 3 * 50 * 50 * 16
    found = [w.operations for _, w in tally.done if w.operations]
    assert found == [2 * once, 5 * once]


def test_a_step_of_dit_makes_three_times_the_products_of_a_forward_pass():
    config = load_config("dit-xl-256", ["model.depth=2", "train.batch_size=4"])
    part = roofline.part_of_step(on_meta(config), config)
    operations = sum(w.operations for name, w in part if "mm" in name)
    forward = cost(config).gflops - cost(config).parts["attention"]
    assert operations == pytest.approx(3 * 2e9 * 4 * forward, rel=0.01)


def test_state_spaces_stay_in_float32_under_autocast():
    layer, u = S4D(8, 4).to("meta"), meta(2, 8, 16, 2, dtype=BF16)
    with Tally() as tally, Autocast():
        layer(u)
        torch.nn.functional.linear(meta(2, 4), meta(4, 4))
    products = [name for name, w in tally.done if w.operations]
    assert products[-1] == "mm bfloat16"
    assert set(products[:-1]) == {"bmm float32"}


FLOW = ["diffusion.objective=flow", "model.learn_sigma=false", "sample.sampler=euler"]
ONE_STEP = [*FLOW, "diffusion.predicts=mean_velocity", "train.init=teacher"]
ONE_STEP += ["sample.steps=1", "sample.guidance=1"]


@pytest.mark.parametrize(
    ("overrides", "passes"),
    [
        (FLOW, 0),
        ([*ONE_STEP, "diffusion.teacher_guidance=1"], 2),  # the teacher and the model
        ([*ONE_STEP, "diffusion.teacher_guidance=2"], 3),  # the teacher twice
        ([*ONE_STEP, "diffusion.teacher_guidance=2", "model.num_classes=0"], 2),
    ],
    ids=lambda value: value if isinstance(value, int) else value[-1],
)
def test_passes_without_gradient_of_a_training_step_are_counted(overrides, passes):
    config = load_config("digits", ["model.depth=1", "train.batch_size=2", *overrides])
    step, called = Step(config, torch.device("cpu")), []
    for model in filter(None, (step.model, step.teacher)):
        model.register_forward_pre_hook(lambda *_: called.append(1))
    step.losses(make_batch(Noise(config), config, 0))
    assert len(called) == 1 + passes

    # A prediction makes as many, and of three units of operations each adds one.
    model = on_meta(config)
    model.register_forward_pre_hook(lambda *_: called.append(1))
    roofline.part_of_step(model, config)
    assert len(called) == 2 * (1 + passes)
    c = cost(config)
    assert training_operations(config) == pytest.approx(
        2e9 * (3 + passes) * (c.gflops + c.kernel_gflops / 2)
    )


def test_an_update_moves_eight_numbers_of_a_parameter_and_three_of_each_average():
    config = load_config("digits", ["train.ema=0.9,0.99"])
    model = on_meta(config)
    ((_, work),) = roofline.update(model, config)
    assert work.moved == 4 * count_parameters(model) * (8 + 3 * 2)
    assert work.kernels == 4


def test_muon_orthogonalises_by_fifteen_products_in_bfloat16():
    """Of an a x b matrix, a <= b, each of five iterations multiplies X X^T, S S and S X."""
    one_block = ["model.hidden_size=32", "model.depth=1"]
    model = on_meta(config := load_config("mnist", one_block))
    done = roofline.update(model, config)

    # two of shifts and scales, W0 and two of W_up; two of W_down, W1 and W3; W2
    shapes = [(32, 32, 5), (32, 64, 4), (64, 64, 1)]
    operations = sum(n * 5 * 2 * (2 * a * a * b + a**3) for a, b, n in shapes)
    products = [work for _, work in done if work.operations]
    assert {work.kind for work in products} == {"products"}
    assert sum(work.operations for work in products) == operations

    # AdamW moves seven numbers of each of the others.
    adamw = roofline.update(model, load_config("mnist", [*one_block, "train.optimizer=adamw"]))
    matrices = sum(a * b * n for a, b, n in shapes)
    assert done[0][1].moved == adamw[0][1].moved - 4 * 7 * matrices


def test_a_step_is_its_parts_and_an_update(full_reach, monkeypatch):
    monkeypatch.setitem(GPUS, "round", ROUND)
    part = [("mm", Work(1, 1.0, 2e12, "products")), ("add", Work(1, 3e12))]
    monkeypatch.setattr(roofline, "part_of_step", lambda model, config: part)
    monkeypatch.setattr(roofline, "update", lambda model, config: [("update", Work(1, 0.44e12))])
    recipe = ["train.batch_size=32", "train.accumulate=4", "train.steps=50"]
    found = predict(load_config("digits", recipe), "round")
    # 4 parts of 2 + 3 s; 44 bytes of each parameter
    assert found["step_seconds"] == pytest.approx(4 * 5 + 0.44, rel=1e-3)
    assert found["images_per_second"] == pytest.approx(32 / found["step_seconds"])
    assert found["seconds"] == pytest.approx(50 * found["step_seconds"])
    assert list(found["costs"])[:2] == ["add", "mm"]


def test_a_small_step_takes_the_time_of_its_launches():
    config = load_config("digits", ["model.depth=1"])
    found = predict(config, "h200")
    assert found["step_seconds"] == pytest.approx(8e-6 * found["launches"])
    twice = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulate=2))
    assert predict(twice, "h200")["launches"] == pytest.approx(2 * found["launches"], rel=0.02)
