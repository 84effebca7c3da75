"""What README and docs/ say is true of the code: links, commands, examples, and numbers that have
an address.
"""

import importlib
import inspect
import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
import yaml

import diffussm
from diffussm_cli import __version__
from diffussm_cli.cli import app
from diffussm_cli.config import load_config
from diffussm_cli.data.latents import encode_images
from diffussm_cli.evaluation.session import evaluate
from diffussm_cli.runs import layout
from diffussm_cli.sampling.session import sample

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / n for n in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
COMMANDS = typer.main.get_command(app).commands


def commands_in(page):
    """Every command of the program on a page, as a list of words that begins with its name."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    found = re.findall(r"`diffussm (\w[^`]*)`", text)
    found += re.findall(r"^ *(?:(?:torchrun|srun|pip) .*?)?\bdiffussm(?:_cli)? (\w.*)$", text, re.M)
    lists = [shlex.split(command, comments=True) for command in found]
    return [words for words in lists if words[0] in COMMANDS]


EXAMPLES = [pytest.param(w, id=f"{p.name}: {' '.join(w)}") for p in PAGES for w in commands_in(p)]


def test_readme_is_short_and_holds_its_commands():
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) < 130
    assert "    pip install . && diffussm sample mnist" in lines
    assert "    pip install '.[demo]' && diffussm train --preset mnist" in lines
    assert "    pip install '.[test]' && pytest" in lines


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_have_targets(page):
    targets = re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text("utf-8"))
    made_later = "api/"  # when the site is built, which checks these links
    assert [
        t for t in targets if not t.startswith(made_later) and not (page.parent / t).exists()
    ] == []


def test_documented_examples_are_found():
    assert {words.values[0][0] for words in EXAMPLES} == set(COMMANDS)


@pytest.mark.parametrize("words", EXAMPLES)
def test_documented_commands_and_options_exist(words):
    command = COMMANDS[words[0]]
    known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {"--help"}
    assert {w.partition("=")[0] for w in words[1:] if re.match("--?[a-z]", w)} <= known
    pairs = list(itertools.pairwise(words))
    given = dict(pairs)
    if words[0] == "train" and given.get("--preset") != "NAME":
        overrides = [value for option, value in pairs if option == "--set"]
        load_config(
            given.get("--preset", "mnist"), overrides, {"data.path": given.get("--data", "folder")}
        )


def test_library_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text("utf-8"), re.S
    )
    names: dict = {}
    for block in blocks:
        exec(block, names)  # noqa: S102
    assert names["noise"].shape == names["images"].shape == (2, 4, 32, 32)
    assert names["images"].isfinite().all()


@pytest.mark.slow
def test_readme_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    names: dict = {}
    exec(block, names)  # noqa: S102
    assert names["pictures"].shape == (10, 1, 28, 28)
    assert (tmp_path / "digits.png").is_file()
    assert float(capsys.readouterr().out) == pytest.approx(298.7, abs=0.05)


def test_map_in_contributing_names_every_folder():
    tree = re.search(
        r"## The map\n\n((?:    .+\n)+)", (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    )[1]
    parents, paths = [], set()
    for indent, name in re.findall(r"^    ( *)(\S+)", tree, re.M):
        parents = [*parents[: len(indent) // 4], name]
        paths.add("".join(parents))
    assert [path for path in paths if not (ROOT / path).exists()] == []
    packages = {
        f"{p.parent.relative_to(ROOT).as_posix()}/"
        for p in (ROOT / "diffussm_cli").rglob("__init__.py")
    }
    assert packages - paths == set()


def test_public_interface_page_lists_every_name():
    page = (ROOT / "docs" / "interface.md").read_text("utf-8")
    assert sorted(re.findall(r"^::: diffussm\.(\w+)$", page, re.M)) == sorted(
        set(diffussm.__all__) - {"__version__"}
    )


@pytest.mark.parametrize(
    ("function", "session", "hidden"),
    [
        (diffussm.sample, sample, {"sampling", "device", "precision"}),
        (diffussm.evaluate, evaluate, {"sampling", "run"}),
        (encode_images, encode_images, set()),
    ],
    ids=["sample", "evaluate", "encode_images"],
)
def test_docstring_names_every_parameter_of_its_session(function, session, hidden):
    words = set(re.findall(r"\w+", function.__doc__))
    assert inspect.signature(session).parameters.keys() - hidden - words == set()


def test_every_extra_stands_in_the_table_of_them():
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    section = re.search(r"^\[project.optional-dependencies\]\n(.*?)^\[", project, re.M | re.S)[1]
    table = (ROOT / "docs" / "get-started.md").read_text("utf-8")
    extras = set(re.findall(r"^(\w+) = ", section, re.M))
    rows = re.findall(r"^\| (`.*?`) \|", table, re.M)
    assert extras - set(re.findall(r"`(\w+)`", " ".join(rows))) == set()


def test_every_file_of_a_run_stands_in_its_description():
    page = (ROOT / "docs" / "formats.md").read_text("utf-8").partition("## Store of latents")[0]
    names = [value for name, value in vars(layout).items() if name.isupper()]
    names = [name for name in names if isinstance(name, str)]
    assert len(names) > 15
    assert [name for name in names if name not in page] == []


def test_sections_of_docstrings_become_lists_on_the_site():
    begins = re.compile(r"^ +(?:Args|Attributes|Raises|Returns|Warns|Yields)\b[^.\n]*:$", re.M)
    attributes = re.compile(r"^( +)Attributes:\n((?:\1 .*\n)+)", re.M)
    wrong = []
    for path in (ROOT / "diffussm_cli").rglob("*.py"):
        text = path.read_text("utf-8")
        wrong += [line for line in begins.findall(text) if not line.strip()[:-1].isalpha()]
        for _, block in attributes.findall(text):
            wrong += re.findall(r"^ +\w+, \w+:.*", block, re.M)
    assert wrong == []


def test_package_is_never_requested_from_an_index():
    """It is on none."""
    code = [
        path
        for folder in ("diffussm", "diffussm_cli", "examples")
        for path in (ROOT / folder).rglob("*.*")
    ]
    texts = {
        path: path.read_text("utf-8")
        for path in [*PAGES, *code]
        if path.suffix in (".md", ".py", ".ipynb")
    }
    asking = re.compile(r"pip install (?:-\S+ )*['\"]?diffussm(?!-)")
    assert [str(path) for path, text in texts.items() if asking.search(text)] == []


def is_printed_in(number, text):
    """Whether some number of a text, rounded to the digits of `number`, is that number."""
    mantissa, _, exponent = number.replace(",", "").partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    wanted = float(number.replace(",", ""))
    found = (float(n.replace(",", "")) for n in NUMBER.findall(text))
    return any(abs(n - wanted) <= unit * 0.5000001 for n in found)


INDEX = re.findall(
    r"^\| (.+?) \| (.*?\d.*?) \| .*\| \[[\w-]+\]\((results/.+?)\) \|$",
    (ROOT / "benchmarks" / "README.md").read_text("utf-8"),
    re.M,
)


def test_index_of_results_is_parsed():
    assert len(INDEX) > 30


@pytest.mark.parametrize(("what", "numbers", "file"), INDEX, ids=lambda x: str(x)[:40])
def test_indexed_numbers_stand_in_their_results(what, numbers, file):
    text = (ROOT / "benchmarks" / file).read_text("utf-8")
    assert [n for n in NUMBER.findall(numbers) if not is_printed_in(n, text)] == [], what


def test_readme_results_stand_in_their_sources():
    rows = re.findall(
        r"^\| .+ \| \[(.+)\]\((.+)\) \|$", (ROOT / "README.md").read_text("utf-8"), re.M
    )
    assert len(rows) > 8
    for result, link in rows:
        texts = [(ROOT / link).read_text("utf-8")]
        numbers = NUMBER.findall(re.sub(r"XL/\d|float\d+|\bat \d+", "", result))
        assert [n for n in numbers if not any(is_printed_in(n, text) for text in texts)] == [], (
            result
        )


def test_citation_names_this_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))["version"] == __version__
    assert f"\n## {__version__} (20" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_study_tables_stand_in_the_documentation(monkeypatch):
    """As report.py makes them from the committed results."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "studies"))
    report, studies = importlib.import_module("report"), importlib.import_module("study")
    pages = sorted((ROOT / "docs" / "results").glob("*.md"))
    assert len(pages) > 10
    compared = 0
    for path in pages:
        text = path.read_text("utf-8").splitlines()
        for name in re.findall(r"report\.py (\S+)", "\n".join(text)):
            study = studies.load_study(name)
            file = studies.RESULTS / name / studies.FLOOR
            floor = json.loads(file.read_text("utf-8")) if file.exists() else {}
            page = report.page(study, report.load_results(study), study.compared(), floor)
            assert [line for line in page if line.startswith("|") and line not in text] == [], path
            compared += 1
    assert compared >= 10


def test_table_of_all_trainings_equals_output_of_report(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "studies"))
    importlib.import_module("report").write_csv(tmp_path / "all.csv")
    stored = ROOT / "docs" / "results" / "all.csv"
    assert stored.read_text("utf-8") == (tmp_path / "all.csv").read_text("utf-8")
