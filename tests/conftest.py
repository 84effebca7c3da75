"""Shared fixtures: golden values, a tiny configuration and a run trained with it."""

import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffussm_cli.config import load_config
from diffussm_cli.data import text
from diffussm_cli.data.emoji import Emoji, emoji_file
from diffussm_cli.data.text import Encoded
from diffussm_cli.model.s4d import layer

GOLDEN = Path(__file__).parent / "golden"
# of a small network on a rectangular grid
SIZES = {
    "input_size": (4, 8),
    "in_channels": 2,
    "hidden_size": 16,
    "depth": 4,
    "d_state": 4,
    "num_classes": 3,
}
TINY = [
    "model.hidden_size=16",
    "model.depth=2",
    "model.d_state=4",
    "train.batch_size=8",
    "train.steps=4",
    "train.log_every=2",
    "train.checkpoint_every=2",
    "train.sample_every=0",
    "sample.steps=4",
    "eval.held_out_every=0",
]


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default="cpu",
        help="run models, sampling, training and evaluation there, as cuda",
    )


def pytest_configure(config):
    # what `auto` means, in child processes too
    os.environ["DIFFUSSM_DEVICE"] = config.getoption("--device")
    # No test cuts the power, and waiting for the disk takes longer than training a tiny model.
    os.fsync = lambda descriptor: None
    # workers share the cores; torch with more threads than cores is slow
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


def pytest_xdist_auto_num_workers(config):
    """Several workers for the whole suite on a CPU; one process for chosen files, and for a GPU."""
    whole = all(os.path.isdir(path) for path in config.option.file_or_dir)
    return min(4, os.cpu_count()) if whole and config.getoption("--device") == "cpu" else 0


def pytest_collection_modifyitems(items):
    """The slow tests first, so that no worker begins a long one when the others have finished.

    Tests that share a fixture of their module run in one worker, which makes it once.
    """
    for item in items:
        made = (
            fixture for found in item._fixtureinfo.name2fixturedefs.values() for fixture in found
        )
        if any(fixture.scope == "module" for fixture in made):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Each test draws the same numbers whatever ran before it, on any number of workers."""
    torch.manual_seed(0)


def device() -> torch.device:
    """Where the suite runs: `pytest --device cuda`."""
    return torch.device(os.environ.get("DIFFUSSM_DEVICE", "cpu"))  # unset if a script asks


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Seeded normal numbers on the device of the suite, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(
        device()
    )


def golden(name: str, where: torch.device | None = None) -> dict[str, torch.Tensor]:
    """Arrays of a golden file by name, on the device of the suite or another."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        return {k: torch.from_numpy(arrays[k]).to(where or device()) for k in arrays}


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative L2 error."""
    return ((ours.double() - reference.double()).norm() / reference.double().norm()).item()


def float32_arithmetic() -> dict[str, bool]:
    """Whether float32 products and convolutions keep float32's precision, by the switches that
    torch's kernels read.
    """
    b = torch.backends
    if hasattr(b, "fp32_precision"):  # since torch 2.9
        places = {
            "products": (b.cuda.matmul, b.mkldnn.matmul),
            "convolutions": (b.cudnn.conv, b.mkldnn.conv),
        }
        return {k: not {s.fp32_precision for s in v} & {"tf32", "bf16"} for k, v in places.items()}
    return {
        "products": torch.get_float32_matmul_precision() == "highest",
        "convolutions": not b.cudnn.allow_tf32,
    }


@pytest.fixture
def tiny():
    """A configuration that trains in a second on the 8x8 digits; arguments are more overrides."""
    pytest.importorskip("sklearn")
    return lambda *overrides: load_config("digits", [*TINY, *overrides])


@pytest.fixture
def kernels_built(monkeypatch):
    """Lengths of the SSM kernels that are constructed from here on, in a list."""
    built, original = [], layer.s4d_kernel

    def counted(*arguments):
        built.append(arguments[5])
        return original(*arguments)

    monkeypatch.setattr(layer, "s4d_kernel", counted)
    return built


@pytest.fixture
def emoji(tmp_path, monkeypatch):
    """A made-up set in place of the built-in emoji: 300 names in two styles; two names share their
    pictures.
    """
    monkeypatch.setenv("DIFFUSSM_CACHE", str(tmp_path / "cache"))
    names = np.repeat([f"thing {i}" for i in range(300)], 2)
    images = np.random.default_rng(0).integers(0, 256, (600, 3, 32, 32), dtype=np.uint8)
    images[names == "thing 7"] = images[names == "thing 8"]
    captions = np.stack([names, np.where(np.arange(600) % 4, "", "a thing")], 1)
    categories = np.where(np.arange(600) < 200, "Food", "Flags")
    made = Emoji(images, names, np.array(["google", "twitter"] * 300), categories, captions)
    emoji_file().parent.mkdir(parents=True)
    np.savez(emoji_file(), **made._asdict())
    return made


def fill(model: torch.nn.Module, std: float = 0.1) -> torch.nn.Module:
    """Random numbers where the start has zeros, so that nothing hides behind them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".s4d." not in name:
                p.copy_(std * torch.randn(p.shape, generator=generator))
    return model.to(device())


