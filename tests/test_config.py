"""Presets, overrides and the lines that wrong ones get."""

import dataclasses
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from diffussm_cli.config import (
    SECTIONS,
    check_text,
    checks,
    config_from_dict,
    field_names,
    load_config,
    named_columns,
    parse_yaml,
    preset_names,
    preset_text,
    to_dict,
    to_yaml,
)
from diffussm_cli.errors import ConfigError
from diffussm_cli.model.sizes import SIZES
from diffussm_cli.profiling.flops import cost

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_is_a_document(name):
    config = load_config(name)
    header = preset_text(name).split("\n\n")[0].splitlines()
    commands = [line.removeprefix("#").split("  ")[-1].split() for line in header]
    assert config.preset == name
    assert all(line.startswith("#") for line in header)
    assert ["diffussm", "train", "--preset", name] in [words[:4] for words in commands]
    encoding = [words[3:] for words in commands if words[:2] == ["diffussm", "encode"]]
    expected = [config.data.path, "--resolution", str(config.data.resolution)]
    expected += (
        ["--text", config.data.text, "--text-tokens", str(config.model.text_tokens)]
        if config.data.text
        else []
    )
    assert encoding == ([expected] if config.data.vae else [])


@pytest.mark.parametrize("name", ["s-256", "xl-256", "xl-512", "dit-s-256", "dit-xl-256"])
def test_presets_of_the_papers_have_their_sizes(name):
    assert load_config(name).model == SIZES[name.rpartition("-")[0]]


@pytest.mark.parametrize("size", ["s", "b", "l", "xl"])
def test_axial_presets_have_the_parameters_of_dit_and_fewer_gflops(size):
    preset = load_config(f"axial-{size}-256")
    dit = cost(dataclasses.replace(load_config("dit-xl-256"), model=SIZES[f"dit-{size}"]))
    assert cost(preset).parameters == pytest.approx(dit.parameters, rel=0.03)
    assert cost(preset).gflops < 0.64 * dit.gflops
    said = (ROOT / "presets" / f"axial-{size}-256.yaml").read_text()
    assert f"{cost(preset).parameters:,} parameters" in said
    assert f"{cost(preset).gflops:.1f} Gflops" in said


def test_preset_inherits_what_it_does_not_change(tmp_path):
    """A chain of two files and a preset; the nearer one wins, field by field."""
    (tmp_path / "near.yaml").write_text("base: far.yaml\ntrain:\n  steps: 7\nmodel:\n")
    (tmp_path / "far.yaml").write_text(
        "base: digits\ntrain: {steps: 5, lr: 0.5}\nsample: {steps: 3}"
    )
    config = load_config(str(tmp_path / "near.yaml"))
    changes = ["train.steps=7", "train.lr=0.5", "sample.steps=3"]
    assert config == dataclasses.replace(load_config("digits", changes), preset="near")


def test_file_named_as_its_base_is_another_preset(tmp_path):
    (tmp_path / "digits.yaml").write_text("base: digits\ntrain:\n  steps: 7")
    assert load_config(str(tmp_path / "digits.yaml")) == load_config("digits", ["train.steps=7"])


def test_configuration_of_run_serves_as_a_base(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(load_config("digits", ["train.lr=0.5"])))
    (tmp_path / "mine.yaml").write_text("base: config.yaml\ntrain:\n  steps: 7")
    config = load_config(str(tmp_path / "mine.yaml"))
    assert (config.preset, config.train.lr, config.train.steps) == ("mine", 0.5, 7)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("digit", "base: there is no preset 'digit'; did you mean 'digits'?"),
        ("gone.yaml", "base: cannot read '.*gone.yaml'"),
        ("a.yaml", "base: .*a.yaml -> .*a.yaml goes in a circle"),
        ("sub/../b.yaml", "base: .*a.yaml -> .*b.yaml -> .*a.yaml goes in a circle"),
        ("[digits]", r"base: \['digits'\] must be the name of a preset or a YAML file"),
        ("broken.yaml", "preset .*broken.yaml: train: must be a mapping"),
    ],
)
def test_bad_base_is_one_line_error(tmp_path, base, message):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.yaml").write_text(f"base: {base}\ntrain:\n  steps: 7")
    (tmp_path / "b.yaml").write_text("base: sub/../a.yaml")
    (tmp_path / "broken.yaml").write_text("train: 7")
    with pytest.raises(ConfigError, match=message) as error:
        load_config(str(tmp_path / "a.yaml"))
    assert "\n" not in str(error.value)


