"""What somebody has set although nothing uses it is one line, with the reason."""

import warnings

import pytest
import torch

from diffussm_cli.config import (
    MIXER_FACTS,
    config_from_dict,
    load_config,
    preset_names,
    to_dict,
)
from diffussm_cli.config.unused import unused_fields, unused_of_request
from diffussm_cli.events import Warned
from diffussm_cli.model import DiffuSSM, DiT, build_model
from diffussm_cli.model.mixers import MIXERS
from diffussm_cli.training.session import train
from tests.conftest import device, fill, randn
from tests.helpers import SETTINGS, run

# Of the preset digits, a DiffuSSM of two blocks of s4d on grey pixels: fields, and the line.
UNUSED = {
    "fields of conv": (
        ["model.kernel=5", "model.conv_gate=grn"],
        "model.kernel=5 (no mixer is conv), model.conv_gate=grn (no mixer is conv)",
    ),
    "heads": (["model.heads=4"], "model.heads=4 (no mixer is linear or attention)"),
    "states": (
        ["model.mixer=attention", "model.d_state=16", "train.ssm_lr=0.1"],
        "model.d_state=16 (no mixer is s4d or axial), train.ssm_lr=0.1 (no mixer is s4d or axial)",
    ),
    "rate of AdamW beside Muon": (
        ["train.adamw_lr=1e-3"],
        "train.adamw_lr=0.001 (train.optimizer is adamw)",
    ),
    "mixers beyond the depth": (
        ["model.mixer=s4d,conv,axial"],
        "axial of model.mixer=s4d,conv,axial (model.depth is 2)",
    ),
    "fields of a mixer beyond the depth": (
        ["model.mixer=s4d,s4d,conv", "model.kernel=5"],
        "model.kernel=5 (no mixer is conv), conv of model.mixer=s4d,s4d,conv (model.depth is 2)",
    ),
    "RoPE of a mixer beyond the depth": (
        ["model.mixer=s4d,s4d,attention", "model.heads=4", "model.rope=true"],
        "model.heads=4 (no mixer is linear or attention), "
        "model.rope=true (no mixer is attention), "
        "attention of model.mixer=s4d,s4d,attention (model.depth is 2)",
    ),
    "scan": (
        ["model.mixer=axial", "model.scan=four"],
        "model.scan=four (no block whose mixer reads a sequence has another order than raster)",
    ),
    "scan of blocks in raster order": (
        ["model.mixer=s4d,conv", "model.scan=alternate"],
        "model.scan=alternate (no block whose mixer reads a sequence has another order than "
        "raster)",
    ),
    "skips": (
        ["model.depth=1", "model.skips=true"],
        "model.skips=true (one block has no mirror image)",
    ),
    "DiT": (
        ["model.backbone=dit", "model.mixer=conv", "model.conv_gate=grn"],
        "model.mixer=conv (a DiT has no mixers), model.conv_gate=grn (a DiT has no mixers)",
    ),
    "classes": (
        ["model.num_classes=0", "model.label_std=0.5", "train.label_dropout=0.2"],
        "model.label_std=0.5 (there are no classes), train.label_dropout=0.2 (there are neither "
        "classes nor text)",
    ),
    "one channel": (
        ["sample.guidance_channels=3"],
        "sample.guidance_channels=3 (images have 1 channel)",
    ),
    "interval": (
        ["sample.guidance_interval=2000,3000"],
        "sample.guidance_interval=2000,3000 (the last timestep is 1000)",
    ),
    "variances of a flow": (
        [
            "diffusion.objective=flow",
            "model.learn_sigma=false",
            "sample.sampler=heun",
            "diffusion.beta_end=0.03",
        ],
        "diffusion.beta_end=0.03 (a flow has no variances)",
    ),
    "guidance of a teacher without classes": (
        [
            "diffusion.objective=flow",
            "diffusion.predicts=mean_velocity",
            "diffusion.teacher_guidance=2",
            "model.learn_sigma=false",
            "model.num_classes=0",
            "train.init=teacher",
            "sample.sampler=euler",
            "sample.steps=1",
            "sample.guidance=1",
        ],
        "diffusion.teacher_guidance=2.0 (the model has neither classes nor text)",
    ),
    "timesteps": (
        ["diffusion.shift=2", "diffusion.logit_std=2"],
        "diffusion.logit_std=2.0 (diffusion.timesteps_drawn is uniform), "
        "diffusion.shift=2.0 (diffusion.timesteps_drawn is uniform)",
    ),
    "weight": (["train.min_snr_gamma=4"], "train.min_snr_gamma=4.0 (train.loss_weight is none)"),
    "processes": (["train.parallel=fsdp"], "train.parallel=fsdp (there is one process)"),
    "previews": (
        ["train.sample_every=0", "train.sample_images=4"],
        "train.sample_images=4 (train.sample_every is 0)",
    ),
    "evaluation": (["eval.images=100"], "eval.images=100 (eval.every is 0)"),
    "scores": (
        ["eval.every=10", "eval.steps=9", "data.path=faces", "data.held_out=0.1"],
        "eval.steps=9 (there is no eval.reference)",
    ),
    "held-out loss alone": (
        ["eval.every=10", "eval.images=0", "eval.steps=9"],
        "eval.steps=9 (eval.images is 0)",
    ),
    "held-out folder": (["data.held_out=faces"], "data.held_out=faces (eval.every is 0)"),
    "skips of built-in data": (
        ["data.skip_unreadable=true"],
        "data.skip_unreadable=true (built-in data can be read)",
    ),
    "columns": (
        ["data.path=shards", "data.columns=[text=title, image=photo]"],
        "data.columns text=title (data.text is null)",
    ),
}