def save_vae(folder: Path, seed: int = 0, **changes) -> Path:
    """A VAE of 4 channels that halves twice, with random weights, in diffusers' format."""
    import diffusers

    values = {
        "latent_channels": 4,
        "scaling_factor": 0.3,
        "shift_factor": 0.1,
        "norm_num_groups": 4,
    }
    values |= {"block_out_channels": (8, 8, 8), **changes}
    depth = len(values["block_out_channels"])
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * depth,
        "up_block_types": ("UpDecoderBlock2D",) * depth,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        diffusers.AutoencoderKL(**blocks, **values).save_pretrained(folder)
    return folder


def save_vae_of(kind: str, folder: Path, seed: int = 0, **changes) -> Path:
    """As `save_vae`, of another class of diffusers: AutoencoderDC or AutoencoderKLFlux2."""
    import diffusers

    sizes = {
        "AutoencoderDC": {
            "latent_channels": 4,
            "scaling_factor": 0.4,
            **dict.fromkeys(("encoder_layers_per_block", "decoder_layers_per_block"), (1, 1, 1)),
            **dict.fromkeys(("encoder_qkv_multiscales", "decoder_qkv_multiscales"), ((), (), ())),
            **dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (8,) * 3),
        },
        "AutoencoderKLFlux2": {
            "latent_channels": 4,
            "norm_num_groups": 4,
            "layers_per_block": 1,
            "block_out_channels": (8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        },
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(diffusers, kind)(**{**sizes[kind], **changes})
        if kind == "AutoencoderKLFlux2":
            model.bn.running_mean.normal_()
            model.bn.running_var.uniform_(0.5, 4)
        model.save_pretrained(folder)
    return folder


class Letters:
    """A text encoder for tests: each word has a vector of its own, and padding holds numbers that
    must not matter.
    """

    name, sha256, width = "letters", "ab" * 32, 4

    def encode(self, captions):
        words = [caption.split() for caption in captions]
        vectors = [torch.stack([self.vector(w) for w in line]) for line in words]
        tokens = torch.nn.utils.rnn.pad_sequence(vectors, batch_first=True, padding_value=7.0)
        mask = torch.arange(tokens.shape[1]) < torch.tensor([[len(line)] for line in words])
        return Encoded(torch.stack([v.mean(0) for v in vectors]), tokens, mask)

    def vector(self, word):
        return torch.randn(4, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))


@pytest.fixture
def captioned(tiny, tmp_path, monkeypatch):
    """As `tiny`, of twelve grey images with captions in files beside them, and an encoder without
    files.
    """
    monkeypatch.setattr(text, "open_encoder", lambda name: Letters())
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(12):
        Image.new("L", (8, 8), 20 * i).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"grey {i}\nnumber {i} of twelve\n")
    given = (
        "data.text=letters",
        "model.text_width=4",
        "model.num_classes=0",
        f"data.path={folder}",
    )
    return lambda *overrides: tiny(*given, *overrides)
