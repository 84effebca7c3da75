"""An image is a function of its seed alone."""

import copy

import pytest
import torch

from diffussm_cli.config import SampleConfig
from diffussm_cli.data.text import Text
from diffussm_cli.diffusion.process import GaussianDiffusion
from diffussm_cli.model import DiffuSSM
from diffussm_cli.sampling import precision
from diffussm_cli.sampling.generate import generate, labels_of, make_denoiser
from tests.conftest import device, fill, randn


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return fill(DiffuSSM(8, 1, 1, 16, 2, 2, 4, 5)).eval()


def draw(model, seeds, batch_size=64, labels=None, dtype=torch.float32, **how):
    how = SampleConfig(**{"sampler": "ddpm", "steps": 5, "clip": True, **how})
    drawn = list(
        generate(model, GaussianDiffusion(device=device()), how, seeds, labels, batch_size, dtype)
    )
    assert [seed for part, _ in drawn for seed in part] == list(seeds)
    return torch.cat([images for _, images in drawn])


@pytest.mark.parametrize("how", [{}, {"guidance": 2.0}, {"sampler": "dpmpp"}])
def test_image_does_not_depend_on_its_batch(model, how):
    """To 2e-5 and not bitwise: matrix products choose their blocking by the number of rows.

    With two threads, dpmpp, which extrapolates, differed by 1.02e-5 on an AMD EPYC.
    """
    together = draw(model, range(64), **how)
    sevens = draw(model, range(64), batch_size=7, **how)
    alone = draw(model, [37], **how)
    torch.testing.assert_close(sevens, together, rtol=0, atol=2e-5)
    torch.testing.assert_close(alone[0], together[37], rtol=0, atol=2e-5)


def test_seeds_give_different_and_repeatable_images(model):
    images, again = (draw(model, range(8)) for _ in range(2))
    assert torch.equal(images, again)
    assert len(torch.unique(images.flatten(1), dim=0)) == 8


def test_labels_are_those_requested_or_of_seeds(model):
    seeds, asked = range(7, 12), [3, 1, 4, 3, 1]
    drawn = labels_of(seeds, 5)
    assert len(set(drawn)) > 1
    assert torch.equal(draw(model, seeds), draw(model, seeds, labels=drawn))
    changed = (
        (draw(model, seeds, labels=asked, batch_size=2) - draw(model, seeds)).abs().amax((1, 2, 3))
    )
    assert (changed > 1e-3).tolist() == [a != b for a, b in zip(asked, drawn)]


def test_kernels_are_built_once_for_all_steps_and_batches(kernels_built):
    model = fill(DiffuSSM(8, 1, 1, 16, 2, 2, 4, 5)).eval()
    draw(model, range(6), batch_size=2, guidance=1.5)
    assert kernels_built == [64, 64]  # one for each of two blocks


def test_no_kernel_is_kept_when_drawing_ends(kernels_built):
    """They would stay in a GPU's memory after each preview of a training run, and be those of old
    weights.
    """
    model = fill(DiffuSSM(8, 1, 1, 16, 2, 2, 4, 5)).eval()
    how = SampleConfig(sampler="ddim", steps=2)
    batches = generate(model, GaussianDiffusion(device=device()), how, range(4), batch_size=2)
    next(batches)
    batches.close()  # as a reader that stops early does
    kernels_built.clear()
    x, t, y = (
        randn(1, 1, 8, 8),
        torch.zeros(1).to(device()),
        torch.zeros(1, dtype=torch.long).to(device()),
    )
    with torch.no_grad():
        model(x, t, y)
    assert kernels_built == [64, 64]