def test_saved_configuration_may_not_name_a_base():
    """It may come from a stranger, and is complete."""
    with pytest.raises(ConfigError, match="unknown section 'base'"):
        config_from_dict({"base": "digits"}, "config.yaml")


def test_overrides_survive_the_round_trip_through_yaml():
    config = load_config(
        "digits",
        ["train.lr=1e-4", "data.resolution=8x12", "data.path=x", "sample.guidance_interval=1,9"],
    )
    assert config.train.lr == 1e-4  # YAML alone would read text
    assert config.data.size == (8, 12)
    assert config.sample.guidance_interval == (1, 9)
    assert config_from_dict(parse_yaml(to_yaml(config), "x"), "x") == config


def test_averages_are_parsed_as_one_number_or_several():
    """One is written as a number, as before there could be several."""
    for text, decays, written in [
        ("0.99", (0.99,), "  ema: 0.99\n"),
        ("0.9999,0.999", (0.9999, 0.999), "  ema:\n  - 0.9999\n  - 0.999\n"),
        ("[0.9, 1e-3]", (0.9, 0.001), "  ema:\n  - 0.9\n  - 0.001\n"),
    ]:
        config = load_config("digits", [f"train.ema={text}"])
        assert config.train.ema == decays
        assert written in to_yaml(config)
        assert config_from_dict(parse_yaml(to_yaml(config), "x"), "x") == config


def test_columns_are_parsed_by_role():
    config = load_config("digits", ["data.path=photos", "data.columns=image=photo,text=a=b"])
    assert named_columns(config.data.columns, "x") == {"image": "photo", "text": "a=b"}
    for text, problem in {
        "photo": "'photo' must read image=NAME, label=NAME, text=NAME",
        "image=": "must read",
    }.items():
        with pytest.raises(ConfigError, match=f"^data.columns: .*{problem}"):
            load_config("digits", ["data.path=photos", f"data.columns={text}"])
    with pytest.raises(
        ConfigError,
        match="^data.columns: 'image=photo' given, but builtin:digits is no folder of parq",
    ):
        load_config("digits", ["data.columns=image=photo"])


def test_held_out_is_share_or_folder():
    for text, value in {"0.05": 0.05, "5e-2": 0.05, "0": 0.0, "x/0.05": "x/0.05", "''": ""}.items():
        config = load_config("digits", [f"data.held_out={text}"])
        assert config.data.held_out == value
        assert type(config.data.held_out) is type(value)
        assert config_from_dict(parse_yaml(to_yaml(config), "x"), "x") == config


def test_every_field_has_help():
    """The reference in the documentation is made of it."""
    assert set(SECTIONS) == {"model", "data", "diffusion", "train", "sample", "eval"}
    helps = {
        f"{s}.{f.name}": f.metadata.get("help")
        for s, cls in SECTIONS.items()
        for f in dataclasses.fields(cls)
    }
    assert list(helps) == field_names()
    assert [name for name, text in helps.items() if not text] == []


def test_written_configuration_holds_every_section_and_field():
    written = to_dict(load_config("digits"))
    assert written.pop("preset") == "digits"
    assert [
        f"{section}.{name}" for section, fields in written.items() for name in fields
    ] == field_names()


TEXTS = {  # what --set is given, and what a field of text takes
    **{
        text: text
        for text in (
            "no",
            "2024-01-01",
            "0100",
            "1:30",
            "1.50",
            "1e3",
            "0x10",
            "1_000",
            "true",
            "Null",
            "~",
        )
    },
    **{
        text: text
        for text in (
            "a: b",
            "photos #2",
            "*all",
            "[a]",
            "'n Sync",
            "- a",
            "%x",
            "a, b",
            "@home",
            "null",
        )
    },
    "'no'": "no",
    '"a\\tb"': "a\tb",
    " x ": "x",
    "": "",
}


@pytest.mark.parametrize(("text", "expected"), TEXTS.items(), ids=repr)
def test_text_field_takes_its_text_verbatim(text, expected):
    config = load_config("digits", [f"data.path={text}"])
    assert config.data.path == expected
    assert config_from_dict(parse_yaml(to_yaml(config), "x"), "x") == config


