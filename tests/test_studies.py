"""The harness of benchmarks/studies: equal budgets, a search that cannot end at its edge, and
intervals by hand.
"""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from diffussm_cli.config import load_config, to_dict
from diffussm_cli.data import builtin
from diffussm_cli.model import Backbone, build_model, dit
from diffussm_cli.model.embeddings import patchify
from diffussm_cli.model.mixers import MIXERS
from diffussm_cli.training.batches import Batch
from diffussm_cli.training.step import Step

STUDIES = Path(__file__).parents[1] / "benchmarks" / "studies"
sys.path.insert(0, str(STUDIES))
import changes  # noqa: E402
import measures  # noqa: E402
import report  # noqa: E402
import run as runner  # noqa: E402
import study as studies  # noqa: E402
from changes import CHANGES  # noqa: E402

VALUES = {
    "name": "s",
    "question": "q",
    "rule": "r",
    "seeds": (3, 4),
    "base": {"preset": "digits"},
}


def make(**more):
    return studies.Study(**(VALUES | {"runs": {"a": {}, "b": {"model.depth": 6}}} | more))


def test_runs_get_the_same_gflops_to_half_a_step():
    jobs = make(gflops=5.0).jobs({})
    assert [(j.run, j.seed) for j in jobs] == [("a", 3), ("b", 3), ("a", 4), ("b", 4)]
    assert [j.name for j in jobs[:2]] == ["a-s3", "b-s3"]
    for job in jobs:
        config = job.config()
        assert config.train.seed == job.seed
        assert (
            abs(studies.step_gflops(config) * config.train.steps - 5.0)
            <= studies.step_gflops(config) / 2
        )


def test_runs_get_the_same_seconds_by_their_measured_steps():
    jobs = make(seconds=30.0, step_seconds={"a": 0.1, "b": 0.3}).jobs({})
    assert [job.config().train.steps for job in jobs] == [300, 100, 300, 100]
    with pytest.raises(
        SystemExit, match="s: a step of a has not been timed yet; run it without --plan"
    ):
        make(seconds=30.0).jobs({})


def test_step_counts_a_forward_and_a_twice_as_long_backward_pass_and_the_kernels():
    from diffussm_cli.profiling.flops import cost

    config = load_config("digits")
    c = cost(config)
    assert studies.step_gflops(config) == pytest.approx(
        3 * (c.gflops * config.train.batch_size + c.kernel_gflops)
    )


def test_search_takes_a_third_and_its_best_value_for_each_run():
    study = make(images=9600, search={"train.lr": [0.1, 0.2, 0.3]})
    trials = study.trials()
    assert [t.name for t in trials] == ["a-0.1", "a-0.2", "a-0.3", "b-0.1", "b-0.2", "b-0.3"]
    steps = 9600 / load_config("digits").train.batch_size
    assert trials[0].config().train.steps == round(steps / 3)
    held_out = {"a-0.1": 3.0, "a-0.2": 1.0, "a-0.3": 2.0, "b-0.1": 3.0, "b-0.2": 2.5, "b-0.3": 2.6}
    chosen = studies.choose(study, held_out)
    assert chosen == {"a": {"train.lr": 0.2}, "b": {"train.lr": 0.2}}
    assert study.jobs(chosen)[0].config().train.lr == 0.2
    with pytest.raises(
        SystemExit, match=r"b is best at the edge of its grid, train.lr=0.3; widen it"
    ):
        studies.choose(study, held_out | {"b-0.3": 1.0})


def test_search_has_its_own_seed_and_share_and_skips_runs_with_a_value():
    runs = {"a": {}, "b": {"train.lr": 0.5}}
    study = make(
        images=9600,
        runs=runs,
        search={"train.lr": [0.1, 0.2, 0.3]},
        search_seed=9,
        search_share=1.0,
    )
    trials = study.trials()
    assert [t.name for t in trials] == ["a-0.1", "a-0.2", "a-0.3"]
    assert {t.seed for t in trials} == {9}
    assert trials[0].config().train.steps == study.jobs({})[0].config().train.steps
    chosen = studies.choose(study, {"a-0.1": 2.0, "a-0.2": 1.0, "a-0.3": 2.0})
    assert [job.config().train.lr for job in study.jobs(chosen)[:2]] == [0.2, 0.5]


