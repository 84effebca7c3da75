"""Captions as vectors: text encoders by name, the form in which models take captions, and checks of
captions.

n captions   E width   K tokens
text (n, 1 + K, E): the pooled vector of a caption, then its first K token vectors

Each vector is scaled to the length sqrt(E), so that its entries have about unit variance. Rows of
zeros are padding.
"""

import functools
import hashlib
import importlib.util
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from diffussm_cli.config import Config, ModelConfig, SampleConfig
from diffussm_cli.errors import ConfigError, DataError, install
from diffussm_cli.machine.files import sha256
from diffussm_cli.machine.hub import HUB_NAME, load_pretrained, weights_sha256

MAX_CHARACTERS = 1000  # of a caption; the rest is cut off
MAX_TOKENS = 512  # of a caption that transformers encode; the rest is cut off
AT_ONCE = 256  # captions that an encoder gets at a time
WORDLLAMA = "wordllama"
CPU = torch.device("cpu")
PLACES = (
    "captions stand in metadata.jsonl, metadata.csv or NAME.txt beside NAME.png, in KEY.txt of "
    "tar shards, or in a column text"
)


class Encoded(NamedTuple):
    """What an encoder makes of n captions, float32."""

    pooled: Tensor  # (n, E)
    tokens: Tensor  # (n, K, E), K that of the longest caption
    mask: Tensor  # (n, K), true for a token of the caption


class Text(NamedTuple):
    """Captions as vectors; guidance leads away from `negative`, by default from no caption."""

    captions: Tensor  # (n, 1 + K, E), one per seed
    negative: Tensor | None = None  # (1, 1 + K, E) for all, or one per seed

    def of(self, chosen: slice | list[int]) -> "Text":
        """The captions of some of the seeds."""
        negative = self.negative
        if negative is not None and len(negative) > 1:
            negative = negative[chosen]
        return Text(self.captions[chosen], negative)


class TextEncoder(Protocol):
    """Makes vectors of captions. `sha256` identifies its weights."""

    name: str
    sha256: str
    width: int  # E

    def encode(self, captions: Sequence[str]) -> Encoded: ...


class WordLlama:
    """Static vectors of the tokens of Llama 2, which the package wordllama ships; no network and no
    context.

    The pooled vector is the mean of the tokens'. Text in any script has tokens, if need be its
    bytes; but what other scripts mean is hardly known to it.
    """

    name = WORDLLAMA

    def __init__(self) -> None:
        try:
            from tokenizers import Tokenizer

            folder = Path(importlib.util.find_spec(WORDLLAMA).origin).parent  # type: ignore[union-attr, arg-type]
        except (ImportError, AttributeError) as e:
            raise DataError(f"data.text: wordllama is not installed: {install('text')}") from e
        weights = folder / "weights" / "l2_supercat_256.safetensors"
        self.sha256 = sha256(weights)
        self.vectors = load_file(weights)["embedding.weight"].float()  # (32000, E)
        self.width = self.vectors.shape[1]
        self.tokenizer = Tokenizer.from_file(
            str(folder / "tokenizers" / "l2_supercat_tokenizer_config.json")
        )
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()

    def encode(self, captions: Sequence[str]) -> Encoded:
        encodings = self.tokenizer.encode_batch(list(captions), add_special_tokens=False)
        # a caption may have no token
        rows = [torch.tensor(e.ids, dtype=torch.long) for e in encodings]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)  # (n, K)
        mask = ids >= 0
        tokens = self.vectors[ids.clamp(min=0)] * mask[..., None]
        return Encoded(tokens.sum(1) / mask.sum(1, keepdim=True).clamp(min=1), tokens, mask)


