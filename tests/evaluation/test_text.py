"""Retrieval on features whose neighbours are known; CLIP on tiny saved models, against
transformers' own forward.
"""

import pytest
import torch

from diffussm_cli.errors import ConfigError, DataError
from diffussm_cli.evaluation.extractors import load_extractor
from diffussm_cli.evaluation.text import retrieval
from tests.data.test_text import save_tokenizer, saved

# Seven names in the plane, at 0, 10, ... 60 degrees; the first has a second picture at 180.
DEGREES = torch.tensor([0.0, 10, 20, 30, 40, 50, 60, 180])
NAMES, CATEGORIES = list("abcdefga"), list("xxyyyyyx")


def at(degrees):
    angle = torch.as_tensor(degrees).deg2rad()
    return 3 * torch.stack([angle.cos(), angle.sin()], 1)  # the length must not matter


def test_nearest_picture_gives_name_and_category():
    """The first is right by its second picture, the second is of a neighbour, the third is the
    sixth nearest.
    """
    found = retrieval(at([179.0, 11, 1]), ["a", "c", "f"], at(DEGREES), NAMES, CATEGORIES)
    assert found["top1"] == pytest.approx(1 / 3)
    assert found["top5"] == pytest.approx(2 / 3)
    assert found["category"] == pytest.approx(1 / 3)
    assert (found["chance_top1"], found["chance_top5"]) == (1 / 7, 5 / 7)
    assert found["chance_category"] == pytest.approx((2 + 5 + 5) / 3 / 7)


# --------------------------------------------------------------------------------------------- CLIP
# of each colour, as OpenAI published them with CLIP
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
CPU = torch.device("cpu")


@pytest.fixture
def clip(tmp_path):
    """A folder with a CLIP of width 8 that takes images of 16x16, with random weights; and the
    model.
    """
    transformers = pytest.importorskip("transformers")
    save_tokenizer(tmp_path, special=True)
    sizes = {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 8,
    }
    words = {
        "vocab_size": 6,
        "max_position_embeddings": 8,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.CLIPConfig(
            text_config={**sizes, **words},
            vision_config={**sizes, "image_size": 16, "patch_size": 8},
            projection_dim=6,
        )
        model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    side = {"height": 16, "width": 16}
    transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=side).save_pretrained(
        tmp_path
    )
    return tmp_path, model


def test_embeddings_and_score_equal_transformers(clip):
    folder, model = clip
    images = torch.randint(
        0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    extractor = load_extractor(str(folder), None, CPU)
    assert extractor.identity.startswith("clip-")
    found = extractor(images).pool
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    # "red heart", "blue", "heart", each with its end
    ids = torch.tensor([[3, 4, 1], [5, 1, 0], [4, 1, 0]])
    with torch.no_grad():
        own = model(
            input_ids=ids, attention_mask=(ids > 0).long(), pixel_values=(images / 255 - mean) / std
        )
    torch.testing.assert_close(found, own.image_embeds, rtol=1e-4, atol=1e-5)
    cosine = (own.image_embeds * own.text_embeds).sum(1).tolist()
    # the first leads away from its text, others do not
    away = torch.tensor([-1.0, 1, 1]) * torch.tensor(cosine).sign()
    expected = 100 * (abs(cosine[1]) + abs(cosine[2])) / 3
    score = extractor.network.score(found * away[:, None], ["red heart", "blue", "heart"])
    assert score == pytest.approx(expected, rel=1e-4)


def test_other_clip_models_are_rejected(tmp_path):
    saved(tmp_path / "bert", "bert")
    with pytest.raises(DataError, match="extractor: cannot load .*bert"):
        load_extractor(str(tmp_path / "bert"), None, CPU)  # it has no preprocessing of images
    with pytest.raises(
        ConfigError, match="extractor: 'clippy' must be .* a folder or hub name of CLIP"
    ):
        load_extractor("clippy", None, CPU)
