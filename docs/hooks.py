"""What MkDocs cannot do alone: pages and tables made from the code, and files of the repository
outside of docs/.

A page of docs/ asks for a table by its placeholder, as `{{ fields }}`; the functions in TABLES make
them.
"""

import ast
import dataclasses
import html
import inspect
import re
import typing
from pathlib import Path

import typer
from mkdocs.structure.files import File

from diffussm_cli import config as settings
from diffussm_cli.cli import EXAMPLES, app

ROOT = Path(__file__).parents[1]
PACKAGE, RESULTS = ROOT / "diffussm_cli", ROOT / "benchmarks" / "results"
RACE = ROOT / "benchmarks" / "speedrun" / "README.md"
NOT_API = ("commands", "presets")  # the commands have a page of their own
ROOT_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
BOUNDS = {"least": "at least {}", "above": "above {}", "most": "at most {}", "below": "below {}"}
# How much a page counts in a search, by the beginning of its path: guides first, then the API, then
# what is dated.
SEARCH_BOOST = {
    "get-started": 4.0,
    "interface": 1.0,
    "commands": 1.0,
    "configuration": 1.0,
    "results/": 0.5,
    "api/": 0.05,
    "benchmarks/": 0.02,
    "CHANGELOG": 0.02,
    "": 2.0,  # the guides
}
PUBLIC_NAME = re.compile(r"^::: diffussm\.\w+$", re.M)
PUBLIC_OPTIONS = (
    "\n    options: { show_root_heading: true, show_root_toc_entry: true, show_source: false }"
)
LINK_OUT_OF_DOCS = re.compile(r"\]\((?:\.\./|docs/)")


# ------------------------------------------------------------------------------------------- events
def on_config(config):
    """Adds the pages of the API and the measurements to the sections of the navigation that they
    belong to.
    """
    results = sorted(
        (path.relative_to(ROOT).as_posix() for path in RESULTS.glob("*.md")), reverse=True
    )
    sections = {title: pages for item in config.nav for title, pages in item.items()}
    sections["Reference"].append(
        {"Python API": [{name: f"api/{name}.md"} for name, _ in api_pages()]}
    )
    sections["Evidence"].append({"Dated measurements": results})
    return config


def on_files(files, config):
    """Adds the pages of the API, and what lies in the repository beside docs/."""
    for name, modules in api_pages():
        files.append(File.generated(config, f"api/{name}.md", content=api_text(name, modules)))
    pages = [ROOT / name for name in ROOT_PAGES]
    for path in [*pages, *RESULTS.parent.glob("*.md"), *RESULTS.iterdir(), RACE]:
        files.append(
            File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path))
        )
    return files


def on_page_markdown(markdown, page, **_):
    """Fills in tables; makes links that are right on the repository's own pages right
    on the site.
    """
    beginning = next(
        beginning for beginning in SEARCH_BOOST if page.file.src_uri.startswith(beginning)
    )
    page.meta["search"] = {"boost": SEARCH_BOOST[beginning]}
    for placeholder, table in TABLES.items():
        if placeholder in markdown:
            markdown = markdown.replace(placeholder, table())
    markdown = PUBLIC_NAME.sub(lambda line: line[0] + PUBLIC_OPTIONS, markdown)
    return LINK_OUT_OF_DOCS.sub("](", markdown) if "/" not in page.file.src_uri else markdown


# ------------------------------------------------------------------------------------------ the API
def api_pages() -> list[tuple[str, list[str]]]:
    """A page for each package, with the names of its modules; the modules at the top share the
    first page.
    """
    top = sorted(p for p in PACKAGE.glob("*.py") if not p.stem.startswith("__"))
    pages = [("diffussm_cli", [module_name(p) for p in top])]
    for folder in sorted(
        p.parent for p in PACKAGE.glob("*/__init__.py") if p.parent.name not in NOT_API
    ):
        pages.append((folder.name, [module_name(p) for p in sorted(folder.rglob("*.py"))]))
    return pages