@pytest.mark.parametrize("case", UNUSED)
def test_a_field_without_a_use_is_named_with_the_reason(case):
    fields, line = UNUSED[case]
    assert unused_fields(load_config("digits", fields)) == f"not used: {line}"


USED = [
    ["model.mixer=conv", "model.kernel=5"],
    ["model.mixer=s4d,linear", "model.heads=4", "model.scan=alternate"],
    ["model.skips=true", "model.local=3", "model.scan=four"],
    ["model.mixer=s4d,conv", "model.kernel=5"],
    ["model.backbone=dit", "model.heads=4", "model.local=3"],
    ["diffusion.timesteps_drawn=shifted", "diffusion.shift=2"],
    ["data.held_out=0.1"],
    ["data.held_out=faces", "data.path=all", "eval.every=5"],
    ["eval.every=5", "eval.images=100", "eval.steps=9"],
    ["sample.guidance_interval=100,900"],
    ["data.path=faces", "data.skip_unreadable=true", "data.columns=[image=photo, label=kind]"],
]


@pytest.mark.parametrize("fields", USED, ids=map(" ".join, USED))
def test_a_field_that_is_used_is_not_named(fields):
    assert unused_fields(load_config("digits", fields)) == ""


@pytest.mark.parametrize("name", preset_names())
def test_no_preset_has_fields_without_a_use(name):
    """Also as a configuration of another name, to which its values are no values of a preset."""
    config = load_config(name)
    assert unused_fields(config) == ""
    assert unused_fields(config_from_dict(to_dict(config), name, name="mine"), 2) == ""


def test_a_field_of_the_preset_was_not_given():
    """mnist-dit has 4 heads, of which a DiffuSSM of attention makes use and one of s4d does not."""
    config = load_config("mnist-dit", ["model.backbone=diffussm"])
    assert config.model.heads != 16
    assert unused_fields(config) == ""
    assert "model.heads=2" in unused_fields(load_config("mnist-dit", ["model.heads=2", *DIFFUSSM]))


DIFFUSSM = ["model.backbone=diffussm"]