PLAIN = (
    "no",
    "2024-01-01",
    "0100",
    "1:30",
    "1.50",
    "1e3",
    "1e-05",
    "1.0e-05",
    "0x10",
    "true",
    "photos",
)


@pytest.mark.parametrize("text", PLAIN)
def test_plain_text_in_file_is_text_and_a_number_is_decimal(text):
    values = parse_yaml(f"data: {{path: {text}, downsample: 1, resolution: 32}}", "x")
    assert config_from_dict(values, "x").data.path == text


def test_values_of_yaml_that_is_read_again_are_new():
    parse_yaml("a: {b: [1]}", "x")["a"]["b"].append(2)
    assert parse_yaml("a: {b: [1]}", "x") == {"a": {"b": [1]}}


NUMBERS_AS_TEXT = {  # the value that is given, the field, and what it is; None: refused
    ("train.steps", "0100"): 100,
    ("train.steps", "1e3"): 1000,
    ("train.steps", "1:30"): None,
    ("train.steps", "0x10"): None,
    ("train.steps", "!!int 0100"): 100,
    ("train.lr", "1e-4"): 1e-4,
    ("train.lr", "2024-01-01"): None,
    ("train.seed", "+4611686018427387903"): 4611686018427387903,  # no float holds it
    ("train.compile", "yes"): True,
    ("train.compile", "Off"): False,
    ("train.compile", "maybe"): None,
    ("data.vae", "null"): None,
    ("data.held_out", "0.10"): 0.1,
    ("data.held_out", "2024-01-01"): "2024-01-01",
    ("sample.guidance_interval", "007,9"): (7, 9),
    ("sample.guidance_interval", "null"): (),
}


@pytest.mark.parametrize(("field", "text"), NUMBERS_AS_TEXT)
def test_numbers_are_decimal_and_truth_has_its_usual_words(field, text):
    expected = NUMBERS_AS_TEXT[field, text]
    section, _, name = field.partition(".")
    if expected is None and field != "data.vae":
        with pytest.raises(ConfigError, match=f"^{field}: '{text}' must be"):
            load_config("digits", [f"{field}={text}"])
    else:
        config = load_config("digits", [f"{field}={text}"])
        assert getattr(getattr(config, section), name) == expected


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("a red, round heart", ("a red, round heart",)),
        ("what? no: yes", ("what? no: yes",)),
        ("[red heart, 'a red, round one', 1]", ("red heart", "a red, round one", "1")),
        ("", ()),
    ],
)
def test_comma_in_prompt_does_not_split_it(text, prompts):
    text_model = ["data.text=wordllama", "model.text_width=256"]
    config = load_config("mnist", [*text_model, f"sample.prompts={text}"])
    assert config.sample.prompts == prompts
    assert config_from_dict(parse_yaml(to_yaml(config), "x"), "x") == config


def test_retired_field_is_accepted_only_at_its_old_value():
    assert load_config("digits", ["train.processes=1"]) == load_config("digits")
    saved = to_dict(load_config("digits"))
    assert "processes" not in saved["train"]
    saved["train"]["processes"] = 1
    assert config_from_dict(saved, "x") == load_config("digits")
    for value in (0, 2):
        saved["train"]["processes"] = value
        with pytest.raises(
            ConfigError, match=f"^train.processes: {value} given, .* torchrun --nproc-per-node"
        ):
            config_from_dict(saved, "x")


@pytest.mark.parametrize("name", ["train.learning_rate", "train.foo", "epochs", "model.layers"])
def test_fields_that_are_far_from_a_name_are_not_suggested(name):
    with pytest.raises(ConfigError) as error:
        load_config("digits", [f"{name}=1"])
    quoted = name if "." in name else repr(name)
    assert str(error.value).endswith(f"unknown field {quoted}")


def test_the_fields_of_a_small_section_are_listed_if_none_is_near():
    with pytest.raises(
        ConfigError, match=r"unknown field eval.metric; valid: eval.every, (eval.*)+"
    ):
        load_config("digits", ["eval.metric=fid"])


