"""The report as one HTML page: complete, safe, and without a request."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llm.reporting.page import MOST_ROWS, page

REPORT = """# What was found

Said first.

| task | GPT |
|---|---:|
| text | 0.3 |

![Losses, "over" steps](figures/loss.png)

## Labels & more

Words. ![gone](figures/gone.png) ![out](../secret.png)

![Confusion](figures/loss.png)

| a | b |
|---|---:|
| 1 | 2 |

### Deeper

```text
<b>shown</b>
```

<script>alert(1)</script>
"""
PIXELS = base64.b64encode(b"pixels").decode()


class Tags(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make the reports of a pipeline, with hostile texts."""
    (tmp_path / "reports/figures").mkdir(parents=True)
    (tmp_path / "reports/figures/loss.png").write_bytes(b"pixels")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "reports/report.md").write_text(REPORT)
    (tmp_path / "reports/data_card.md").write_text("# Data card\n\n## Corpus\n\n12 documents\n")
    (tmp_path / "constraints.txt").write_text("# exact\ntorch==2.13.0\nnumpy==2.4.0\n")
    rows = [
        {"text": "</script><img src=x onerror=alert(1)>\x1b", "label": "ham", "predicted": {"gpt": "ham"}},
        {"text": "b", "label": "ham", "predicted": {"gpt": "spam"}, "doubt": None},
    ]
    (tmp_path / "messages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def build(folder: Path) -> str:
    reports = folder / "reports"
    return page(
        reports / "report.md", reports / "data_card.md", folder / "constraints.txt", [folder / "messages.jsonl"]
    )


def test_page_has_the_verdict_the_pictures_and_every_section(folder: Path) -> None:
    text = build(folder)
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == ["Verdict", "Pictures", "Labels &amp; more", "Data", "Environment", "Predictions: messages"]
    assert re.findall(r'<a href="#(.*?)">', text) == re.findall(r'<section id="(.*?)">', text)
    sections = re.split("<section ", text)[1:]
    assert "Said first." in sections[0] and "<td>text</td>" in sections[0] and "<img" not in sections[0]
    assert sections[1].count(f'src="data:image/png;base64,{PIXELS}"') == 2
    assert re.findall(r"<figcaption>(.*?)</figcaption>", sections[1]) == [
        "Losses, &quot;over&quot; steps",
        "Confusion",
    ]
    assert "Words." in sections[2] and "<h3>Deeper</h3>" in sections[2] and "<img" not in sections[2]
    assert "12 documents" in sections[3] and "<td>torch</td><td>2.13.0</td>" in sections[4]
    assert text == build(folder), "the same results give the same bytes"


def test_a_section_that_the_report_gains_stands_on_the_page(folder: Path) -> None:
    report = folder / "reports/report.md"
    report.write_text(REPORT + "\n## New\n\n![Curve](figures/loss.png)\n\n| x | y |\n|---|---|\n| new cell | 1 |\n")
    text = build(folder)
    assert "<h2>New</h2>" in text and "new cell" in text and "<figcaption>Curve</figcaption>" in text


def test_page_asks_for_nothing_and_runs_no_foreign_script(folder: Path) -> None:
    text = build(folder)
    found = Tags(text)
    for tag, attributes in found.tags:
        assert tag not in ("link", "iframe", "object", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, attributes)
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                assert str(value).startswith(("data:image/png;base64,", "#")), (tag, value)
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert "secret" not in text and base64.b64encode(b"secret").decode() not in text
    assert "\x1b" not in text and "url(" not in text and "@import" not in text
    assert "<script>alert" not in text and "<b>shown" not in text and "<img src=x" not in text
    [policy] = [a["content"] for tag, a in found.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy).startswith("default-src 'none';") and "script-src 'sha256-" in str(policy)


def test_predictions_are_marked_and_bounded(folder: Path) -> None:
    text = build(folder)
    [part] = re.findall(r"<h2>Predictions: messages</h2>(.*?)</section>", text, re.DOTALL)
    assert re.findall(r"<th>(.*?)</th>", part) == ["GPT", "text", "label", "predicted gpt", "doubt"]
    assert re.findall(r"<tr><td>(\w+)</td>", part) == ["right", "wrong"]
    (folder / "messages.jsonl").write_text('{"text": "t"}\n' * (MOST_ROWS + 5))
    assert f"The first {MOST_ROWS:,} of {MOST_ROWS + 5:,}." in build(folder)
    (folder / "messages.jsonl").unlink()
    assert "Predictions" not in build(folder), "texts that may not be shown have no file here"


@pytest.mark.slow
def test_page_opens_from_disk_without_a_request_and_filters(folder: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    rows = "".join(f"| row {i} | {i} |\n" for i in range(12))
    (folder / "reports/report.md").write_text(f"{REPORT}\n| name | value |\n|---|---:|\n{rows}")
    (folder / "reports/figures/loss.png").write_bytes(
        base64.b64decode(
            "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
        )
    )
    (folder / "page.html").write_text(build(folder))
    for view in opened(sync_api, folder / "page.html"):
        assert view.locator("img").evaluate_all("images => images.every(image => image.naturalWidth > 0)")
        frame = view.locator(".scroll", has_text="row 11")
        view.get_by_label("Filter").first.fill("row 1")
        assert frame.locator("tbody tr:visible").all_inner_texts() == ["row 1\t1", "row 10\t10", "row 11\t11"]
        frame.get_by_role("button", name="value").click()
        frame.get_by_role("button", name="value").click()
        assert frame.locator("tbody tr:visible").first.inner_text() == "row 11\t11", "numbers sort as numbers"


def opened(sync_api: object, path: Path) -> Iterator[object]:
    """Yield the page in Chromium; fail for a request, an error or a width that a phone has to scroll."""
    if (chromium := shutil.which("chromium") or shutil.which("google-chrome")) is None:
        pytest.skip("no Chromium here")
    with sync_api.sync_playwright() as playwright:  # type: ignore[attr-defined]
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 390, "height": 800})
        problems: list[str] = []
        view.on("request", lambda request: problems.append(request.url))
        view.on("console", lambda message: problems.append(message.text))
        view.on("pageerror", lambda error: problems.append(str(error)))
        view.goto(path.as_uri())
        yield view
        assert view.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert [p for p in problems if not p.startswith("data:")] == [path.as_uri()]
        browser.close()
