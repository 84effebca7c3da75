"""The house's import directions, and what must not be imported early."""

import ast
import importlib
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

import diffussm_cli

ROOT = Path(diffussm_cli.__file__).parent
# A module may import what stands in a later row, or in its own row if the row says so.
ROWS = [
    {"__main__"},
    {"cli", "library"},
    {"commands"},
    {"profiling"},
    {"training"},
    {"evaluation"},
    {"sampling"},
    {"runs"},
    {"model", "diffusion", "data"},
    {"config", "machine", "pages"},
    {"errors", "events", "presets", ""},
]
ROW = {name: i for i, row in enumerate(ROWS) for name in row}


def modules():
    """Path and syntax tree of every module of the package."""
    for path in sorted(ROOT.rglob("*.py")):
        yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


def package(path):
    first = path.parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imports(tree):
    """Names that a module imports; a relative import begins with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names)


def is_wrong_import(package, name):
    """Whether an import is relative, goes up a row, or takes what only commands may use."""
    first, *rest = name.split(".")
    if first == "diffussm_cli":
        other = rest[0] if rest[0] in ROW else ""
        return other != package and ROW[other] <= ROW[package]
    return first == "" or (first in ("typer", "rich") and package not in ("cli", "commands"))


def test_imports_go_one_way():
    assert [
        f"{path} imports {name}"
        for path, tree in modules()
        for name in imports(tree)
        if is_wrong_import(package(path), name)
    ] == []


def imported_with(name, seen):
    """Adds to `seen` the modules of the package that the import of one imports at once."""
    path = ROOT.joinpath(*name.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if name in seen or name.split(".")[0] != ROOT.name or not path.is_file():
        return
    seen.add(name)
    body = ast.parse(path.read_text(encoding="utf-8")).body
    at_once = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    for other in imports(ast.Module(at_once, [])):
        parts = other.split(".")
        for n in range(1, len(parts) + 1):
            imported_with(".".join(parts[:n]), seen)


def test_cost_and_optimiser_are_imported_without_the_trainer():
    """It takes a second more, which `cost`, `train --list` and `make_optimizer` need not wait."""
    seen = set()
    imported_with("diffussm_cli.profiling.flops", seen)
    assert {"diffussm_cli.training.optimizer", "diffussm_cli.model.s4d.kernel"} <= seen
    trainer = {f"diffussm_cli.{name}" for name in ("training.step", "evaluation", "sampling")}
    assert not trainer & seen


@pytest.mark.parametrize(
    ("package", "code", "wrong"),
    [
        ("model", "from diffussm_cli.errors import ConfigError", False),
        ("model", "from diffussm_cli.model.s4d import S4D", False),
        ("model", "from diffussm_cli.data import vae", True),
        ("runs", "import diffussm_cli.training", True),
        ("runs", "from .layout import FINAL", True),
        ("runs", "from diffussm_cli import __version__", False),
        ("runs", "import rich.table", True),
        ("commands", "import rich.table", False),
    ],
)
def test_wrong_import_is_found(package, code, wrong):
    (name,) = imports(ast.parse(code))
    assert is_wrong_import(package, name) == wrong


PRINTS_OR_EXITS = ("print", "exit", "sys.exit", "quit", "os._exit")


def test_only_commands_print_and_exit():
    assert [
        f"{path}:{node.lineno}: {ast.unparse(node)}"
        for path, tree in modules()
        if package(path) not in ("cli", "commands", "__main__")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in PRINTS_OR_EXITS
    ] == []


def text_calls(tree):
    """Calls that open a text file without saying in which encoding, as read_text(), open() or
    open("w") of a path.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and not any(word.arg == "encoding" for word in node.keywords):
            mode = (
                node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            )
            if isinstance(node.func, ast.Attribute):
                plain = not node.args or (isinstance(mode, str) and set(mode) <= set("rwaxt+"))
                if node.func.attr in ("read_text", "write_text") or (
                    node.func.attr == "open" and plain
                ):
                    yield node
            elif isinstance(node.func, ast.Name) and node.func.id == "open":
                mode = node.args[1] if len(node.args) > 1 else None
                if not (isinstance(mode, ast.Constant) and "b" in mode.value):
                    yield node


def test_text_files_are_utf_8_whatever_the_locale():
    assert [
        f"{path}:{node.lineno}: {ast.unparse(node)}"
        for path, tree in modules()
        for node in text_calls(tree)
    ] == []


