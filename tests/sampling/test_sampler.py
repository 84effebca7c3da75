"""A sampler: which labels seeds get, and what becomes of what is drawn."""

import math

import pytest
import torch

from diffussm_cli.config import load_config
from diffussm_cli.data.decoding import Decoding
from diffussm_cli.errors import NotFiniteError, RunError
from diffussm_cli.model import DiffuSSM
from diffussm_cli.sampling.generate import labels_of
from diffussm_cli.sampling.sampler import Sampler
from tests.conftest import fill

SHORT = ("sample.steps=2", "sample.guidance=1", "sample.sampler=euler", "sample.clip=false")


def sampler(*overrides, decode=lambda x: x, kind=DiffuSSM):
    """Of a small network with the classes of digits, or none."""
    config = load_config("digits", ["model.learn_sigma=false", *SHORT, *overrides])
    torch.manual_seed(0)
    model = fill(kind(8, 1, 1, 16, 1, 2, 4, config.model.num_classes, learn_sigma=False)).eval()
    return Sampler(model, config, config.sample, Decoding(decode, {}), batch_size=3)


def test_classes_are_taken_in_turn_from_the_first_seed_on():
    assert sampler().labels(range(5, 10), (7, 3)) == [7, 3, 7, 3, 7]
    assert sampler().labels(range(5, 10)) == labels_of(range(5, 10), 10)
    assert sampler("model.num_classes=0", "sample.guidance=1").labels(range(5), (1,)) is None


def test_draw_decodes_to_uint8_batch_by_batch():
    """Pixels are floor(127.5 x + 128) of what the decoding makes of the latents."""
    of_noise = sampler(decode=lambda x: 2 * x + 0.5)
    drawn = list(of_noise.draw(range(4, 9), [0, 1, 2, 3, 4]))
    latents = torch.cat([x for _, x in of_noise.generate(range(4, 9), [0, 1, 2, 3, 4])])
    expected = (127.5 * (2 * latents + 0.5) + 128).floor().clamp(0, 255)
    images = torch.cat([pixels for _, pixels in drawn])
    assert [seeds for seeds, _ in drawn] == [[4, 5, 6], [7, 8]]
    assert images.dtype == torch.uint8
    assert torch.equal(images.float(), expected)
    assert 0 < (images == 0).float().mean() < 1  # some are cut off


class Failing(DiffuSSM):
    """A network that cannot be computed."""

    error = RuntimeError("ours")

    def forward(self, *_):
        raise self.error


class OutOfMemory(Failing):
    """A network that is too large for the device."""

    error = torch.OutOfMemoryError("CUDA out of memory")


def test_lack_of_memory_is_one_line_and_any_other_error_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="ours"):
        list(sampler(kind=Failing).draw([0], [0]))
    with pytest.raises(RunError, match="--batch-size: 3 images do not fit into memory; use fewer"):
        list(sampler(kind=OutOfMemory).draw([0], [0]))


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