def test_warm_up_is_share_of_every_run_that_does_not_set_it():
    runs = {"a": {}, "b": {"train.batch_size": 32}, "c": {"train.warmup_steps": 7}}
    a, b, c = make(images=6400, runs=runs, warmup=0.1).jobs({})[:3]
    assert a.config().train.warmup_steps == a.config().train.steps // 10 > 0
    assert b.config().train.warmup_steps == b.config().train.steps // 10
    assert c.config().train.warmup_steps == 7


def test_curve_uses_some_held_out_images_and_last_loss_all():
    job = make(images=640, curve_images=8).jobs({})[0]
    assert job.config().eval.held_out_images == 8
    assert job.held_out_images == load_config("digits").eval.held_out_images
    assert make(images=640).jobs({})[0].held_out_images is None


def test_every_training_seed_may_have_its_own_samples():
    assert [make(images=64, samples=50).sampling_seed(seed) for seed in (3, 4)] == [0, 0]
    study = make(images=64, samples=50, own_samples=True)
    assert [study.sampling_seed(seed) for seed in (3, 4)] == [150, 200]


def test_repeat_takes_stored_configuration_or_rejects_another():
    job = make(images=640).jobs({})[0]
    config = job.config()
    old = {
        "run": "a",
        "seed": 3,
        "preset": "digits",
        "overrides": list(job.overrides),
        "commit": "abc1234",
    }
    old["config"] = studies.config_hash(config)
    assert studies.stored_config(old) == config
    with pytest.raises(
        SystemExit, match=f"is configuration {old['config']} today, and 0123 was trained.* abc1234"
    ):
        studies.stored_config(old | {"config": "0123"})
    new = json.loads(json.dumps({"configuration": to_dict(config), "preset": "gone"}))
    assert studies.stored_config(new) == config


def test_hash_distinguishes_changes_of_network():
    config = load_config("digits")
    hashes = {studies.config_hash(config, change) for change in (None, "no-gate", "s4d-inv")}
    assert len(hashes) == 3
    assert studies.config_hash(config) in hashes


def test_p_values_are_corrected_as_in_example_of_holm():
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    assert report.holm(p) == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})


@pytest.mark.parametrize(
    ("differences", "p", "expected"),
    [
        ([0.001, 0.0011, 0.0009], 0.001, "equal"),  # told apart, but by less than the margin
        ([-0.01, -0.011, -0.009], 0.001, "better"),
        ([0.01, 0.011, 0.009], 0.001, "worse"),
        ([-0.01, -0.011, -0.009], 0.06, "unknown"),  # by the corrected p
        ([-0.001, 0.004, 0.001], 0.5, "unknown"),  # its interval leaves the margin
    ],
)
def test_verdict_is_better_worse_equal_or_unknown(differences, p, expected):
    assert report.verdict(differences, p, margin=0.002) == expected


def test_verdicts_wait_for_every_seed_of_every_run():
    runs = {"a": {}, "b": {}, "c": {}}
    study = make(images=64, seeds=(0, 1), runs=runs, margin=0.002)
    losses = {"a": (0.2, 0.21), "b": (0.25, 0.261), "c": (0.2, 0.2101)}
    results = [
        {"run": run, "seed": seed, "held_out": of[seed]}
        for run, of in losses.items()
        for seed in (0, 1)
    ]
    rows = report.verdict_table(study, results, "a")[3:]
    assert [row.split(" | ")[-1] for row in rows] == ["worse |", "equal |"]
    assert report.verdict_table(study, results[:-1], "a") == []


