"""The Hugging Face hub and its libraries: names, fetching, loading, and hashes of weights."""

import contextlib
import hashlib
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffussm_cli.errors import DataError, RunError, install, reason
from diffussm_cli.machine.tensors import NOT_FINITE, first_not_finite

HUB_NAME = r"\w[\w.-]*/\w[\w.-]*"  # OWNER/NAME
AT_REVISION = re.compile(rf"({HUB_NAME})(?:@(\w[\w./-]*))?")  # OWNER/NAME or OWNER/NAME@REVISION


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the hub's client, which logs every retry, and libraries that comment on configs."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def root_cause(e: BaseException) -> BaseException:
    """The error that caused this one: diffusers reports a missing network as a missing file."""
    while cause := e.__cause__ or e.__context__:
        e = cause
    return e


def reach_hub(pretrained_model_name_or_path: str, subfolder: str = "") -> None:
    """Fail at once if the hub is needed and does not answer; diffusers would retry for 23 s.

    The arguments are those of `from_pretrained`.
    """
    import huggingface_hub as hub

    repository = pretrained_model_name_or_path
    file = f"{subfolder}/config.json".lstrip("/")
    if os.path.isdir(repository) or isinstance(hub.try_to_load_from_cache(repository, file), str):
        return
    # the hub answers; diffusers reports its errors
    with contextlib.suppress(hub.errors.HfHubHTTPError):
        hub.get_hf_file_metadata(hub.hf_hub_url(repository, file))


def fetch(name: str, option: str, files: Sequence[str], cache: Path | None = None) -> Path:
    """Fetch files of a repository into the hub's cache.

    Args:
        name: OWNER/NAME or OWNER/NAME@REVISION.
        option: what errors call the name.
        files: their names, or patterns of them; nothing else is fetched.
        cache: the folder of the cache; by default the hub's.

    Raises:
        RunError: if they are neither in the cache nor can be fetched.
    """
    import huggingface_hub as hub

    match = AT_REVISION.fullmatch(name)
    assert match is not None, "checked by the caller"
    repository, revision = match.groups()
    try:
        with quiet():
            folder = hub.snapshot_download(
                repository, cache_dir=cache, revision=revision, allow_patterns=list(files)
            )
            return Path(folder)
    except Exception as e:  # the hub's client raises errors of several HTTP libraries
        raise RunError(
            f"{option}: there is no folder {name!r}, and it cannot be fetched from the hub: "
            "check its name and the network, or download it and give the folder "
            f"({reason(root_cause(e))})"
        ) from e


def load_pretrained(
    name: str, option: str, classes: Mapping[str, str], *parts: str
) -> tuple[Any, ...]:
    """A frozen model in transformers' format, float32 on the CPU, and what belongs to it.

    Weights are read from safetensors only.

    Args:
        name: a folder or a hub name; `option` is what errors call it.
        classes: the class of transformers by the type of the model; AutoModel for others.
        parts: further classes of transformers, such as `AutoTokenizer`.

    Raises:
        DataError: if transformers is missing, something cannot be loaded, or a weight is not
            finite.
    """
    try:
        import transformers
    except ImportError as e:
        raise DataError(f"{option}: {name!r} needs transformers: {install('text')}") from e
    transformers.utils.logging.disable_progress_bar()
    try:
        with quiet():
            reach_hub(name)
            others = [
                getattr(transformers, part).from_pretrained(name, trust_remote_code=False)
                for part in parts
            ]
            kind = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
            cls = getattr(transformers, classes.get(kind, "AutoModel"))
            model, info = cls.from_pretrained(
                name, trust_remote_code=False, use_safetensors=True, output_loading_info=True
            )
    # the libraries raise all kinds of errors for damaged files and missing networks
    except Exception as e:
        raise DataError(f"{option}: cannot load {name!r}: {reason(root_cause(e))}") from e
    lacking = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if lacking:
        raise DataError(f"{option}: the weights of {name!r} lack {lacking[0]}")
    check_finite(model, name, option)
    return model.float().eval().requires_grad_(False), *others


def check_finite(model: nn.Module, name: str, option: str) -> None:
    """Raises DataError if a tensor of a model that was loaded from `name` is not finite."""
    not_finite = first_not_finite(model.state_dict())
    if not_finite is not None:
        raise DataError(
            f"{option}: the weights of {name!r} are damaged: {not_finite} {NOT_FINITE}; "
            "take another copy of them"
        )


def weights_sha256(model: nn.Module) -> str:
    """Hash of the names, shapes and bytes of all tensors, independent of the file format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        # numpy has no bfloat16
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