# A network, its arguments, and the line of the warning.
ARGUMENTS = {
    "fields of conv": (
        DiffuSSM,
        {"kernel": 5, "conv_gate": "grn"},
        "DiffuSSM: not used: kernel=5 (no mixer is conv), conv_gate='grn' (no mixer is conv)",
    ),
    "heads": (
        DiffuSSM,
        {"heads": 4},
        "DiffuSSM: not used: heads=4 (no mixer is linear or attention)",
    ),
    "states": (
        DiffuSSM,
        {"mixer": "linear", "d_state": 4},
        "DiffuSSM: not used: d_state=4 (no mixer is s4d or axial)",
    ),
    "skips and classes": (
        DiT,
        {"depth": 1, "skips": True, "num_classes": 0, "label_std": 0.5},
        "DiT: not used: skips=True (one block has no mirror image), label_std=0.5 (there are no "
        "classes)",
    ),
    "used": (DiffuSSM, {"mixer": "s4d,conv,linear", "d_state": 4, "kernel": 5, "heads": 2}, ""),
    "defaults": (DiffuSSM, {"kernel": 3, "heads": 16, "d_state": 64, "skips": False}, ""),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_an_argument_without_a_use_is_a_warning_of_whoever_made_the_network(case):
    network, arguments, line = ARGUMENTS[case]
    with warnings.catch_warnings(record=True) as shown, torch.device("meta"):
        warnings.simplefilter("always")
        network(8, 1, 1, 16, **{"depth": 3} | arguments)
    assert [str(w.message) for w in shown] == [line] * bool(line)
    assert {w.filename for w in shown} <= {__file__}


def test_network_of_a_configuration_warns_of_nothing():
    """Its unused fields are told by the command or function that read the configuration."""
    config = load_config("digits", ["model.kernel=5", "model.mixer=linear", "model.d_state=4"])
    assert unused_fields(config)
    with warnings.catch_warnings(record=True) as shown, torch.device("meta"):
        warnings.simplefilter("always")
        build_model(config)
    assert not shown


@pytest.mark.parametrize("mixer", MIXERS)
def test_scan_changes_the_mixers_that_read_a_sequence_alone(mixer):
    sizes = {
        "input_size": 4,
        "in_channels": 1,
        "hidden_size": 16,
        "d_state": 4,
        "heads": 2,
        "num_classes": 0,
    }
    models = [DiffuSSM(**sizes, depth=2, mixer=mixer, scan=scan) for scan in ("raster", "four")]
    models[1].to(device()).load_state_dict(fill(models[0]).state_dict())
    x, t, y = randn(2, 1, 4, 4), torch.tensor([3, 700]).to(device()), None
    with torch.no_grad():
        a, b = (model.eval()(x, t, y) for model in models)
    assert torch.allclose(a, b, atol=1e-5) == (not MIXER_FACTS[mixer].reads_in_order)


# ----------------------------------------------------------------------------------------- requests
REQUESTS = {  # fields of `sample`, classes, prompts, the line
    "channels": (
        {"guidance_channels": "3"},
        (),
        (),
        "sample.guidance_channels=3 (guidance is 1)",
    ),
    "interval": (
        {"guidance_interval": (100, 900)},
        (),
        (),
        "sample.guidance_interval=100,900 (guidance is 1)",
    ),
    "channels of grey images": (
        {"guidance_channels": "3", "guidance": 2.0},
        (),
        (),
        "sample.guidance_channels=3 (images have 1 channel)",
    ),
    "classes": ({}, tuple(range(10)), (), "6 of 10 classes (num is 4)"),
    "prompts": ({}, (), ("a", "b", "c", "d", "e"), "1 of 5 prompts (num is 4)"),
    "nothing": ({"guidance": 2.0, "guidance_interval": (0, 900)}, (1, 2), ("a",), ""),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_a_part_of_a_request_without_a_use_is_named(case):
    fields, classes, prompts, line = REQUESTS[case]
    config = load_config("digits")
    sampling = config_from_dict(
        to_dict(config), "x", fields={f"sample.{k}": v for k, v in fields.items()}
    ).sample
    expected = f"not used: {line}" if line else ""
    assert unused_of_request(config, sampling, 4, classes, prompts) == expected


def test_commands_say_what_they_do_not_use(tiny, tmp_path):
    config = tiny("model.kernel=5", "train.steps=2")
    warned = [e.text for e in train(config, tmp_path / "run") if isinstance(e, Warned)]
    assert warned[0].startswith("not used: model.kernel=5 (no mixer is conv)")

    line = "warning: not used: model.kernel=5 (no mixer is conv)"
    plan = run("train", "--preset", "digits", "--set", "model.kernel=5", "--dry-run", *SETTINGS)
    assert line in plan.stderr, plan.output
    drawn = run("sample", tmp_path / "run", "-n", 2, "--classes", "0-9", "--steps", 2)
    assert "warning: not used: 8 of 10 classes (num is 2)" in drawn.stderr, drawn.output