def module_name(path: Path) -> str:
    """diffussm_cli/model/block.py as diffussm_cli.model.block, a package by its own name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def api_text(name: str, modules: list[str]) -> str:
    """The Markdown of a page of the API."""
    title = name if name == "diffussm_cli" else f"diffussm_cli.{name}"
    return f"# {title}\n\n" + "\n".join(
        f"## `{module}`\n\n::: {module}\n{members(module)}" for module in modules
    )


def members(module: str) -> str:
    """The option of mkdocstrings that leaves out of a package what it only passes on from its
    modules.
    """
    path = ROOT.joinpath(*module.split("."), "__init__.py")
    if not path.is_file():
        return ""
    own = [node.name for node in ast.parse(path.read_text("utf-8")).body if hasattr(node, "name")]
    return f"    options:\n      members: {own or 'false'}\n"


# --------------------------------------------------------------------------------------- the tables
def fields_table() -> str:
    """Every field of the configuration, section by section."""
    parts = []
    for section, cls in settings.SECTIONS.items():
        hints = typing.get_type_hints(cls)
        rows = [field_row(section, field, hints[field.name]) for field in dataclasses.fields(cls)]
        parts.append(
            f"## {section}\n\n{cls.__doc__}\n\n"
            f"{facts(('Field', 'Type', 'Default', 'Meaning'), rows)}"
        )
    return "\n\n".join(parts)


def field_row(section: str, field: dataclasses.Field, hint: typing.Any) -> tuple[str, ...]:
    """Name, type with bounds, default, help."""
    facts = dict(field.metadata)
    meaning, _ = facts.pop("help"), facts.pop("commas")
    kind = ", ".join([code(type_name(hint)), *limits(facts)])
    return f"`{section}.{field.name}`", kind, code(settings.shown(field.default)), meaning


def limits(bounds: dict[str, float]) -> list[str]:
    """Bounds in words: `1 to 1,000`, or `above 0` and `at most 10`."""
    words = {
        name: f"{value:,}" if isinstance(value, int) else f"{value:g}"
        for name, value in bounds.items()
    }
    if words.keys() == {"least", "most"}:
        return [f"{words['least']} to {words['most']}"]
    return [BOUNDS[name].format(value) for name, value in words.items()]


def type_name(hint: typing.Any) -> str:
    """A type as a person writes it: `int or str`, `ddpm or ddim`, `list of int`."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(map(str, options))
    if origin is tuple:
        return f"list of {type_name(options[0])}"
    if options:
        return " or ".join(type_name(option) for option in options)
    return "null" if hint is type(None) else hint.__name__


def presets_table() -> str:
    """Every preset: what it is, what it takes, and its file."""
    from diffussm_cli.profiling import cost

    rows, files = [], []
    for name in settings.preset_names():
        config = settings.load_config(name)
        c = cost(config)
        gflops = f"{c.gflops:,.0f}" if c.gflops > 10 else f"{c.gflops:.2g}"
        sizes = (f"{c.tokens:,}", f"{c.parameters:,}", gflops, f"{config.train.steps:,}")
        rows.append((f"[`{name}`](#{name})", f"`{config.data.path}`", *sizes))
        files.append(f"### {name}\n\n```yaml\n{settings.preset_text(name)}```")
    head = ("Preset", "Data", "Tokens", "Parameters", "Gflops", "Steps")
    return "\n\n".join([table(head, rows), "## The files", *files])


def commands_table() -> str:
    """Every command with its arguments and options."""
    parts = []
    for command in app.registered_commands:
        function = command.callback
        hints = typing.get_type_hints(function, include_extras=True)
        options = [p for p in inspect.signature(function).parameters.values() if p.name != "ctx"]
        rows = [option_row(p.name, hints[p.name], p.default) for p in options]
        head = ("Argument or option", "Values", "Default", "Meaning")
        name, text = (
            command.name or function.__name__,
            inspect.cleandoc(function.__doc__).replace("\b", ""),
        )
        parts.append(
            f"## {name}\n\n{text}\n\n"
            f"```text\n{inspect.cleandoc(EXAMPLES[name])}\n```\n\n{facts(head, rows)}"
        )
    return "\n\n".join(parts)


def option_row(name: str, hint: typing.Any, default: typing.Any) -> tuple[str, ...]:
    """Name, values, default, help of a parameter `name: Annotated[type, typer.Option(...)] =
    default`.
    """
    kind, info = typing.get_args(hint)
    values = type_name(kind).removesuffix(" or null")
    if isinstance(info, typer.models.ArgumentInfo):
        name = info.metavar or name.upper()
    else:
        values = info.metavar or values
        # Typer moves the first name there
        own = [info.default] if isinstance(info.default, str) else []
        name = ", ".join([*own, *info.param_decls] or [f"--{name.replace('_', '-')}"])
    bounds = {
        name: value
        for name, value in (("least", info.min), ("most", info.max))
        if value is not None
    }
    values = "" if kind is bool else ", ".join([code(values), *limits(bounds)])
    default = "" if default is None or default is False else code(settings.shown(default))
    return f"`{name}`", values, default, info.help


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def code(text: str) -> str:
    """A value as code, which a narrow column may break after a comma, a bar or a sign."""
    breakable = re.sub(r"([,|+=]|\.(?=[A-Z]))(?=\S)", r"\1<wbr>", html.escape(text, quote=False))
    return f"<code>{breakable.replace('|', '&#124;')}</code>"


def facts(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table of names with their meaning, which extra.css lays out as a list where the page is
    narrow.
    """
    return f'<div class="facts" markdown>\n\n{table(head, rows)}\n\n</div>'


TABLES = {
    "{{ fields }}": fields_table,
    "{{ presets }}": presets_table,
    "{{ commands }}": commands_table,
}