def test_calls_without_encoding_are_found():
    wrong = 'p.read_text(); p.write_text(t); p.open(); p.open("a"); open(p, "w")'
    right = 'p.open("rb"); open(p, "rb"); os.open(p, 0); write_text(p, t); p.open("a", encoding=u)'
    assert [len(list(text_calls(ast.parse(code)))) for code in (wrong, right)] == [5, 0]


FOLDERS = ("benchmarks/speed", "benchmarks/quality", "benchmarks/studies", "benchmarks/speedrun")
FOLDERS += ("tools", "examples")
SCRIPTS = sorted(
    p
    for folder in ("benchmarks", "tools", "examples")
    for p in (ROOT.parent / folder).rglob("*.py")
)
IMPORTED = ("study.py", "measures.py", "changes.py")  # by benchmarks/studies/run.py
WITH_HELP = [p for p in SCRIPTS if p.parent.name != "examples" and p.name not in IMPORTED]


def test_scripts_are_found_in_every_folder():
    assert {p.parent for p in SCRIPTS} == {ROOT.parent / folder for folder in FOLDERS}


@pytest.mark.slow
def test_scripts_show_help_from_any_folder(tmp_path):
    """All scripts with --help, in one child process and in another folder."""
    code = (
        "import json, runpy, sys\n"
        "usual, ends = list(sys.path), {}\n"
        "for path in sys.argv[1:]:\n"
        "    sys.path[:], sys.argv = usual, [path, '--help']\n"
        "    try:\n"
        "        runpy.run_path(path, run_name='__main__')\n"
        "        ends[path] = 'no --help'\n"
        "    except SystemExit as e:\n"
        "        ends[path] = e.code\n"
        "    except Exception as e:\n"
        "        ends[path] = repr(e)\n"
        "print(json.dumps(ends))\n"
    )
    command = [sys.executable, "-c", code, *map(str, WITH_HELP)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    ends = json.loads(done.stdout.splitlines()[-1])
    assert sorted(ends) == sorted(map(str, WITH_HELP))
    assert {path: end for path, end in ends.items() if end != 0} == {}


def missing(tree):
    """Names that a script takes from the package and that are not there: imports, and attributes of
    its modules.
    """
    bound = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "diffussm_cli":
            module = importlib.import_module(node.module)
            for alias in node.names:
                try:
                    found = getattr(module, alias.name, None) or importlib.import_module(
                        f"{node.module}.{alias.name}"
                    )
                except ImportError:
                    yield f"{node.module}.{alias.name}"
                    continue
                if isinstance(found, types.ModuleType):
                    bound[alias.asname or alias.name] = found
    for node in ast.walk(tree):
        of_module = (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in bound
        )
        if of_module and not hasattr(bound[node.value.id], node.attr):
            yield ast.unparse(node)


def test_scripts_use_only_names_of_the_package():
    assert [
        f"{path.name}: {name}"
        for path in SCRIPTS
        for name in missing(ast.parse(path.read_text(encoding="utf-8")))
    ] == []


def test_missing_names_are_found():
    code = (
        "from diffussm_cli import gone\n"
        "from diffussm_cli.model import s4d, build_model\n"
        "s4d.gone, s4d.S4D"
    )
    assert list(missing(ast.parse(code))) == ["diffussm_cli.gone", "s4d.gone"]


QUICK = [
    ["--help"],
    ["train", "--help"],
    ["sample", "--help"],
    ["profile", "--help"],
    ["encode", "--help"],
]
QUICK += [["eval", "--help"], ["eval"]]
QUICK += [
    ["--version"],
    ["encode", "a", "b", "--resolution", "20"],
    ["train", "--preset", "mnst"],
    ["train", "--set", "model.hiden_size=3"],
    ["train", "--bogus"],
]


def test_help_and_preset_errors_need_no_torch():
    """All of them in one process, which names the first that imports it."""
    code = (
        "import json, sys\n"
        "from diffussm_cli.cli import app\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    try:\n"
        "        app(arguments)\n"
        "    except SystemExit:\n"
        "        pass\n"
        "    if {'torch', 'diffusers'} & set(sys.modules):\n"
        "        sys.exit(f'slow: {arguments}')\n"
        "print('all are quick')\n"
    )
    command = [sys.executable, "-c", code, json.dumps(QUICK)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "slow" not in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1] == "all are quick"