WRONG = {
    "model.width=8": "did you mean 'model.text_width'?",
    "train.batch=8": "did you mean 'train.batch_size'?",
    "model.channels=3": "did you mean 'data.channels'?",
    "sample.seed=3": "did you mean 'train.seed'?",
    "model.patch=3": "did you mean 'model.patch_size'?",
    "model.lr=1": "unknown field model.lr; did you mean 'train.lr'?",
    "model.hiden_size=8": "did you mean 'model.hidden_size'?",
    "lr=1": "unknown field 'lr'; did you mean 'train.lr'?",
    "modle.depth=1": "did you mean 'model.depth'?",
    "train.lr": "must read section.field=value",
    "train.lr=fast": "train.lr: 'fast' must be a finite number",
    "train.lr=.nan": "train.lr: nan must be a finite number",
    "train.lr=0": "train.lr: 0.0 must be greater than 0",
    "train.steps=1.5": "train.steps: 1.5 must be a whole number",
    "train.steps=0": "train.steps: 0 must be at least 1",
    "train.compile=1": "train.compile: 1 must be true or false",
    "train.ema=1.5": "train.ema: 1.5 must be less than 1",
    "train.ema=1": "train.ema: 1.0 must be less than 1",
    "train.ema=0.9,1": "train.ema: 1.0 must be less than 1",
    "train.ema=0.9,fast": "train.ema: 'fast' must be a finite number",
    "train.ema=0.9,0.90": "train.ema: '0.9,0.9' must be one or more different numbers",
    "train.ema=[]": "train.ema: '' must be one or more different numbers",
    "data.held_out=1": "data.held_out: 1.0 must be less than 1",
    "data.held_out=builtin:mnist": (
        "data.held_out: 'builtin:mnist' must be a share or a folder of other images"
    ),
    "train.beta2=1": "train.beta2: 1.0 must be less than 1",
    "train.lr_decay=cosin": "did you mean 'cosine'?",
    "train.precision=false": "train.precision: False is not a choice; valid: auto, fp32, bf16",
    "train.accumulate=3": "train.accumulate: 3 must divide train.batch_size 32",
    "train.lr=[": "--set train.lr: not valid YAML",
    "train.lr=&a [*a]": "--set train.lr: not valid YAML",
    "data.resolution=8x": "must be a number of pixels or HxW",
    "data.downsample=2": "data.downsample: 2 needs data.vae",
    "model.patch_size=3": "model.patch_size: 3 must divide the 8x8 grid",
    "model.compression=3": "model.compression: 3 must divide the 8 tokens of a row",
    "model.hidden_size=30": "model.hidden_size: 30 must be a multiple of 4",
    "model.d_state=7": "model.d_state: 7 must be even",
    "model.qk_norm=true": "model.qk_norm: true needs softmax attention: model.backbone=dit or "
    "model.mixer=attention, and model.mixer is s4d",
    "model.rope=true": "model.rope: true needs softmax attention",
    "model.stem=-1": "model.stem: -1 must be at least 0",
    "model.mixer=conv,mamba": (
        "model.mixer: 'mamba' is not a choice; valid: s4d, axial, linear, conv, attention"
    ),
    "model.mixer=mamba": (
        "model.mixer: 'mamba' is not a choice; valid: s4d, axial, linear, conv, attention"
    ),
    "model.scan=zigzag": "model.scan: 'zigzag' is not a choice; valid: raster, alternate, four",
    "model.local=5": "model.local: 5 is not a choice; valid: 0, 3",
    "sample.steps=2000": "sample.steps: 2000 must be at most diffusion.timesteps 1000",
    "sample.guidance_interval=5": "must be LO,HI",
    "diffusion.beta_end=2": "diffusion.beta_end: 2.0 must be at most 0.999",
    "diffusion.beta_end=1e-5": (
        "diffusion.beta_end: 1e-05 must be at least diffusion.beta_start 0.0001"
    ),
    "diffusion.beta_end=0.9": (
        "diffusion.timesteps: 1000 with variances up to 0.9 leave nothing of the image"
    ),
    "data.resolution=16777216": "data.resolution: 16777216 must be from 1 to 16384",
    "data.vae=vae": "data.vae: 'vae' given, but builtin:digits holds pixels; leave it out",
    'data.path="a\\0b"': "data.path: 'a\\x00b' holds a NUL byte",
    'data.path="\\ud800"': "data.path: '\\ud800' is not UTF-8 text",
}


