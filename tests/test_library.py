"""The public interface, as a notebook uses it."""

import ast
import dataclasses
import inspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diffussm as ds
from diffussm_cli.config.presets import BUNDLED
from diffussm_cli.data.datasets import DatasetSource
from diffussm_cli.errors import ConfigError, DataError
from diffussm_cli.library.requests import check_labels
from tests.conftest import fill, randn
from tests.helpers import line_of, run

ROOT = Path(__file__).parent.parent
SMALL = {"model.hidden_size": 16, "model.depth": 2, "model.d_state": 4, "sample.steps": 4}
SHORT = {"steps": 4, "batch_size": 8, "log_every": 2, "checkpoint_every": 2, "sample_every": 0}


class Squares(torch.utils.data.Dataset):
    """Bright and dark images, with their labels."""

    def __init__(self, side=8, kind=torch.uint8, labelled=True):
        self.side = side
        self.kind = kind
        self.labelled = labelled

    def __len__(self):
        return 24

    def __getitem__(self, i):
        bright = i % 2
        image = torch.full((1, self.side, self.side), 230 * bright, dtype=torch.uint8)
        image = image if self.kind == torch.uint8 else image / 127.5 - 1
        return (image, bright) if self.labelled else image


def train(out, data=None, **fields):
    settings = SMALL | {"model.num_classes": 2} if data is not None else SMALL
    return ds.train("digits", out, data=data, set=settings, show=False, **(SHORT | fields))