def test_stopped_run_is_a_comparison_without_a_verdict():
    losses = {"a": (0.2, 0.21), "b": (0.25, 0.261), "c": (0.2,)}
    results = [
        {"run": run, "seed": seed, "held_out": loss}
        for run, of in losses.items()
        for seed, loss in enumerate(of)
    ]
    runs = {"a": {}, "b": {}, "c": {}}
    study = make(images=64, seeds=(0, 1), runs=runs, margin=0.002, stopped=("c",))
    b, c = (row.split(" | ")[2:] for row in report.verdict_table(study, results, "a")[3:])
    assert float(b[1]) == pytest.approx(2 * float(b[0]), rel=0.1)
    assert b[2] == "worse |"
    assert c == ["", "", "stopped after 1 of 2 seeds |"]


def test_seconds_to_a_loss_are_interpolated():
    curve = [10.0, 20.0, 30.0], [0.5, 0.3, 0.1]
    assert report.seconds_to(0.25, *curve) == pytest.approx(22.5)
    assert report.seconds_to(0.6, *curve) == 10.0
    assert report.seconds_to(0.05, *curve) is None


def test_log_of_result_is_short_and_holds_the_means():
    records = [
        {"step": i, "loss": float(i), "grad_norm": None, "images_per_second": 2.0}
        for i in range(1, 401)
    ]
    log = runner.short_log(records)
    assert len(log["step"]) == runner.LOGGED
    assert (log["step"][0], log["step"][-1]) == (4, 400)
    assert (log["loss"][0], log["grad_norm"][0]) == (2.5, None)


def test_hash_distinguishes_configurations_but_not_seeds():
    a, _, b, _ = make(images=64).jobs({})
    assert (a.run, b.run, a.seed, b.seed) == ("a", "a", 3, 4)
    assert studies.config_hash(a.config()) == studies.config_hash(b.config())
    assert studies.config_hash(a.config()) != studies.config_hash(
        make(images=128).jobs({})[0].config()
    )