class Pretrained:
    """A text model in transformers' format, from safetensors only: CLIP's or T5's encoder, or a
    model like MiniLM. It computes on `device`, and what it returns is on the CPU.

    The pooled vector is CLIP's own, and for others the mean of the token vectors, as
    sentence-transformers takes it.
    """

    def __init__(self, name: str, device: torch.device = CPU):
        if not os.path.isdir(name) and not re.fullmatch(HUB_NAME, name):
            known = f"{WORDLLAMA}, a folder, or a hub name such as openai/clip-vit-large-patch14"
            raise DataError(f"data.text: {name!r} must be {known}")

        classes = {
            "clip": "CLIPTextModel",
            "clip_text_model": "CLIPTextModel",
            "t5": "T5EncoderModel",
        }
        self.model, self.tokenizer = load_pretrained(name, "data.text", classes, "AutoTokenizer")

        self.own_pooling = "clip" in self.model.config.model_type
        self.name = name
        self.width = self.model.config.hidden_size
        self.sha256 = weights_sha256(self.model)
        self.model.to(device)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Encoded:
        inputs = tokenize(self.tokenizer, captions).to(self.model.device)
        output = self.model(**inputs)
        mask = inputs["attention_mask"].bool()
        tokens = output.last_hidden_state * mask[..., None]
        mean = tokens.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        pooled = output.pooler_output if self.own_pooling else mean
        return Encoded(pooled.cpu(), tokens.cpu(), mask.cpu())


def tokenize(tokenizer: Any, captions: Sequence[str]) -> Any:
    """The tokens of captions for a model of transformers, padded to the longest, and their mask."""
    longest = min(tokenizer.model_max_length, MAX_TOKENS)
    return tokenizer(
        list(captions), padding=True, truncation=True, max_length=longest, return_tensors="pt"
    )


@functools.lru_cache(maxsize=1)
def open_encoder(name: str, device: torch.device = CPU) -> TextEncoder:
    """Load a text encoder: `wordllama`, a folder, or a hub name. Raises DataError.

    A model of transformers computes on `device`; wordllama only looks vectors up, on the CPU.
    """
    return WordLlama() if name == WORDLLAMA else Pretrained(name, device)


def open_texts(config: Config) -> "Texts":
    """The text encoder of a run, ready to use. Raises DataError, ConfigError if it is not the one
    of the run.
    """
    name = config.data.text
    recorded = config.data.text_sha256
    assert name is not None, "checked by the configuration"
    encoder = open_encoder(name)
    if recorded not in ("", encoder.sha256):
        raise DataError(
            f"data.text: the weights of {name!r} are not those that the run was trained with"
        )
    return Texts(encoder, config.model)


class Texts:
    """Captions in the form that a model takes, computed once each and kept as float16."""

    def __init__(self, encoder: TextEncoder, model: ModelConfig):
        if encoder.width != model.text_width:
            raise ConfigError(
                f"model.text_width: {model.text_width}, but the vectors of {encoder.name} have "
                f"{encoder.width} numbers; --set model.text_width={encoder.width}"
            )
        self.encoder = encoder
        self.tokens = model.text_tokens
        self._known: dict[str, Tensor] = {}

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """(n, 1 + K, E) float32."""
        self.learn(dict.fromkeys(captions))
        return torch.stack([self._known[c] for c in captions]).float()

    def learn(self, captions: Iterable[str]) -> None:
        """Compute the vectors of different captions that are not known yet."""
        new = [c for c in captions if c not in self._known]
        for start in range(0, len(new), AT_ONCE):
            block = new[start : start + AT_ONCE]
            self._known |= zip(block, self.embed(block))

    def embed(self, captions: Sequence[str]) -> Tensor:
        """(n, 1 + K, E) float16, computed and not kept; zeros for an empty caption, as for an image
        without one.
        """
        written = torch.tensor([bool(c.strip()) for c in captions])
        if not written.all():
            vectors = torch.zeros(
                len(captions), 1 + self.tokens, self.encoder.width, dtype=torch.float16
            )
            if written.any():
                vectors[written] = self.embed([c for c in captions if c.strip()])
            return vectors

        pooled, tokens, mask = self.encoder.encode(captions)
        K, E = self.tokens, self.encoder.width
        words = F.pad((tokens * mask[..., None])[:, :K], (0, 0, 0, max(0, K - tokens.shape[1])))
        return F.normalize(torch.cat([pooled[:, None], words], 1), dim=-1).mul_(E**0.5).half()