# ----------------------------------------------------------------------------------------- the door
def test_import_takes_no_torch_until_a_name_is_used():
    code = (
        "import sys, diffussm; print('torch' in sys.modules); diffussm.LinearFlow; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_every_public_name_exists_and_is_known_to_editors():
    tree = ast.parse((ROOT / "diffussm" / "__init__.py").read_text())
    typed = {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
        for imported in node.body
        if isinstance(imported, ast.ImportFrom)
        for alias in imported.names
    }
    assert typed == set(ds.__all__) - {"__version__"}
    for name in ds.__all__:
        assert getattr(ds, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'diffuse'"):
        ds.diffuse  # noqa: B018


def test_public_functions_have_complete_type_hints():
    for name in ("load", "train", "sample", "evaluate", "encode", "cost", "grid"):
        signature = inspect.signature(getattr(ds, name))
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(p.annotation is not p.empty for p in signature.parameters.values()), name


# ---------------------------------------------------------------------------------------- own loops
@pytest.mark.parametrize("process", [ds.GaussianDiffusion(), ds.LinearFlow(), ds.ImageFlow()])
def test_network_learns_in_custom_loop(process):
    torch.manual_seed(0)
    learn_sigma = isinstance(process, ds.GaussianDiffusion)
    sizes = {
        "hidden_size": 16,
        "depth": 2,
        "d_state": 4,
        "num_classes": 2,
        "learn_sigma": learn_sigma,
    }
    model = ds.DiffuSSM(input_size=8, in_channels=1, **sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    x_0 = torch.stack([torch.full((1, 8, 8), value) for value in (-0.8, 0.8)]).repeat(8, 1, 1, 1)
    y = torch.tensor([0, 1]).repeat(8)
    losses = []
    for step in range(40):
        loss = process.loss(model, x_0, y, generator=torch.Generator().manual_seed(step)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    images = process.sample(model.eval(), n=4, y=[0, 1, 0, 1], steps=6, guidance=1.5)
    assert images.shape == (4, 1, 8, 8)
    assert images[1].mean() > images[0].mean()


def test_loss_of_the_true_answer_is_zero():
    """A model that knows image and noise predicts the target exactly."""
    process = ds.LinearFlow()
    x_0 = randn(4, 3, 8, 8)

    def exact(x_t, t, y, text):
        share = (t / 1000).view(-1, 1, 1, 1)
        return (x_t - x_0) / share

    assert process.loss(exact, x_0).abs().max() < 1e-6


def test_loss_takes_labels_in_a_list_as_in_a_tensor():
    model = fill(ds.DiffuSSM(4, 1, hidden_size=16, depth=1, num_classes=5, learn_sigma=False)).cpu()
    x_0, flow = torch.zeros(3, 1, 4, 4), ds.LinearFlow()

    def loss(y):
        return flow.loss(model, x_0, y, generator=torch.Generator().manual_seed(0))

    expected = loss(torch.tensor([4, 0, 2]))
    assert torch.equal(loss([4, 0, 2]), expected)
    assert not torch.equal(loss([0, 4, 2]), expected)


def test_mistakes_in_custom_loop_are_named():
    sizes = {"input_size": 8, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_classes": 2}
    model, with_covariance = ds.DiffuSSM(**sizes, learn_sigma=False), ds.DiffuSSM(**sizes)
    flow, x_0, y = ds.LinearFlow(), torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])
    with pytest.raises(ds.DiffussmError, match="^config: Config is no section of training; give"):
        ds.make_optimizer(model, ds.load_config("mnist"))
    with pytest.raises(ds.DiffussmError, match="^model: Linear has no blocks, whose matrices Muon"):
        ds.make_optimizer(torch.nn.Linear(2, 2), ds.load_config("mnist").train)
    with pytest.raises(ValueError, match="^decay: 1.5 must be a number from 0 to 1$"):
        ds.EMA(model, 1.5)
    with pytest.raises(ds.DiffussmError, match="^model.learn_sigma: flow has no covariance"):
        flow.loss(with_covariance, x_0, y)
    for labels in ([1], torch.tensor(1), y[:, None]):
        with pytest.raises(ValueError, match=r"^y: labels of shape \(.*\) for 2 images$"):
            flow.loss(model, x_0, labels)
    with pytest.raises(ValueError, match="^y: 2 labels for n = 4 images"):
        flow.sample(model, n=4, y=[0, 1], steps=2)
    unconditional = ds.DiffuSSM(**{**sizes, "num_classes": 0}, learn_sigma=False)
    for draw in (flow.loss(unconditional, x_0, None), flow.sample(unconditional, n=1, steps=1)):
        assert draw.isfinite().all()
    with pytest.raises(ValueError, match="^y: labels were given, and the model has no classes"):
        flow.loss(unconditional, x_0, y)
    with pytest.raises(ValueError, match="^y: labels were given, and the model has no classes"):
        flow.sample(unconditional, n=1, y=1, steps=1)
    with pytest.raises(ValueError, match="^guidance: 2 leads away from the class model.null_class"):
        flow.sample(lambda x, t, y: x, n=1, y=1, steps=1, guidance=2, shape=(1, 8, 8))
    with pytest.raises(ValueError, match="^guidance: 5 needs y, the labels that it leads to$"):
        flow.sample(unconditional, n=1, steps=1, guidance=5)
    with pytest.raises(ValueError, match="^x_0: torch.uint8 must be floats, such as x_0.float"):
        flow.loss(model, x_0.byte(), y)
    with pytest.raises(ValueError, match="^y: torch.float32 must be torch.int64; give y.long"):
        flow.loss(model, x_0, y.float())
    assert torch.equal(flow.sample(model, n=2, y=[1], steps=1), flow.sample(model, 2, 1, steps=1))


def test_samples_depend_on_their_seed_alone():
    process = ds.LinearFlow()
    together = process.sample(lambda x, t, y: torch.sin(x), n=4, steps=5, shape=(1, 4, 4))
    alone = process.sample(lambda x, t, y: torch.sin(x), n=1, steps=5, shape=(1, 4, 4), seed=3)
    torch.testing.assert_close(together[3:], alone)
    assert process.sample(lambda x, t, y: x, n=0, steps=5, shape=(1, 4, 4)).shape == (0, 1, 4, 4)


@pytest.mark.parametrize("mixer", ["s4d", "conv,axial"])
def test_network_is_saved_and_loaded_with_its_arguments(mixer, tmp_path):
    sizes = {
        "input_size": (8, 16),
        "in_channels": 1,
        "hidden_size": 16,
        "depth": 2,
        "d_state": 4,
        "num_classes": 3,
    }
    model = ds.DiffuSSM(**sizes, mixer=mixer).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "model")
    loaded = ds.DiffuSSM.from_pretrained(tmp_path / "model")
    inputs = torch.randn(2, 1, 8, 16), torch.tensor([10, 900]), torch.tensor([0, 3])
    assert torch.equal(loaded(*inputs), model(*inputs))
    assert not list((tmp_path / "model").glob("*.bin"))


# --------------------------------------------------------------------------------------------- runs
def test_bundled_model_draws_what_the_command_draws(tmp_path):
    run = ds.load("mnist")
    images = run.sample(3, classes=range(3), steps=4, guidance=2)
    assert images.dtype == torch.uint8
    assert images.shape == (3, 1, 28, 28)
    path = ds.sample(
        "mnist", tmp_path / "images", 3, classes=range(3), steps=4, guidance=2, show=False
    )
    assert path == tmp_path / "images" / "grid.png"
    for i, image in enumerate(images):
        with Image.open(tmp_path / "images" / f"{i:06d}.png") as stored:
            assert np.array_equal(image[0].numpy(), np.asarray(stored))
    assert ds.grid(images).mode == "L"


def test_wrong_request_is_one_line_error_naming_the_parameter():
    run = ds.load("mnist")
    with pytest.raises(
        ConfigError, match="^classes: 99 is not a class of this model; it has 0 to 9$"
    ):
        run.sample(1, classes=[99])
    with pytest.raises(
        ConfigError, match="^step: there is no such parameter; did you mean 'steps'?"
    ):
        run.sample(1, step=4)


PIXELS = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
NO_GRID = {
    "floats": (
        (torch.zeros(2, 1, 4, 4),),
        r"^images: torch.float32 \(2, 1, 4, 4\) must be uint8 \(n,",
    ),
    "one image": ((PIXELS[0],), r"^images: torch.uint8 \(1, 4, 4\) must be uint8"),
    "no image": ((PIXELS[:0],), r"^images: torch.uint8 \(0, 1, 4, 4\) must be uint8"),
    "two channels": ((PIXELS.view(1, 2, 4, 4),), r"^images: torch.uint8 \(1, 2, 4, 4\) must be"),
    "an array": ((PIXELS.numpy(),), "^images: ndarray must be uint8"),
    "no columns": ((PIXELS, None, 0), "^columns: 0 must be a whole number of at least 1$"),
    "half a column": ((PIXELS, None, 1.5), "^columns: 1.5 must be a whole number of at least 1$"),
    "another kind": ((PIXELS, "g.jpg"), "^path: 'g.jpg' must end in .png$"),
    "a folder": ((PIXELS, "folder.png"), "^path: cannot write 'folder.png': it is a folder"),
    "a picture": ((PIXELS, "mine.png"), "^path: 'mine.png' exists and would be replaced; name"),
    "a text": ((PIXELS, "text.png"), "^path: 'text.png' exists and would be replaced; name"),
}


@pytest.mark.parametrize(("request_", "line"), NO_GRID.values(), ids=NO_GRID)
def test_wrong_grid_is_one_line_error_and_replaces_nothing(request_, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 8)).save("mine.png")
    Path("text.png").write_text("text")
    Path("folder.png").mkdir()
    before = {path.name: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=line):
        ds.grid(*request_)
    after = {path.name: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()}
    assert after == before


def test_grid_replaces_its_earlier_self(tmp_path):
    ds.grid(PIXELS, tmp_path / "g.png")
    picture = ds.grid(PIXELS + 9, str(tmp_path / "g.png"))
    with Image.open(tmp_path / "g.png") as stored:
        assert np.array_equal(np.asarray(stored), np.asarray(picture))
    assert [path.name for path in tmp_path.iterdir()] == ["g.png"]


@pytest.mark.parametrize(
    ("request_", "line"),
    [
        ({"classes": [10]}, "^classes: 10 is not a class of this model; it has 0 to 9$"),
        ({"classes": [0.9]}, "^classes: 0.9 is not a class of this model"),
        ({"classes": [True]}, "^classes: True is not a class of this model"),
        ({"classes": [torch.tensor(True)]}, r"^classes: tensor\(True\) is not a class of this"),
        ({"num": True}, "^num: True must be a whole number of at least 1$"),
        ({"classes": 1}, "^classes: 1 must be a list of labels or class names, such as"),
        ({"classes": "cat"}, "^classes: 'cat' must be a list of labels or class names, such as"),
        ({"classes": ["cat"]}, "^classes: 'cat' is not a class of this model; it has 0 to 9"),
        ({"num": 0}, "^num: 0 must be a whole number of at least 1$"),
        ({"num": -3}, "^num: -3 must be a whole number of at least 1$"),
        ({"num": 1.5}, "^num: 1.5 must be a whole number of at least 1$"),
        ({"batch_size": 0}, "^batch_size: 0 must be a whole number of at least 1$"),
        ({"seed": -1}, "^seed: -1 must be a whole number from 0 to"),
        ({"seed": 2**62 + 1}, "^seed: 4611686018427387905 must be a whole number from 0 to"),
        (
            {"prompts": "heart"},
            r"^prompts: 'heart' must be a list of texts, such as \['red heart'\]$",
        ),
        ({"prompts": [5]}, r"^prompts: \[5\] must be a list of texts"),
        ({"prompts": None}, "^prompts: None must be a list of texts"),
        ({"negative": 5}, "^negative: 5 must be one text$"),
    ],
)
@pytest.mark.parametrize("name", ["Run.sample", "sample", "evaluate"])
def test_numbers_labels_and_texts_of_request_are_checked(name, request_, line, tmp_path):
    run = ds.load("mnist")
    draw = {
        "Run.sample": run.sample,
        "sample": lambda **request: ds.sample(run, tmp_path / "images", show=False, **request),
        "evaluate": lambda **request: ds.evaluate(
            run, metrics=("kid",), cache=None, show=False, **request
        ),
    }[name]
    with pytest.raises(ConfigError, match=line):
        draw(**({"num": 2, "steps": 1} | request_))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("request_", "line"),
    [
        ({"interpolate": 5}, "^interpolate: 5 must be two different seeds$"),
        ({"interpolate": (1,)}, "^interpolate: 1 must be two different seeds$"),
        ({"callback": "x"}, "^callback: 'x' must be a function of step and x_t$"),
    ],
)
def test_seeds_and_callback_of_request_are_checked(request_, line):
    with pytest.raises(ConfigError, match=line):
        ds.load("mnist").sample(2, steps=1, **request_)


