"""The documentation as a site: built without a warning, complete without a network, and found by
its search.
"""

import contextlib
import functools
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("site")]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def served(folder):
    """The address of a server of the files in a folder."""
    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The address of the site; a warning of the build is an error."""
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    pytest.importorskip("material", reason="needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert "requires either Black or Ruff" not in done.stderr
    with served(folder) as address:
        yield address


@pytest.fixture(scope="module")
def shared_tab(tmp_path_factory):
    from tests.browser import CHROMIUM, browser

    if CHROMIUM is None:
        pytest.skip("no Chromium found (Debian: apt-get install chromium)")
    with browser(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture
def tab(site, shared_tab):
    """The tab of the browser; what a page asked for and complained of is checked after its test."""
    shared_tab.requests.clear()
    shared_tab.problems.clear()
    yield shared_tab
    assert {url.split("/")[2] for url in shared_tab.requests if url.startswith("http")} == {
        site.split("/")[2]
    }
    assert shared_tab.problems == []


def pages_found(tab, words):
    """The pages that the search box of the open page gives, best first."""
    box = "document.querySelector('.md-search__input')"
    tab.ask(
        f"{box}.focus(); {box}.value = {json.dumps(words)}; {box}.dispatchEvent(new Event('keyup'))"
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        paths = tab.ask(
            "[...document.querySelectorAll('.md-search-result__item > a')].map(a => a.pathname)"
        )
        if paths:
            return list(dict.fromkeys(paths))
        time.sleep(0.1)
    raise AssertionError(f"no answer to {words!r} in a minute")


@pytest.mark.parametrize("page", ["", "library/"])
def test_figure_and_search_need_no_network(page, site, tab):
    """`tab` sees that no other host is asked for anything."""
    tab.open(site + page)
    assert tab.ask("[...document.images].filter(i => i.src.endsWith('/block.svg')).length") == 1
    assert tab.ask("[...document.images].every(i => i.naturalWidth > 0)")
    assert "/training/" in pages_found(tab, "slurm")


@pytest.mark.parametrize(
    ("words", "page"),
    [
        ("train on my own images", "/get-started/"),
        ("prompt", "/text/"),
        ("checkpoint", "/formats/"),
        ("fid", "/evaluation/"),
        ("slurm", "/training/"),
        ("load_config", "/library/"),
    ],
)
def test_guides_rank_first_in_search(words, page, site, tab):
    tab.open(site)
    assert pages_found(tab, words)[0] == page


WIDE = """
    [...document.querySelectorAll('.md-typeset__scrollwrap')]
        .filter(t => t.scrollWidth > t.clientWidth + 20)
"""


def test_wide_table_of_a_study_fits_a_screen_and_keeps_its_names_on_a_telephone(site, tab):
    tab.open(site + "results/emoji-text/")
    assert tab.ask(f"{WIDE}.length") == 0
    tab.open(site + "results/emoji-text/", width=390)
    assert tab.ask(f"{WIDE}.length") == 1
    assert tab.ask(f"{WIDE}[0].scrollLeft = 300; {WIDE}[0].scrollLeft") == 300
    left = "getBoundingClientRect().left"
    assert tab.ask(f"{WIDE}[0].querySelector('tbody td').{left}") == 0
    assert tab.ask(f"{WIDE}[0].querySelector('tbody td:nth-child(2)').{left}") < 0


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("page", ["", "get-started/", "commands/", "configuration/", "interface/"])
def test_pages_fit_their_width(page, width, site, tab):
    tab.open(site + page, width=width)
    assert tab.ask("document.documentElement.scrollWidth") == width
    if page in ("commands/", "configuration/"):
        tables = "[...document.querySelectorAll('.md-typeset__scrollwrap')]"
        assert tab.ask(f"{tables}.length") > 4
        assert tab.ask(f"{tables}.filter(t => t.scrollWidth > t.clientWidth).length") == 0
