"""YAML that cannot do harm: a small file is read, parsed into plain values, and written."""

import copy
import functools
import math
import re
import typing
from pathlib import Path
from typing import Any

import yaml

from diffussm_cli.errors import ConfigError, reading

MAX_YAML_BYTES = 1 << 20


def read_text(path: Path, option: str) -> str:
    """The content of a small text file. Raises a ConfigError that names the option."""
    with reading(f"{option}: cannot read {str(path)!r}", ConfigError):
        size = path.stat().st_size
        if not path.is_file():  # reading a pipe would block
            raise ConfigError(f"{option}: {path} is not a regular file")
        if size > MAX_YAML_BYTES:
            raise ConfigError(
                f"{option}: {path} is larger than {MAX_YAML_BYTES} bytes, "
                "too large for a configuration"
            )
        return path.read_text(encoding="utf-8-sig")  # Notepad begins a file with a byte order mark


class _PlainLoader(yaml.SafeLoader):
    """Safe YAML without aliases (nine lines of them can expand to a terabyte) and without duplicate
    keys.

    Unlike YAML 1.1, it takes text for something else only where nothing of its spelling is lost:
    `no`, `2024-01-01`, `0100` and `1:30` stay text, which the type of a field may turn into a
    decimal number or a truth value.
    """

    yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {}

    def compose_node(self, parent, index):
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        seen = set()
        for key in (key for key, _ in pairs if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _decimal(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


def _float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float | str:
    """A number, or its text if the number would be written in another way."""
    text = loader.construct_scalar(node)
    number = float(text.replace(".inf", "inf").replace(".nan", "nan"))
    return number if repr(number) == text or not math.isfinite(number) else text


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _decimal)
_PlainLoader.add_constructor("tag:yaml.org,2002:float", _float)
for _kind, _pattern in {
    "null": r"~|null|",
    "bool": r"true|false",
    "int": r"0|-?[1-9]\d*",
    "float": r"-?\d+(\.\d+)?([eE][-+]?\d+)?|-?\.inf|\.nan",
}.items():
    _PlainLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})$", re.ASCII), None
    )


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML with a safe loader; `where` names the file or option in errors."""
    try:
        return copy.deepcopy(_parsed(text))
    # `!!bool x` raises KeyError
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError) as e:
        mark = getattr(e, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(e, "problem", None) or str(e).split("\n")[0] or type(e).__name__
        raise ConfigError(f"{where}: not valid YAML{line}: {problem}") from e


@functools.lru_cache(maxsize=32)
def _parsed(text: str) -> Any:
    """A command reads the same presets several times, and reading takes longer than copying."""
    return yaml.load(text, Loader=_PlainLoader)  # noqa: S506 (a SafeLoader)


def dump_yaml(values: Any) -> str:
    """Plain values as YAML, which `parse_yaml` reads back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Writes text that holds control characters in double quotes, where they have escapes; YAML
    folds some of them.
    """


def _dump_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"'
    )


_Dumper.add_representer(str, _dump_text)