def test_names_of_classes_are_labels_as_on_the_command_line():
    config = ds.load_config(
        "digits",
        fields={"model.num_classes": 2, "data.class_names": ["dog", "cat"]},
    )
    assert check_labels(["cat", 0, "dog"], config) == [1, 0, 0]
    line = "^classes: 'cta' is not a class of this model; it has 0 to 1; did you mean 'cat'"
    with pytest.raises(ConfigError, match=line):
        check_labels(["cta"], config)
    assert check_labels([], config) == []


@pytest.mark.parametrize("wrong", ["resolution", "batch_size", "shard_size"])
def test_numbers_of_encoding_are_checked_before_anything_is_written(wrong, tmp_path):
    source = tmp_path / "images"
    source.mkdir()
    Image.new("RGB", (8, 8)).save(source / "a.png")
    with pytest.raises(ConfigError, match=f"^{wrong}: 0 must be a whole number of at least 1$"):
        ds.encode(source, tmp_path / "store", vae=tmp_path, show=False, **{wrong: 0})
    assert list(tmp_path.iterdir()) == [source]


def train_where_a_run_has_begun():
    Path("full/config.yaml").touch()
    ds.train("digits", "full", show=False)


# A mistake in Python and on the command line, and the same line about it.
MISTAKES = {
    "average": (
        lambda: ds.load("mnist", ema=0.5),
        "sample mnist --ema 0.5",
        "{--ema}: 'PACKAGE' holds no average with decay 0.5; it holds 0.995",
    ),
    "two averages": (
        lambda: ds.load("mnist", ema=0.5, ema_width=0.1),
        "sample mnist --ema 0.5 --ema-width 0.1",
        "{--ema-width}: cannot be given with {--ema}; leave one of them out",
    ),
    "a run": (
        lambda: ds.load("a/b/c"),
        "sample a/b/c",
        "{RUN}: no folder 'a/b/c'; train one with: diffussm train --out a/b/c",
    ),
    "one image between two": (
        lambda: ds.load("mnist").sample(1, interpolate=(3, 4)),
        "sample mnist --num 1 --interpolate 3 4",
        "{--interpolate}: needs at least 2 images, not {--num 1}",
    ),
    "a mask of nothing": (
        lambda: ds.load("mnist").sample(1, mask="nope.png"),
        "sample mnist -n 1 --mask nope.png",
        "{--mask}: needs {--image}, the image to begin with",
    ),
    "a film of another kind": (
        lambda: ds.sample("mnist", "images", 1, film=Path("film--out.png"), show=False),
        "sample mnist --out images -n 1 --film film--out.png",
        "{--film}: 'film--out.png' must end in .gif or .webp",
    ),
    "a folder of something else": (
        lambda: ds.train("digits", "full", show=False),
        "train --preset digits --out full",
        "{--out}: 'full' is not empty and holds no run; choose another folder",
    ),
    "a folder of a run": (
        train_where_a_run_has_begun,
        "train --preset digits --out full",
        "{--out}: 'full' is not empty; add {--resume} to continue it, or choose another folder",
    ),
    "a field": (
        lambda: ds.train("digits", set={"train.depth": 4}, show=False),
        "train --preset digits --set train.depth=4",
        "unknown field train.depth",
    ),
    "classes": (
        lambda: ds.train("digits", set={"model.num_classes": 3}, show=False),
        "train --preset digits --set model.num_classes=3",
        "model.num_classes: 3, but builtin:digits has 10 classes; {--set model.num_classes=10}",
    ),
    "a preset": (
        lambda: ds.cost("digit"),
        "train --preset digit --dry-run",
        "{--preset}: there is no preset 'digit'; did you mean 'digits'?",
    ),
    "columns": (
        lambda: ds.encode("full", "store", columns=("colour=a",), show=False),
        "encode full store --columns colour=a",
        "{--columns}: 'colour=a' must read image=NAME, label=NAME, text=NAME",
    ),
    "the place of a store": (
        lambda: ds.encode("full", "full/store", show=False),
        "encode full full/store",
        "{TARGET}: 'full/store' lies inside {SOURCE}; choose a folder outside it",
    ),
    "a reference": (
        lambda: ds.evaluate("mnist", "none", num=16, show=False),
        "eval mnist --reference none -n 16",
        "{--reference}: cannot read the folder 'none'",
    ),
    "samples": (
        lambda: ds.evaluate("none", show=False),
        "eval none",
        "{SAMPLES}: cannot read the folder 'none'",
    ),
    "a device": (
        lambda: ds.load("mnist", device="mars").sample(1),
        "sample mnist -n 1 --device mars",
        "{--device}: 'mars'",
    ),
    "prompts": (
        lambda: ds.evaluate("emoji", "full", num=16, show=False),
        "eval emoji --reference full -n 16",
        '{--prompt}: the run draws what a text says; give {--prompt "red heart"}',
    ),
}
IN_PYTHON = {
    "--ema-width": "ema_width",
    "--num 1": "num=1",
    "--preset": "config",
    "--prompt": "prompts",
    "--resume": "resume=True",
    '--prompt "red heart"': 'prompts=["red heart"]',
    "--set model.num_classes=10": "set={'model.num_classes': 10}",
    "RUN": "run",
    "SAMPLES": "samples",
    "SOURCE": "source",
    "TARGET": "target",
}