@pytest.mark.parametrize(("override", "message"), WRONG.items(), ids=WRONG)
def test_wrong_override_is_one_line_error(override, message):
    with pytest.raises(ConfigError) as error:
        load_config("digits", [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


HINTS = {
    f"{s}.{name}": hint
    for s, cls in SECTIONS.items()
    for name, hint in typing.get_type_hints(cls).items()
}
NUMBERS = [name for name, hint in HINTS.items() if {int, float} & {hint, *typing.get_args(hint)}]
ABSURD = ["1" + 20 * "0", "1e300", "-1", "-1e300", "1e-300", ".nan", ".inf", "-.inf"]


def test_table_of_numbers_holds_every_field():
    assert set(HINTS) == set(field_names())
    assert {"train.lr", "model.depth", "data.resolution", "sample.guidance_interval"} <= set(
        NUMBERS
    )


@pytest.mark.parametrize("field", NUMBERS)
def test_absurd_numbers_are_rejected_in_every_field(field):
    """Huge, negative, next to zero or no number at all: one line each, naming the field."""
    for value in ABSURD:
        if (field, value) == ("diffusion.logit_mean", "-1"):
            continue  # the one field that may be negative
        with pytest.raises(ConfigError) as error:
            load_config("xl-256", [f"{field}={value}"])
        assert str(error.value).startswith(f"{field}: "), value
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.depth=1000", "model.hidden_size=16384"],
            "model.hidden_size: 16384 with model.depth 1000 makes about",
        ),
        (
            ["model.num_classes=1000000", "model.hidden_size=16384", "model.depth=20"],
            "parameters; at most 1e",
        ),
        (
            ["data.resolution=16384", "data.channels=64"],
            "data.resolution: 16384 makes 268,435,456 tokens of 64 values",
        ),
    ],
)
def test_sizes_that_are_absurd_together_are_rejected(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config("digits", ["data.path=x", *overrides])


FLOW = ("diffusion.objective=flow", "model.learn_sigma=false", "sample.sampler=euler")
VELOCITY = ("diffusion.objective=velocity",)
ZERO = "diffusion.zero_terminal_snr=true"
REFUSED = {
    (
        "diffusion.objective=flow",
        "sample.sampler=euler",
    ): "model.learn_sigma: true given, but a flow has no covariance",
    (
        *FLOW,
        "sample.sampler=ddpm",
    ): "sample.sampler: ddpm is for a discrete process; with objective flow, choose euler",
    (
        *FLOW,
        "sample.sampler=ddim",
    ): "sample.sampler: ddim is for a discrete process; with objective flow, choose euler",
    ("sample.sampler=sde",): "sample.sampler: sde is for a flow; with objective noise, choose ddim",
    (
        *VELOCITY,
        "sample.sampler=sde",
    ): "sample.sampler: sde is for a flow; with objective velocity, choose euler",
    (ZERO,): (
        "diffusion.zero_terminal_snr: true needs diffusion.objective=velocity; a model that "
        "predicts pure noise"
    ),
    (
        *FLOW,
        ZERO,
    ): (
        "diffusion.zero_terminal_snr: true needs diffusion.objective=velocity; a flow ends in "
        "pure noise"
    ),
    (
        "diffusion.predicts=image",
    ): "diffusion.predicts: image needs diffusion.objective=flow; noise says what",
    (*VELOCITY, ZERO, "sample.sampler=ddim"): "sample.sampler: ddim does not begin at pure noise",
    (
        "data.vae=v",
        "data.downsample=8",
        "data.channels=4",
        "data.path=x",
        "data.resolution=64",
        "sample.clip=true",
    ): (
        "sample.clip: true clamps pixels to [-1, 1], and the latents of 'v' go beyond that; "
        "leave it at false"
    ),
    (*VELOCITY, "train.mse_weight_cap=5"): "train.mse_weight_cap: 5 turns the MSE of the noise",
    (*FLOW, "train.mse_weight_cap=5"): "leave it at 1 with diffusion.objective=flow",
    (
        "train.mse_weight_cap=5",
        "train.loss_weight=min_snr",
    ): "leave it at 1 with train.loss_weight=min_snr",
    (*FLOW, "train.loss_weight=min_snr"): "train.loss_weight: min_snr is for discrete timesteps",
    (
        *VELOCITY,
        ZERO,
        "sample.sampler=euler",
        "train.loss_weight=min_snr",
    ): "gives the first step of sampling",
}
ALLOWED = [
    FLOW,
    (*FLOW, "diffusion.predicts=image", "sample.sampler=dpmpp"),
    (
        *FLOW,
        "sample.sampler=sde",
        "diffusion.timesteps_drawn=logit_normal",
        "diffusion.logit_mean=-1",
    ),
    (*FLOW, "sample.sampler=unipc", "diffusion.timesteps_drawn=shifted"),
    (*VELOCITY, "train.loss_weight=min_snr"),
    (*VELOCITY, "model.learn_sigma=false", ZERO, "sample.sampler=heun"),
    ("train.loss_weight=min_snr", "sample.sampler=heun", "diffusion.timesteps_drawn=shifted"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED.items(), ids=map(" ".join, REFUSED))
def test_unfitting_objective_and_options_are_rejected(overrides, message):
    with pytest.raises(ConfigError) as error:
        load_config("digits", overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("overrides", ALLOWED, ids=" ".join)
def test_fitting_objective_and_options_are_accepted(overrides):
    load_config("digits", overrides)


@pytest.mark.parametrize("name", preset_names())
def test_bounded_parameter_count_is_a_good_estimate(name, monkeypatch):
    """It needs no torch: a bound well above the truth takes a preset, one well below refuses it."""
    from diffussm_cli.profiling.flops import cost

    truth = cost(load_config(name)).parameters
    monkeypatch.setattr(checks, "MAX_PARAMETERS", 1.5 * truth)
    load_config(name)
    monkeypatch.setattr(checks, "MAX_PARAMETERS", truth / 1.5)
    with pytest.raises(ConfigError, match="makes about"):
        load_config(name)


def test_guidance_without_classes_is_rejected():
    with pytest.raises(ConfigError, match="sample.guidance: 2 needs a model of classes or text"):
        load_config("digits", ["model.num_classes=0", "sample.guidance=2"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1, 2]", "must be a mapping"),
        ("- 1", "must be a mapping"),
        ("trian: {lr: 1}", "unknown section 'trian'; did you mean 'train'?"),
        ("train: {lr: 1", "not valid YAML"),
        ("a: &x [1]\ntrain: *x", "aliases"),
        ("train: !!python/object/apply:os.system [echo]", "not valid YAML"),
        ("train:\n  lr: 1\n  steps: 2\n  lr: 3", "not valid YAML in line 4: 'lr' is given twice"),
        ("train: {}\ntrain: {}", "not valid YAML in line 2: 'train' is given twice"),
        ('train: {steps: !!int ""}', "not valid YAML"),
        ("train: {compile: !!bool x}", "not valid YAML"),
        ("train: {steps: !!timestamp x}", "not valid YAML"),
        ("train: !!map [1]", "not valid YAML"),
    ],
)
def test_wrong_preset_file_is_one_line_error(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(str(path))


def test_missing_huge_or_binary_preset_file_is_one_line_error(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'mnist'"):
        load_config("mnst")
    with pytest.raises(ConfigError, match="No such file"):
        load_config(str(tmp_path / "none.yaml"))
    (tmp_path / "huge.yaml").write_bytes(b"#" * (2 << 20))
    with pytest.raises(ConfigError, match="larger than"):
        load_config(str(tmp_path / "huge.yaml"))
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match="not a regular file"):
        load_config(str(tmp_path / "pipe.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load_config(str(tmp_path / "binary.yaml"))


def test_files_are_utf8_whatever_the_locale(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes("data: {path: x, class_names: [katt, sk\u00f6ldpadda]}\n".encode())
    code = (
        "from pathlib import Path; from diffussm_cli.config import read_text; "
        f"print(ascii(read_text(Path({str(path)!r}), '--preset')))"
    )
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | locale
    )
    assert done.returncode == 0, done.stderr
    assert r"sk\xf6ldpadda" in done.stdout


def test_text_that_cannot_name_a_file_is_rejected():
    check_text(Path("a" * 255) / "b", "--out")
    check_text("3," * 1000, "--classes")  # no path: as long as it likes
    with pytest.raises(ConfigError, match="--out: .* has a name of more than 255 bytes"):
        check_text(Path("x") / ("\u00e9" * 128), "--out")


@pytest.mark.parametrize(
    "kind", [["model.mixer=linear"], ["model.mixer=attention"], ["model.backbone=dit"]], ids=str
)
def test_heads_that_do_not_divide_width_are_rejected_where_used(kind):
    with pytest.raises(ConfigError, match="model.heads: 5 must divide model.hidden_size"):
        load_config("digits", ["model.heads=5", *kind])
    load_config("digits", ["model.heads=5", "model.mixer=conv"])
