"""A sampler: which labels seeds get, and what becomes of what is drawn."""

import math
import types

import pytest
import torch

from diffussm_cli.config import load_config
from diffussm_cli.data.vae import Decoding
from diffussm_cli.errors import NotFiniteError
from diffussm_cli.model import DiffuSSM
from diffussm_cli.sampling import sampler as module
from diffussm_cli.sampling.generate import labels_of
from diffussm_cli.sampling.sampler import Sampler
from tests.conftest import device, fill

SHORT = ("sample.steps=2", "sample.guidance=1", "sample.sampler=euler", "sample.clip=false")


def sampler(*overrides, decode=lambda x: x):
    config = load_config("digits", overrides)
    decoding = types.SimpleNamespace(decode=decode)
    return Sampler(
        torch.nn.Linear(1, 1).to(device()), config, config.sample, decoding, batch_size=3
    )


def test_classes_are_taken_in_turn_from_the_first_seed_on():
    assert sampler().labels(range(5, 10), (7, 3)) == [7, 3, 7, 3, 7]
    assert sampler().labels(range(5, 10)) == labels_of(range(5, 10), 10)
    assert sampler("model.num_classes=0", "sample.guidance=1").labels(range(5), (1,)) is None


def test_draw_decodes_to_uint8(monkeypatch):
    asked = []

    def generate(model, process, sampling, seeds, labels, batch_size, dtype, **_):
        asked.append((seeds, labels, batch_size, dtype, process.signal.device.type))
        yield [4, 5], torch.tensor([-2.0, 0.0]).view(2, 1, 1, 1)
        yield [6], torch.tensor([0.25]).view(1, 1, 1, 1)

    monkeypatch.setattr(module, "generate", generate)
    drawn = list(sampler(decode=lambda x: x + 0.5).draw(range(4, 7), [0, 1, 2]))
    assert asked == [(range(4, 7), [0, 1, 2], 3, torch.float32, device().type)]
    assert [seeds for seeds, _ in drawn] == [[4, 5], [6]]
    # floor(127.5 x + 128)
    assert [images.flatten().tolist() for _, images in drawn] == [[0, 191], [223]]
    assert {images.dtype for _, images in drawn} == {torch.uint8}


def test_error_other_than_memory_keeps_its_traceback(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("ours")
        yield

    monkeypatch.setattr(module, "generate", fail)
    with pytest.raises(RuntimeError, match="ours"):
        list(sampler().draw([0], [0]))


@pytest.mark.parametrize("where", ["steps", "decoding"])
def test_image_that_is_not_finite_is_named_by_seed_and_its_batch_held_back(where):
    """The second batch of three holds seed 8; the first one is handed out."""
    generator = torch.Generator().manual_seed(8)
    torch.randint(1, (), generator=generator)
    broken = torch.randn(1, 8, 8, generator=generator)

    class Spoiling(DiffuSSM):
        def forward(self, x, t, y=None, text=None):
            output = super().forward(x, t, y, text)
            is_broken = (x - broken.to(x)).abs().amax((1, 2, 3)) < 1e-6
            return torch.where(is_broken[:, None, None, None], math.nan, output)

    def decode(x):
        return x if where == "steps" else x + torch.where(seen.pop(0) == 1, math.nan, 0.0)

    kind = Spoiling if where == "steps" else DiffuSSM
    model = fill(kind(8, 1, 1, 16, 1, 2, 4, 0, learn_sigma=False)).eval()
    seen = [torch.tensor(batch) for batch in (0, 1)]
    config = load_config("digits", ["model.num_classes=0", "model.learn_sigma=false", *SHORT])
    drawing = Sampler(model, config, config.sample, Decoding(decode, {}), batch_size=3).draw(
        range(4, 10), None
    )
    assert next(drawing)[0] == [4, 5, 6]
    named = (
        r"seed 8 has values that are not finite after step 1 of 2"
        if where == "steps"
        else "seed 7 has values"
    )
    with pytest.raises(NotFiniteError, match=f"^the image of {named}"):
        next(drawing)