@pytest.fixture
def full_folder(tmp_path, monkeypatch):
    """The current folder, in which `full` holds one image in colour."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "full" / "a.png")
    return tmp_path


@pytest.mark.parametrize("case", MISTAKES)
def test_an_error_names_parameters_in_python_and_options_on_the_command_line(case, full_folder):
    call, command, line = MISTAKES[case]
    line = line.replace("PACKAGE", str(BUNDLED / "mnist"))
    names = re.findall(r"\{(.+?)\}", line)
    plain = line
    for name in names:
        plain = plain.replace(f"{{{name}}}", IN_PYTHON.get(name, name.removeprefix("--")))

    with pytest.raises(ds.DiffussmError) as error:
        call()
    assert plain in str(error.value)
    assert re.sub(r"[{}]", "", line) in line_of(run(*shlex.split(command)))


WRONG_KINDS = {  # calls that the command line does not know, and the lines about them
    "precision": (
        lambda: ds.load("mnist", precision="fp64"),
        "precision: 'fp64' is not a choice; valid: auto, fp32, bf16",
    ),
    "a device": (
        lambda: ds.load("mnist", device="cudaa"),
        "device: 'cudaa' is not available here; use auto or cpu",
    ),
    "a number as a device": (
        lambda: ds.load("mnist", device=0),
        "device: 0 must be text, such as 'auto'",
    ),
    "a number as a run": (
        lambda: ds.load(5),
        "run: 5 must be a run, its name or its path",
    ),
    "a text as a decay": (lambda: ds.load("mnist", ema="0.9"), "ema: '0.9' must be a number"),
    "a tensor of images": (
        lambda: ds.evaluate(PIXELS, "full", show=False),
        "samples: a Tensor must be a run, or the path of a run or of images, which ds.sample",
    ),
    "a tensor as a reference": (
        lambda: ds.evaluate("full", PIXELS, show=False),
        "reference: a Tensor must be a path of images or of an .npz, or a Dataset",
    ),
    "a list as a folder": (
        lambda: ds.sample("mnist", ["images"], 1, show=False),
        "out: a list must be a name or a path",
    ),
    "a text as a function": (
        lambda: ds.train("digits", "run", stop="x", show=False),
        "stop: 'x' must be a function",
    ),
    "a number as a source": (
        lambda: ds.encode(1, "store", show=False),
        "source: 1 must be a name or a path",
    ),
    "a name of no parameter of sample": (
        lambda: ds.sample("mnist", "images", 1, clases=[3], show=False),
        "clases: there is no such parameter; did you mean 'classes'?",
    ),
    "a name of no parameter of Run.sample": (
        lambda: ds.load("mnist").sample(1, clases=[3]),
        "clases: there is no such parameter; did you mean 'classes'?",
    ),
    "a name of no parameter of evaluate": (
        lambda: ds.evaluate("mnist", resolutoin=8, show=False),
        "resolutoin: there is no such parameter; did you mean 'resolution'?",
    ),
    "a name of no parameter of encode": (
        lambda: ds.encode("full", "store", batchsize=3, show=False),
        "batchsize: there is no such parameter; did you mean 'batch_size'?",
    ),
    "a device to sample": (
        lambda: ds.sample("mnist", "images", 1, device="cpu", show=False),
        "device: the run has its own; choose it by load(run, device=...)",
    ),
    "three sides": (
        lambda: ds.encode("full", "store", (16, 16, 3), show=False),
        "resolution: (16, 16, 3) must be pixels, or (height, width)",
    ),
    "a text of sides": (
        lambda: ds.encode("full", "store", "16x16", show=False),
        "resolution: '16x16' must be pixels, or (height, width)",
    ),
    "no sides": (
        lambda: ds.evaluate("full", "full", resolution=0, show=False),
        "resolution: 0 must be a whole number of at least 1",
    ),
    "a list of fields": (
        lambda: ds.train("digits", set=["train.steps=1"], show=False),
        "set: ['train.steps=1'] must be fields by their whole name, such as {'model.depth': 4}",
    ),
    "one override": (
        lambda: ds.load_config("mnist", "train.lr=2e-3"),
        "overrides: 'train.lr=2e-3' must be a list of texts, such as ['model.depth=4'], or fields",
    ),
    "an override without a value": (
        lambda: ds.load_config("mnist", ["train.lr"]),
        "overrides: 'train.lr' must read section.field=value, such as train.lr=2e-4",
    ),
    "a field of no section": (
        lambda: ds.load_config("mnist", fields={"trian.lr": 2e-3}),
        "fields: unknown field 'trian.lr'; did you mean 'train.lr'?",
    ),
    "fields as a list": (
        lambda: ds.load_config("mnist", fields=["train.lr=1"]),
        "fields: ['train.lr=1'] must be fields by their whole name",
    ),
    "a preset": (
        lambda: ds.load_config("mnits"),
        "preset: there is no preset 'mnits'; did you mean 'mnist'?",
    ),
    "a number as a preset": (lambda: ds.load_config(5), "preset: 5 must be a name or a path"),
    "a list of fields to cost": (
        lambda: ds.cost("digits", ["train.steps=1"]),
        "set: ['train.steps=1'] must be fields by their whole name",
    ),
}


@pytest.mark.parametrize("case", WRONG_KINDS)
def test_values_of_another_kind_are_one_line_before_anything_is_written(case, full_folder):
    call, line = WRONG_KINDS[case]
    with pytest.raises(ConfigError) as error:
        call()
    assert str(error.value).startswith(line)
    assert [path.name for path in full_folder.iterdir()] == ["full"]


def test_paths_may_be_text_and_images_use_nothing_of_drawing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = {"grid": "g.png", "film": "f.gif"}
    grid = ds.sample("mnist", "images", 5, steps=1, show=False, **files)
    assert grid == Path("g.png")
    options = {"metrics": ("is",), "out": "r.json", "cache": "cache", "resolution": 28}
    ds.evaluate("images", "builtin:mnist", num=2, steps=3, **options)
    shown = " ".join(capsys.readouterr().err.split())
    assert "num, steps: not used, because samples are images, not a run" in shown
    assert {path.name for path in tmp_path.iterdir()} == {
        *("images", "g.png", "f.gif", "r.json", "cache")
    }


def test_fields_of_configuration_may_be_a_mapping_or_texts():
    by_name = ds.load_config("mnist", {"train.lr": 2e-3})
    assert by_name == ds.load_config("mnist", ["train.lr=2e-3"])
    assert by_name == ds.load_config("mnist", fields={"train.lr": 2e-3})
    assert by_name.train.lr == 2e-3


def test_costs_equal_those_of_the_command():
    assert isinstance(ds.cost("xl-256"), ds.Cost)
    assert ds.cost("xl-256").parameters == 673_088_272
    assert ds.cost(ds.load_config("xl-256"), {"model.depth": 1}).gflops < 12


# ----------------------------------------------------------------------------------------- own data
def test_run_continued_by_name_keeps_its_configuration(tmp_path):
    first = train(tmp_path / "run", lr=0.005)
    again = ds.train(out=tmp_path / "run", resume=True, steps=5, show=False)
    assert again.config.train.lr == 0.005
    assert again.config.model == first.config.model
    assert (tmp_path / "run" / "checkpoints" / "step-00000005").is_dir()


def test_custom_dataset_is_trained_resumed_sampled_and_evaluated(tmp_path):
    data = Squares(side=28)
    sizes = {"data.resolution": 28, "model.patch_size": 7, "model.num_classes": 2}
    config = ds.load_config(
        "digits", fields=SMALL | sizes | {f"train.{k}": v for k, v in SHORT.items()}
    )
    straight = ds.train(config, tmp_path / "straight", data=data, show=False)
    calls = []
    ds.train(
        config,
        tmp_path / "run",
        data=data,
        show=False,
        stop=lambda: calls.append(1) or len(calls) > 1,
    )
    assert not (tmp_path / "run" / "final").exists()
    run = ds.train(config, tmp_path / "run", data=data, resume=True, show=False)
    assert run.config.data.path == "python:Squares"
    assert run.config.data.class_names == ("0", "1")
    weights = [
        (tmp_path / name / "final" / "model.safetensors").read_bytes()
        for name in ("straight", "run")
    ]
    assert weights[0] == weights[1]
    assert torch.equal(run.sample(5, steps=3), straight.sample(5, steps=3))
    scores = ds.evaluate(run, data, ("kid",), num=16, steps=2, cache=None, show=False)
    assert 0 < scores["kid"] < 10


def test_bytes_and_floats_of_the_same_images_train_alike(tmp_path):
    logs = []
    for kind in (torch.uint8, torch.float32):
        run = train(tmp_path / str(kind), Squares(kind=kind), steps=2)
        records = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
        logs.append([record["loss"] for record in records])
    assert logs[0] == logs[1]


def test_dataset_without_labels_trains_an_unconditional_model(tmp_path):
    settings = SMALL | {"model.num_classes": 0, "sample.guidance": 1}
    run = ds.train(
        "digits", tmp_path / "run", data=Squares(labelled=False), set=settings, show=False, **SHORT
    )
    assert run.sample(2).shape == (2, 1, 8, 8)


class Odd(Squares):
    def __init__(self, item):
        super().__init__()
        self.item = item

    def __getitem__(self, i):
        return self.item


class Named(Squares):
    """Two named classes, and a last item with a label of choice."""

    classes = ("dark", "bright")

    def __init__(self, last):
        super().__init__()
        self.last = last

    def __getitem__(self, i):
        image, label = super().__getitem__(i)
        return image, self.last if i == len(self) - 1 else label


@pytest.mark.parametrize("label", [2, 3])
def test_label_beyond_the_classes_of_a_dataset_is_named(label, tmp_path):
    """Label 2 of two classes is the null class, which must not be trained as one of them."""
    line = (
        f"data: item 23 of the Named has the label {label}; labels must be whole numbers from 0 "
        "to 1, because the data have 2 classes"
    )
    with pytest.raises(DataError, match=line):
        train(tmp_path / "run", data=Named(label))


@pytest.mark.parametrize("classes", [2, "two"])
def test_classes_of_a_dataset_must_be_a_list_of_names(classes, tmp_path):
    data = Squares()
    data.classes = classes
    with pytest.raises(DataError, match=f"classes of the Squares are {classes!r}; they must be a"):
        train(tmp_path / "run", data=data)


@pytest.mark.parametrize(
    ("item", "line"),
    [
        (
            torch.zeros(1, 9, 8),
            r"data: item 0 of the Odd has the shape \(1, 9, 8\), but the model takes \(1, 8, 8\)",
        ),
        (
            torch.full((1, 8, 8), torch.nan),
            "data: item 0 of the Odd holds a number that is not finite",
        ),
        (
            "a.png",
            r"data: an item must be a tensor \(C, H, W\), or a pair of it and a label, not str",
        ),
        (torch.zeros(8, 8), "not a tensor of 2 dimensions"),
        (
            torch.full((1, 8, 8), 255.0),
            r"data: item 0 of the Odd is float32 from 255 to 255; give uint8, or floats in",
        ),
        (
            torch.ones(1, 8, 8, dtype=torch.int64),
            "data: item 0 of the Odd is int64 from 1 to 1; give uint8",
        ),
        *(
            (
                (torch.zeros(1, 8, 8), label),
                f"data: item 0 of the Odd has the label {label!r}; "
                "labels must be whole numbers from 0 to 999999",
            )
            for label in (0.9, -1, 10**12, "cat")
        ),
    ],
)
def test_unfitting_items_are_named_before_training(tmp_path, item, line):
    with pytest.raises(DataError, match=line):
        train(tmp_path / "run", Odd(item))


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([torch.zeros(1, 28, 28)])


def test_data_without_numbered_items_are_refused_in_one_line(tmp_path):
    """A class in place of its object, a stream, and a loader."""
    given = {"the class Squares": Squares, "a Stream": Stream()}
    given["a DataLoader"] = torch.utils.data.DataLoader(Squares())
    for name, data in given.items():
        line = f"data: {name} given; give a folder, or a Dataset, which has __len__ and __getitem__"
        for config in (None, "digits"):
            with pytest.raises(DataError, match=f"^{line}$"):
                ds.train(config, tmp_path / "run", data=data, steps=1, show=False)
    with pytest.raises(DataError, match="^data: a Stream given"):
        ds.evaluate("mnist", Stream(), num=1, show=False)


@pytest.mark.parametrize("shape", [(16, 16, 4), (28, 28, 3), (32, 32, 1)])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_channels_of_items_must_come_first(shape, kind, tmp_path):
    line = f"data: item 0 of the Odd has the shape {shape}; it must be (C, H, W), with 1 or 3 chan"
    item = torch.zeros(shape, dtype=kind)
    with pytest.raises(DataError, match=re.escape(line)):
        ds.train(out=tmp_path / "run", data=Odd(item), steps=1, show=False)
    with pytest.raises(DataError, match=re.escape(line)):
        ds.evaluate("mnist", Odd(item), num=1, show=False)


@pytest.mark.parametrize("image", [torch.full((1, 28, 28), 2.0), torch.ones(1, 28, 28).int()])
def test_reference_images_are_checked_too(image):
    with pytest.raises(DataError, match="data: item 0 of the Odd is .*; give uint8, or floats"):
        ds.evaluate("mnist", Odd(image), num=1, show=False)


class ToTensor(Squares):
    """Pixels in [0, 1], a mistake; `low` is that of the last image."""

    def __init__(self, low=0.0):
        super().__init__()
        self.low = low

    def __getitem__(self, i):
        low = self.low if i == len(self) - 1 else 0.0
        return torch.linspace(low, 1, 64).view(1, 8, 8), 10 * (i % 3)


def test_dataset_of_pixels_from_0_to_1_and_labels_with_gaps_is_told(tmp_path, capsys):
    settings = {**SMALL, "model.num_classes": 21}
    ds.train("digits", tmp_path / "run", data=ToTensor(), set=settings, **SHORT | {"steps": 1})
    shown = " ".join(capsys.readouterr().err.split())
    assert shown.count("lie in [0, 1], as ToTensor makes them, but floats are taken to lie in") == 1
    assert shown.count("18 of 21 classes have no image: 1, 2, 3, 4, 5, 6, 7, 8, 9, 11,") == 1


def test_dataset_of_model_space_is_not_doubted():
    config = ds.load_config("digits", fields={"model.num_classes": 0, "sample.guidance": 1})
    unscaled = [ToTensor(), Odd(torch.ones(1, 8, 8))]
    assert all(DatasetSource(data, config).warning for data in unscaled)
    right = [ToTensor(-0.1), Squares(), Squares(kind=torch.float32), Odd(torch.zeros(1, 8, 8))]
    assert not any(DatasetSource(data, config).warning for data in right)


def test_harmless_differences_are_accepted():
    """Latents have any size, whole numbers of any kind are labels, and labels of an unconditional
    model are not used.
    """
    config = ds.load_config("digits", fields={"model.num_classes": 2})
    for label in (1, True, 1.0, np.int64(1), torch.tensor(1)):
        source = DatasetSource(Odd((torch.full((1, 8, 8), -1.0005), label)), config)
        assert source.read([0], [torch.Generator()])[1].tolist() == [1]

    fields = {"model.num_classes": 0, "sample.guidance": 1}
    config = ds.load_config("digits", fields=fields)
    for label in (-1, 0.9, "cat"):
        source = DatasetSource(Odd((torch.zeros(1, 8, 8), label)), config)
        assert source.read([0], [torch.Generator()])[1].tolist() == [0]

    data = dataclasses.replace(config.data, resolution=64, downsample=8, vae="x", channels=4)
    latents = torch.full((4, 8, 8), 9.0)
    assert len(DatasetSource(Odd(latents), dataclasses.replace(config, data=data))) == 24


def test_run_on_custom_dataset_cannot_resume_without_it(tmp_path):
    run = train(tmp_path / "run", Squares())
    with pytest.raises(
        ConfigError, match="^data.path: 'python:Squares' was a dataset of a Python program"
    ):
        ds.train(run.config, tmp_path / "again", show=False)