def test_intervals_and_paired_differences_equal_hand_computation():
    # t(2) at 0.975
    assert report.half_width([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert report.half_width([1.0]) == math.inf
    results = [
        {"run": r, "seed": s, "fid": v}
        for r, s, v in [("a", 0, 1.0), ("a", 1, 5.0), ("b", 1, 7.0), ("b", 2, 9.0)]
    ]
    assert report.paired(results, "b", "a", "fid") == [2.0]


def store(root, study, run, steps=2, gflops=6.0, curve=((2, 16, 5.0),)):
    """A result as run.py leaves it, as far as reading needs it."""
    (root / study).mkdir(exist_ok=True)
    values = {
        "run": run,
        "seed": 0,
        "searched": None,
        "steps": steps,
        "gflops": gflops,
        "curve": curve,
    }
    (root / study / f"{run}-s0.json").write_text(json.dumps(values), encoding="utf-8")


def test_losses_at_a_common_budget_are_read_from_the_curves(tmp_path, monkeypatch):
    study = make(images=64, base=VALUES["base"] | {"train.lr_decay": "constant"})
    store(tmp_path, "s", "a", 10, 20.0, [(5, 40, 4.0), (10, 80, 2.0)])
    store(tmp_path, "s", "b", 4, 12.0, [(4, 32, 3.0)])
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    a, b = report.load_results(study)
    # 12 Gflops are 6 steps of a
    assert (a["at_gflops"], b["at_gflops"]) == (pytest.approx(4.0 - 2.0 * 2 / 10), 3.0)
    # the curve of a begins after 40 images
    assert ("at_images" in a, b["at_images"]) == (False, 3.0)
    assert "at_images" not in report.load_results(make(images=64))[0]


def test_report_shows_compared_study_first(tmp_path, monkeypatch):
    for study, run in [("s", "b"), ("s", "a"), ("later", "c")]:
        store(tmp_path, study, run)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    later = make(name="later", runs={"c": {}}, images=64, beside=make(images=64))
    assert report.names(later) == ["a", "b", "c"]
    assert [r["run"] for r in report.load_results(later)] == ["a", "b", "c"]


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_study_names_existing_runs(path):
    study = studies.load_study(path.stem)
    assert study.rule
    if study.seconds:
        study.step_seconds.update({run: 0.1 for run in study.runs if run not in study.step_seconds})
    for job in [*study.trials(), *study.jobs({})]:
        assert job.config().train.steps > 0


@pytest.mark.slow
def test_study_is_reproduced_with_the_same_held_out_loss(tmp_path, monkeypatch):
    small = {
        "preset": "mnist-noise",
        "model.hidden_size": 16,
        "model.depth": 1,
        "train.sample_every": 0,
    }
    study = make(
        base=small | {"sample.steps": 4, "eval.held_out_images": 32},
        images=64,
        samples=32,
        evaluations=2,
    )
    found = [
        runner.train_and_measure(study.jobs({})[0], study, tmp_path / str(i)) for i in range(2)
    ]
    assert found[0]["held_out"] == found[1]["held_out"]
    # of as many images
    assert found[0]["held_out"] == pytest.approx(found[0]["curve"][-1][2], abs=1e-6)
    each = found[0]["held_out_of_each"]
    assert len(each) == 32
    assert sum(each) / 32 == pytest.approx(found[0]["held_out"], rel=1e-3)
    assert found[0]["begun"] <= found[1]["begun"]
    assert len(runner.as_text(found[0])) < 60_000
    assert json.loads(runner.as_text(found[0])) == json.loads(json.dumps(found[0]))
    assert [step for step, *_ in found[0]["curve"]][-1] == found[0]["steps"]
    (tmp_path / "a-s3.json").write_text(json.dumps(found[0]), encoding="utf-8")
    assert runner.repeat(tmp_path / "a-s3.json") == (found[0]["held_out"],) * 2
    metrics, again = (
        json.loads(json.dumps(found[0]))[name] for name in ("metrics", "metrics_again")
    )
    assert metrics == found[1]["metrics"] | {k: metrics[k] for k in ("sampling_images_per_second",)}
    assert metrics["fid"] != again["fid"] > 0
    assert 0 <= metrics["asked"] <= 1
    real = measures.floor(study.jobs({})[0].config(), 32, tmp_path)
    # the extractor knows 98.4% of held-out digits, and was trained on these
    assert real["asked"] > 0.9
    assert real["nearness"] < 1e-3  # they are themselves in the training set
    lines = report.page(study, [r | r["metrics"] for r in found[:1]], "a", real)
    assert "| mean ± 95% | a, 1 seed | a, seed 3, other samples | training images |" in lines
    assert f"| FID | {metrics['fid']:.4g} | {again['fid']:.4g} | {real['fid']:.4g} |" in lines
    monkeypatch.setattr(runner, "TURNS", 1)
    earlier = make(
        base=small, runs={"deep": {"model.depth": 4}}, seconds=1, step_seconds={"deep": 7.0}
    )
    later = make(
        name="later", base=small, seconds=1, runs={"a": {}}, beside=earlier, timed_by="deep"
    )
    rates = runner.measure_rates(later, tmp_path, steps=20)
    assert rates["turns"].keys() == {"a", "deep"}
    assert rates["step_seconds"] == {
        "a": pytest.approx(7 * rates["measured"]["a"] / rates["measured"]["deep"])
    }


def digits():
    """The training images and the held-out images with their labels, as two sets."""
    parts = (builtin.load("digits", None, held_out=held_out) for held_out in (False, True))
    return [
        {(image.numpy().tobytes(), int(y)) for image, y in zip(part.images, part.labels)}
        for part in parts
    ]


@pytest.fixture
def unchanged(monkeypatch):
    """Gives back what a change replaces."""
    import diffussm_cli.model.diffussm as network

    monkeypatch.setattr(network, "DiffuSSMBlock", network.DiffuSSMBlock)
    monkeypatch.setattr(Backbone, "__init__", Backbone.__init__)
    monkeypatch.setattr(Backbone, "reset_parameters", Backbone.reset_parameters)
    monkeypatch.setattr(Backbone, "positions", Backbone.positions)
    monkeypatch.setattr(dit, "Attention", dit.Attention)
    monkeypatch.setattr(builtin, "load", builtin.load)
    monkeypatch.setattr(Step, "losses", Step.losses)
    monkeypatch.setitem(MIXERS, "s4d", MIXERS["s4d"])


OF_DIT = ("qk-norm", "rope", "local-attention", "local-rope", "stem", "mimetic", "modern")


OF_LOSS = ("dispersive",)


def test_dispersive_adds_mean_over_pairs_in_training_alone(unchanged):
    step = Step(load_config("digits", ["train.batch_size=4"]), torch.device("cpu"))
    torch.manual_seed(0)
    x_0, noise = torch.randn(2, 4, 1, 8, 8)
    batch = Batch(x_0, torch.tensor([1, 200, 500, 900]), noise, torch.arange(4))
    states = []
    hook = step.model.blocks[0].register_forward_hook(lambda _, __, out: states.append(out))
    before = step.losses(batch)
    hook.remove()

    CHANGES["dispersive"]()
    after = step.losses(batch)
    z = states[0].flatten(1)
    pairs = [math.exp(-2 * (a - b).square().mean().item()) for a in z for b in z]
    repulsion = 0.5 * math.log(sum(pairs) / 16)
    assert repulsion < -0.01
    torch.testing.assert_close(after["loss"], before["loss"] + repulsion)
    torch.testing.assert_close(after["mse"], before["mse"])
    torch.testing.assert_close(step.losses(batch, step.model)["loss"], before["loss"])


@pytest.mark.parametrize("change", [n for n in CHANGES if n not in (*OF_DIT, *OF_LOSS)])
def test_change_does_what_it_says_and_no_more(change, unchanged):
    config = load_config("digits")
    before, (images, held_out) = build_model(config), digits()
    CHANGES[change]()
    after, (fewer, same) = build_model(config), digits()
    mixer, N = after.blocks[0].mixer, config.model.d_state
    u = torch.randn(1, config.model.hidden_size, 6, 1)
    # what the future changes
    later = mixer(u)[:, :, :3] - mixer(torch.cat([u[:, :, :3], -u[:, :, 3:]], 2))[:, :, :3]
    poles = mixer.A_imag[0, 0, :2].tolist()
    found = {
        "one-direction": later.abs().max().item() < 1e-5,
        "s4d-inv": poles == pytest.approx([N / math.pi * (N - 1), N / math.pi * (N / 3 - 1)]),
        "long-steps": 1e-2 <= mixer.log_dt.exp().min() < mixer.log_dt.exp().max() <= 1,
        "short-steps": 1e-4 <= mixer.log_dt.exp().min() < mixer.log_dt.exp().max() <= 1e-2,
        "no-gate": not hasattr(after.blocks[0], "W1"),
        "no-positions": after.position.abs().max().item() == 0,
        "500-images": len(fewer) == 500,
        "1500-images": len(fewer) == 1500,
    }
    assert [name for name, holds in found.items() if holds] == [change]
    assert poles == pytest.approx([0, math.pi]) or change == "s4d-inv"
    removed = {name for name, _ in before.named_parameters()} - {
        name for name, _ in after.named_parameters()
    }
    assert {name.split(".")[2] for name in removed} == ({"W1"} if change == "no-gate" else set())
    assert (
        after(torch.randn(2, 1, 8, 8), torch.tensor([0, 9]), torch.tensor([1, 2])).isfinite().all()
    )
    assert fewer <= images
    assert same == held_out


@torch.no_grad()
def small_dit(*more):
    """An 8 x 8 DiT with 16 tokens, 12 channels and 2 heads; nothing in it is zero."""
    overrides = [
        "model.backbone=dit",
        "model.hidden_size=12",
        "model.heads=2",
        "model.compression=1",
        *more,
    ]
    torch.manual_seed(0)
    return build_model(load_config("digits", [*overrides, "model.patch_size=2", "model.depth=2"]))


def neighbours_matter(model):
    """Whether the first token changes with a pixel of the second one's patch."""
    x, other = torch.zeros(2, 1, 1, 8, 8)
    other[0, 0, 0, 2] = 1
    stem = model.stem or (lambda image: image)
    tokens = [model.patch_in(patchify(stem(image), 2, 1))[0, 0] for image in (x, other)]
    return not torch.equal(*tokens)


@torch.no_grad()
def scale_matters(model):
    """Whether attention changes with the length of its queries."""
    layer, x = model.blocks[0].attention, torch.randn(1, 16, 12)
    before = layer(x, (4, 4))
    layer.qkv.weight[:12] *= 10
    return not torch.allclose(before, layer(x, (4, 4)), atol=1e-5)


@torch.no_grad()
def order_matters(model):
    """Whether attention without positions changes what it gives a token when the tokens move."""
    layer, x = model.blocks[0].attention, torch.randn(1, 16, 12)
    before, after = layer(x, (4, 4)).roll(1, 1), layer(x.roll(1, 1), (4, 4))
    return not torch.allclose(before, after, atol=1e-5)


@torch.no_grad()
def likes_itself(model):
    """Whether the scores of tokens with themselves are clearly positive before training."""
    weight = model.blocks[0].attention.qkv.weight
    q, k = weight[:12].view(2, 6, 12), weight[12:24].view(2, 6, 12)
    return ((q * k).sum((1, 2)) > 2).all().item()  # the traces


@pytest.mark.parametrize("change", [None, *OF_DIT])
def test_change_of_dit_does_what_it_says_and_no_more(change, unchanged):
    if change:
        CHANGES[change]()
    model = small_dit()
    present = {
        "stem": neighbours_matter(model),
        "qk-norm": not scale_matters(small_dit()),
        "rope": order_matters(model),
        "mimetic": likes_itself(model),
        "local-attention": hasattr(model.blocks[0].attention, "near"),
    }
    expected = {
        None: set(),
        "modern": {"stem", "qk-norm", "rope"},
        "local-rope": {"local-attention", "qk-norm", "rope"},
    }.get(change, {change})
    assert {name for name, holds in present.items() if holds} == expected

    # every parameter gets a gradient, and an averaged copy loads as a run does
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    image, t, y = torch.randn(2, 1, 8, 8), torch.tensor([0, 9]), torch.tensor([1, 2])
    output = model(image, t, y)
    output.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    with torch.device("meta"):
        again = small_dit()
    again.materialize("cpu")
    again.load_state_dict(model.state_dict())
    assert torch.allclose(again(image, t, y), output)


def test_local_convolution_of_attention_begins_as_the_identity():
    plain, layer = dit.Attention(12, 1, 2), changes.LocalAttention(12, 1, 2)
    x = torch.randn(3, 16, 12)
    torch.nn.init.normal_(plain.proj.weight)
    torch.nn.init.normal_(plain.proj.bias)
    layer.load_state_dict(plain.state_dict(), strict=False)
    assert torch.allclose(layer(x, (4, 4)), plain(x), atol=1e-5)


@torch.no_grad()
def test_local_attention_of_studies_is_local_option_of_dit(unchanged):
    model = small_dit("model.local=3")
    CHANGES["local-attention"]()
    changed = small_dit()
    for p in changed.parameters():
        torch.nn.init.normal_(p, std=0.3)
    weights = {
        name.replace(".attention.near.", ".local."): p for name, p in changed.state_dict().items()
    }
    model.load_state_dict(weights)
    image, t, y = torch.randn(2, 1, 8, 8), torch.tensor([0, 9]), torch.tensor([1, 2])
    torch.testing.assert_close(model(image, t, y), changed(image, t, y))


def test_mimetic_weights_without_noise_project_on_subspace(unchanged):
    changes.mimetic(a=0.0, b=0.5)
    weight = small_dit().blocks[1].attention.qkv.weight.detach()
    for q, k in zip(weight[:12].split(6), weight[12:24].split(6)):
        product = 2 * q.mT @ k  # of rank d = 6
        assert torch.allclose(product @ product, product, atol=1e-6)
        assert product.trace().item() == pytest.approx(6, abs=1e-5)
