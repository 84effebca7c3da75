"""Captions as vectors: encoders, the form that models take, and prompts that are refused."""

import importlib.util

import pytest
import torch

from diffussm_cli.config import ModelConfig, load_config
from diffussm_cli.data import text
from diffussm_cli.data.opening import open_source
from diffussm_cli.data.text import (
    MAX_CHARACTERS,
    Pretrained,
    Texts,
    WordLlama,
    check_prompts,
    open_encoder,
    plain,
)
from diffussm_cli.errors import ConfigError, DataError
from tests.conftest import Letters

WORDS = ["data.text=x", "model.text_width=4", "model.text_tokens=4"]


def texts(encoder, tokens):
    return Texts(encoder, ModelConfig(text_width=encoder.width, text_tokens=tokens))


@pytest.mark.parametrize("tokens", [0, 2, 5])
def test_caption_is_encoded_as_pooled_vector_and_first_tokens(tokens):
    found = texts(Letters(), tokens)(["red", "red heart with eyes", "red"])
    assert found.shape == (3, 1 + tokens, 4)
    vectors = [Letters().vector(word) for word in ("red", "heart", "with", "eyes")]
    expected = torch.zeros(2, 6, 4)
    expected[0, 0] = expected[0, 1] = vectors[0]
    expected[1, 0], expected[1, 1:5] = torch.stack(vectors).mean(0), torch.stack(vectors)
    # of length sqrt(E); padding stays 0
    expected = 2 * expected / expected.norm(dim=-1, keepdim=True).clamp(min=1e-9)
    # kept as float16
    torch.testing.assert_close(found[:2], expected[:, : 1 + tokens], rtol=0, atol=2e-3)
    assert torch.equal(found[0], found[2])


def test_each_caption_is_encoded_once(monkeypatch):
    encoder, asked = Letters(), []
    encode = encoder.encode
    monkeypatch.setattr(
        encoder, "encode", lambda captions: asked.extend(captions) or encode(captions)
    )
    monkeypatch.setattr(text, "AT_ONCE", 2)
    known = texts(encoder, 1)
    known.learn(["a", "b", "c"])
    known(["b", "d", "b", "d"])
    assert asked == ["a", "b", "c", "d"]


def test_width_that_is_not_the_encoders_is_rejected():
    with pytest.raises(
        ConfigError,
        match="text_width: 8, but the vectors of letters have 4 numbers; --set model.text",
    ):
        Texts(Letters(), ModelConfig(text_width=8))


def test_wordllama_puts_crimson_near_red():
    if importlib.util.find_spec("wordllama") is None:
        pytest.skip("the extra text is missing")
    encoder = WordLlama()
    assert (encoder.width, len(encoder.sha256)) == (256, 64)
    found = texts(encoder, 3)(["crimson heart", "red heart", "parliament", "心", "heart", "😀"])
    assert found.shape == (6, 4, 256)
    assert found.square().mean(-1)[:, 0].tolist() == pytest.approx([1] * 6, abs=0.01)
    assert found[:, 0].isfinite().all()
    pooled = found[:, 0] / 16
    assert pooled[0] @ pooled[1] > 0.5 > 0.3 > pooled[0] @ pooled[2]
    assert len(torch.unique(pooled, dim=0)) == 6


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        DataError, match=r"wordllama is not installed: pip install '\.\[text\]' in a clone"
    ):
        WordLlama()


# ------------------------------------------------------------------------------------- transformers
def save_tokenizer(folder, special):
    """A tokenizer of whole words with the special tokens of a kind of model."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "<end>", "<unk>", "red", "heart", "blue"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <end>", special_tokens=[("<end>", 1)]
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>"
    )
    fast.model_max_length = 8
    fast.save_pretrained(folder)


def saved(folder, kind):
    """A text model of width 8 with random weights, in transformers' format."""
    transformers = pytest.importorskip("transformers")
    save_tokenizer(folder, special=kind != "bert")
    sizes = {
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 8,
        "vocab_size": 6,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "bert":
            config = transformers.BertConfig(hidden_size=8, max_position_embeddings=8, **sizes)
            model = transformers.BertModel(config)
        elif kind == "clip":
            ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
            config = transformers.CLIPTextConfig(
                hidden_size=8, max_position_embeddings=8, **sizes, **ends
            )
            model = transformers.CLIPTextModel(config)
        else:
            config = transformers.T5Config(
                vocab_size=6, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2
            )
            model = transformers.T5EncoderModel(config)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", ["bert", "clip", "t5"])
def test_models_of_transformers_encode_captions(tmp_path, kind):
    model = saved(tmp_path, kind)
    encoder = Pretrained(str(tmp_path))
    pooled, tokens, mask = encoder.encode(["red heart", "blue"])
    assert (encoder.width, pooled.shape, tokens.shape[::2]) == (8, (2, 8), (2, 8))
    end = [] if kind == "bert" else [1]
    ids = torch.tensor([[5, *end]])
    with torch.no_grad():
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert mask.tolist() == [[True] * (2 + len(end)), [True] * len(ids[0]) + [False]]
    torch.testing.assert_close(tokens[1][mask[1]], alone.last_hidden_state[0])
    expected = alone.pooler_output[0] if kind == "clip" else alone.last_hidden_state[0].mean(0)
    torch.testing.assert_close(pooled[1], expected)
    assert encoder.encode(["red " * 5000]).mask.sum() == 8  # the rest is cut off


def test_pickled_incomplete_or_damaged_weights_are_rejected(tmp_path):
    from safetensors.torch import load_file, save_file

    saved(tmp_path, "t5")
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "layer_norm" not in k},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(DataError, match="data.text: the weights of .* lack encoder.*layer_norm"):
        Pretrained(str(tmp_path))
    weights["shared.weight"][0] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match="data.text: .* are damaged: .* not finite; take another"):
        Pretrained(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match="data.text: cannot load .*model.safetensors"):
        Pretrained(str(tmp_path))