class Captioned:
    """A source of images with captions. `texts` is set when a run uses them."""

    captions: Sequence[tuple[str, ...]] = ()  # of each image
    texts: Texts | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def captions_of(self, i: int) -> tuple[str, ...]:
        """The captions of an image."""
        return self.captions[i] if self.captions else ()

    def name_of(self, i: int) -> str:
        """What an error calls an image."""
        return f"image {i}"

    def captions_sha256(self) -> str:
        """Hash of the captions of all images, in order."""
        captions = [self.captions_of(i) for i in range(len(self))]
        return hashlib.sha256(json.dumps(captions).encode()).hexdigest()

    def embed(self, texts: Texts, name: str) -> None:
        """Compute the vectors of all captions. Raises DataError for images without one; `name` is
        that of the set.
        """
        captions_by_image = [self.captions_of(i) for i in range(len(self))]
        check_complete(captions_by_image, self.name_of, f"data.text: {name!r}")
        self.texts = texts
        texts.learn(dict.fromkeys(c for captions in captions_by_image for c in captions))

    def text(self, indices: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
        """One of the captions of each image, drawn with its generator: (B, 1 + K, E)."""
        assert self.texts is not None, "set by open_source"
        return self.texts([_drawn(self.captions_of(i), g) for i, g in zip(indices, generators)])


def _drawn(captions: tuple[str, ...], generator: torch.Generator) -> str:
    return captions[int(torch.randint(len(captions), (), generator=generator))]


# ------------------------------------------------------------------------------------------- checks
def check_complete(
    captions: Sequence[tuple[str, ...]], name_of: Callable[[int], str], where: str
) -> None:
    """Raises DataError if an image has no caption."""
    without = [i for i, texts in enumerate(captions) if not texts]
    if without:
        some = f"{len(without)} of {len(captions)} images, such as {name_of(without[0])!r}"
        raise DataError(f"{where} has no caption for {some}; {PLACES}")


def plain(caption: str) -> str:
    """A caption on one line: control characters and runs of white space become a space, and the end
    is cut off.
    """
    kept = "".join(" " if _is_control(c) else c for c in caption)
    return " ".join(kept.split())[:MAX_CHARACTERS].strip()


def check_prompts(
    prompts: Sequence[str], negative: str | None, config: Config, sampling: SampleConfig
) -> None:
    """Raises ConfigError if a model needs prompts or has no use for them, or if one is not fit."""
    if not config.model.text_width:
        if prompts or negative is not None:
            option = "--prompt" if prompts else "--negative"
            raise ConfigError(
                f"{option}: {(*prompts, negative)[0]!r:.60} given, "
                "but the run was trained without text"
            )
        return

    if not prompts:
        raise ConfigError('--prompt: the run draws what a text says; give --prompt "red heart"')

    for prompt in prompts:
        check_prompt(prompt, "--prompt")
    if negative is not None:
        check_prompt(negative, "--negative")
        if sampling.guide:
            raise ConfigError(
                f"--negative: {negative!r:.60} has no effect, because guidance leads away from the "
                "model of sample.guide; leave one of them out"
            )
        if sampling.guidance == 1:
            raise ConfigError(
                f"--negative: {negative!r:.60} has no effect at guidance 1; give --guidance 3"
            )


def check_prompt(prompt: str, option: str) -> None:
    """Raises ConfigError for a prompt that is empty, too long or holds control characters."""
    wrong = next((c for c in prompt if _is_control(c)), None)
    if not prompt.strip():
        raise ConfigError(f"{option}: the prompt is empty")
    if len(prompt) > MAX_CHARACTERS:
        raise ConfigError(
            f"{option}: {prompt[:20]!r}... has {len(prompt)} characters; at most {MAX_CHARACTERS}"
        )
    if wrong is not None:
        raise ConfigError(
            f"{option}: {prompt!r:.60} holds the control character {wrong!r}; remove it"
        )


def _is_control(c: str) -> bool:
    return unicodedata.category(c) in ("Cc", "Cs")
