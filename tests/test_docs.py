"""The site: built without a warning, from pages that say what the code says."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from llm.cli.main import build_parser

ROOT = Path(__file__).resolve().parent.parent
CELLS = runpy.run_path(str(ROOT / "docs/cells.py"))
PAGES = runpy.run_path(str(ROOT / "docs/reference_pages.py"))


def test_every_value_of_params_has_its_line_in_the_reference() -> None:
    page = PAGES["params_page"]()
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for key in PAGES["leaves"]({name: values for name, values in params.items() if name not in PAGES["TABLED"]}):
        line = re.search(rf"^\| `{re.escape(key)}` \| `[^`]+` \| (.*) \|$", page, re.MULTILINE)
        assert line and line[1], f"{key} has no comment in params.yaml"


def test_a_new_key_of_params_without_a_comment_is_found() -> None:
    assert PAGES["comments"]("model:\n  new_key: 1\n  other: 2 # words\n") == {
        "model": "",
        "model.new_key": "",
        "model.other": "words",
    }


def test_every_option_of_every_command_is_in_the_reference_with_words() -> None:
    page = PAGES["commands_page"]()
    for command in commands(build_parser()):
        assert f"## {command.prog.removeprefix('python -m llm ')}\n" in page
        for action in command._actions:
            assert action.help, f"{command.prog}: {action.dest} has no help"
            assert all(option in page for option in action.option_strings)


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from commands(command)
                if not any(isinstance(each, argparse._SubParsersAction) for each in command._actions):
                    yield command


BOOK = sorted((ROOT / "docs/book").glob("*.md"))


@pytest.mark.slow
@pytest.mark.parametrize("page", BOOK, ids=lambda page: page.stem)
def test_the_blocks_of_the_book_pages_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    text = page.read_text(encoding="utf-8")
    CELLS["run_page"](text, page.stem, tmp_path)
    assert page.stem == "index" or ("```python" in text and "## Exercises" in text)


def test_a_block_that_fails_is_named_and_one_that_is_skipped_says_why() -> None:
    with pytest.raises(ZeroDivisionError) as error:
        CELLS["run_page"]("```python\nx = 0\n```\ntext\n```python\n1 / x\n```\n", "page")
    assert error.traceback[-1].path == Path("page, block 2") or "page, block 2" in str(error.traceback[-1].path)
    shown = CELLS["run_page"]("<!-- skipped: it needs a model -->\n```python\n1 / 0\n```\n", "page")
    assert "Not run here: it needs a model" in shown
    assert CELLS["run_page"]("```python\nprint(6 * 7)\n```\n", "page").endswith("```\n\n```text\n42\n```\n")


def exercises(folder: str) -> dict[str, str]:
    """Return the outcome of each exercise's test, with the solutions of a folder."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rA",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "docs/book/exercises",
    ]
    environment = os.environ | {"LLM_SOLUTIONS": str(ROOT / folder), "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    found = re.findall(r"^(PASSED|FAILED) \S+::(\w+)", done.stdout, re.MULTILINE)
    return {name: outcome for outcome, name in found}


@pytest.mark.slow
def test_the_shipped_solutions_pass_and_the_empty_templates_fail() -> None:
    solved, empty = exercises("docs/book/solutions"), exercises("docs/book/exercises")
    assert len(solved) == 27 and set(solved.values()) == {"PASSED"}
    assert empty.keys() == solved.keys() and set(empty.values()) == {"FAILED"}


def test_every_exercise_of_a_page_has_a_template_and_a_solution() -> None:
    for page in BOOK:
        _, _, text = page.read_text(encoding="utf-8").partition("## Exercises")
        for name in re.findall(r"^\d\. `(\w+)\(", text, re.MULTILINE):
            for folder in ("exercises", "solutions"):
                assert f"def {name}(" in (page.parent / folder / f"{page.stem.replace('-', '_')}.py").read_text()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build: list[Any] = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", folder / "trees"]
    done = subprocess.run([*build, ROOT / "docs", folder / "html"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "html"


@pytest.mark.slow
def test_the_site_asks_no_other_host_for_anything(site: Path) -> None:
    for page in site.rglob("*.html"):
        found = re.findall(
            r"<(?:script|img|link|iframe|source)\b[^>]*?(?:src|href)=\"((?:https?:)?//[^\"]+)", page.read_text()
        )
        assert not found, f"{page.name}: {found}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import )[\"']?(?:https?:)?//", style.read_text()), style.name


@pytest.mark.slow
def test_the_site_can_be_searched(site: Path) -> None:
    assert (site / "search.html").exists()
    assert '"kv"' in (site / "searchindex.js").read_text() or "kv:" in (site / "searchindex.js").read_text()


@pytest.mark.slow
def test_the_site_works_in_a_browser_at_a_phones_width(site: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    handler = partial(QuietHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, playwright.sync_playwright() as running:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{address}/search.html?q=KV+cache")
        page.wait_for_selector("#search-results li", timeout=60_000)
        assert page.get_by_role("link", name="Chapter 4: the GPT, assembled").count()
        for name in ("index", "book/chapter-3", "reference/params", "benchmarks"):
            page.goto(f"{address}/{name}.html")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name} is wider than a phone"
        browser.close()
        server.shutdown()
    assert not [url for url in asked if not url.startswith(address)]


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Keep the test's output free of requests."""