def test_unknown_encoder_name_is_rejected(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(
        DataError, match="'wordlama' must be wordllama, a folder, or a hub name such as"
    ):
        open_encoder("wordlama")
    with pytest.raises(DataError, match="data.text: cannot load"):
        open_encoder(str(tmp_path))  # an empty folder


# ----------------------------------------------------------------------------- captions and prompts
def test_caption_becomes_one_line_of_bounded_length():
    assert plain(" a\tred\u0000 heart\r\n") == "a red heart"
    assert plain("\ud800") == plain(" \n") == ""
    assert plain("x" * 10_000) == "x" * MAX_CHARACTERS
    assert plain("Herz 心 ❤️‍🔥") == "Herz 心 ❤️‍🔥"


@pytest.mark.parametrize(
    ("prompts", "negative", "guidance", "problem"),
    [
        ((), None, 3, "--prompt: the run draws what a text says; give --prompt"),
        (("heart", " "), None, 3, "--prompt: the prompt is empty"),
        (
            ("x" * 10_000,),
            None,
            3,
            "--prompt: 'xxxxxxxxxxxxxxxxxxxx'... has 10000 characters; at most 1000",
        ),
        (("red\x1b[31m",), None, 3, r"--prompt: .* holds the control character '\\x1b'"),
        (("heart",), "", 3, "--negative: the prompt is empty"),
        (("heart",), "red", 1, "--negative: 'red' has no effect at guidance 1"),
    ],
)
def test_bad_prompts_are_rejected(captioned, prompts, negative, guidance, problem):
    config = captioned(f"sample.guidance={guidance}")
    with pytest.raises(ConfigError, match=problem):
        check_prompts(prompts, negative, config, config.sample)
    check_prompts(("心 ❤️",), None, config, config.sample)


def test_prompt_for_run_without_text_is_rejected():
    config = load_config("mnist")
    check_prompts((), None, config, config.sample)
    for prompts, negative in ((("one",), None), ((), "one")):
        with pytest.raises(
            ConfigError,
            match="--(prompt|negative): 'one' given, but the run was trained without text",
        ):
            check_prompts(prompts, negative, config, config.sample)


def test_images_without_captions_are_counted_and_one_named(captioned, tmp_path):
    config = captioned()
    assert open_source(config).captions_of(3) == ("grey 3", "number 3 of twelve")
    for i in (7, 9):
        (tmp_path / "images" / f"0{i}.txt").unlink()
    with pytest.raises(
        DataError,
        match="images' has no caption for 2 of 12 images, such as '07.png'; captions stand in",
    ):
        open_source(config)


def test_encoder_other_than_that_of_run_is_rejected(captioned):
    text.open_texts(captioned(f"data.text_sha256={Letters.sha256}"))
    with pytest.raises(
        DataError, match="the weights of 'letters' are not those that the run was trained with"
    ):
        text.open_texts(captioned("data.text_sha256=abc"))


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["data.text=wordllama"], "data.text: 'wordllama' needs model.text_width"),
        (
            ["model.text_width=4"],
            "model.text_width: 4 needs a text encoder, such as data.text=wordllama",
        ),
        (["model.text_tokens=4"], "model.text_tokens: 4 needs model.text_width"),
        (
            ["data.text=x", "model.text_width=4", "model.text_tokens=4", "model.local=3"],
            "model.local=3 reads an image",
        ),
        (
            ["data.text=x", "model.text_width=4", "model.text_tokens=4", "model.mixer=conv"],
            "model.mixer=conv reads an image",
        ),
        (
            ["data.text=x", "model.text_width=4", "model.text_tokens=4", "model.mixer=axial"],
            "model.mixer=axial reads an image",
        ),
    ],
)
def test_conflicting_options_are_rejected(overrides, problem):
    with pytest.raises(ConfigError, match=problem):
        load_config("digits", overrides)