def test_weights_cast_once_give_the_images_of_autocast(model, monkeypatch):
    """Bit for bit, for a while and for good; in between weights are as they were."""
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    with monkeypatch.context() as patch:
        patch.setattr(precision, "cast_products", lambda model, dtype: None)
        autocast = draw(model, range(3), dtype=torch.bfloat16)
    cast = draw(model, range(3), dtype=torch.bfloat16)
    assert torch.equal(cast, autocast)
    assert not torch.equal(cast, draw(model, range(3)))
    for name, p in model.named_parameters():
        assert p.data_ptr() == before[name][0]
        assert torch.equal(p, before[name][1])
    for_good = copy.deepcopy(model)
    precision.cast_products(for_good, torch.bfloat16)
    assert {p.dtype for b in for_good.blocks for p in (b.W0.weight, b.W_up.bias, b.W3.weight)} == {
        torch.bfloat16
    }
    assert {p.dtype for b in for_good.blocks for p in b.s4d.parameters()} == {torch.float32}
    assert torch.equal(draw(for_good, range(3), dtype=torch.bfloat16), cast)


def test_failed_drawing_restores_weights(model):
    seen = []

    def fail(*_):
        seen.append(model.blocks[0].W0.weight.dtype)
        raise RuntimeError("stop")

    hook = model.register_forward_pre_hook(fail)
    with hook, pytest.raises(RuntimeError, match="stop"):
        draw(model, [0], dtype=torch.bfloat16)
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_unconditional_model_draws_without_labels():
    model = fill(DiffuSSM(8, 1, 1, 16, 1, 2, 4, 0, learn_sigma=False)).eval()
    how = SampleConfig(sampler="ddim", steps=3)
    ((seeds, images),) = generate(model, GaussianDiffusion(device=device()), how, [4, 5])
    assert seeds == [4, 5]
    assert images.shape == (2, 1, 8, 8)


# --------------------------------------------------------------------------------------------- text
@pytest.fixture(scope="module", params=[0, 5], ids=["text", "classes and text"])
def reader(request):
    torch.manual_seed(0)
    return fill(DiffuSSM(8, 1, 1, 16, 2, 2, 4, request.param, text_width=4, text_tokens=2)).eval()


def read(model, seeds, text, labels=None, batch_size=64, **how):
    how = SampleConfig(**{"sampler": "ddim", "steps": 10, **how})
    process = GaussianDiffusion(device=device())
    return torch.cat(
        [
            images
            for _, images in generate(model, process, how, seeds, labels, batch_size, text=text)
        ]
    )


def test_image_depends_on_its_seed_and_prompt_alone(reader):
    text = Text(randn(5, 3, 4))
    labels = [1] * 5 if reader.num_classes else None
    together = read(reader, range(5), text, labels, guidance=2.0)
    alone = read(reader, [3], text.of(slice(3, 4)), labels and [1], guidance=2.0)
    torch.testing.assert_close(alone[0], together[3], rtol=1e-6, atol=1e-5)
    parts = read(reader, range(5), text, labels, batch_size=2, guidance=2.0)
    torch.testing.assert_close(parts, together, rtol=1e-6, atol=1e-5)
    shuffled = read(reader, range(5), text.of([1, 2, 3, 4, 0]), labels, guidance=2.0)
    assert (shuffled - together).abs().amax((1, 2, 3)).min() > 1e-3


def test_guidance_leads_away_from_no_caption_and_no_class_or_from_negative_prompt(reader):
    process, how = GaussianDiffusion(device=device()), SampleConfig(guidance=3.0)
    text, negative, x, t = (
        randn(2, 3, 4),
        randn(1, 3, 4, seed=1),
        randn(2, 1, 8, 8),
        torch.tensor([7, 7]),
    )
    y = torch.tensor([1, 3], device=device()) if reader.num_classes else None
    null = None if y is None else torch.full_like(y, 5)
    for given, other in ((None, torch.zeros(2, 3, 4)), (negative, negative.expand(2, 3, 4))):
        with torch.no_grad():
            found = make_denoiser(reader, process, how, y, Text(text, given))(x, 7)
            with_text, without = (
                reader(x, t.to(x.device), y, text),
                reader(x, t.to(x.device), null, other.to(x)),
            )
        expected = without[:, :1] + 3 * (with_text[:, :1] - without[:, :1])
        torch.testing.assert_close(
            found, torch.cat([expected, with_text[:, 1:]], 1), rtol=0, atol=1e-4
        )
