"""The page: its files, and what it does in a browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from llm.serving.app import PAGE
from tests.serving.conftest import Running

FILES = sorted(PAGE.iterdir())


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Running]:
    running = Running(place)
    yield running
    running.stop()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_page_asks_no_other_host_and_makes_no_html_from_text(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    hosts = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", text)) - {"http://www.w3.org/2000/svg"}
    assert not hosts
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        " style=",
        "onclick=",
    ):
        assert way not in text


def test_the_page_is_small() -> None:
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES) < 1200


def test_every_file_of_the_page_is_served(server: Running) -> None:
    for path in FILES:
        found = requests.get(f"{server.url}/page/{path.name}")
        assert found.status_code == 200 and found.content == path.read_bytes()
        assert "default-src 'self'" in found.headers["content-security-policy"]
    for path, title in (("/", "<title>textmill</title>"), ("/docs", "<title>textmill API</title>")):
        assert title in requests.get(server.url + path).text
    assert requests.get(f"{server.url}/page/../app.py").status_code == 404
    names = set(re.findall(r"[\"'](?:\./|/page/)([\w.]+)[\"']", "".join(path.read_text() for path in FILES)))
    assert names <= {path.name for path in FILES}


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    with playwright.sync_playwright() as running:
        found = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, server: Running) -> Iterator[Any]:
    """A page at a phone's width, which fails the test by an error of its own or a request to another host."""
    context = browser.new_context(viewport={"width": 390, "height": 844})
    shown = context.new_page()
    shown.set_default_timeout(10_000)
    errors: list[str] = []
    shown.on("pageerror", lambda error: errors.append(str(error)))
    shown.on("request", lambda request: request.url.startswith(server.url) or errors.append(request.url))
    shown.goto(server.url)
    shown.wait_for_selector("#chat-settings select", state="attached")
    yield shown
    assert not errors
    assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than a phone"
    context.close()


def idle(page: Any) -> None:
    page.wait_for_selector("#stop", state="hidden")


@pytest.mark.slow
def test_chat_by_keyboard_alone(page: Any) -> None:
    page.focus("#ask textarea")
    page.keyboard.type("<img src=x onerror=alert(1)> the cat")
    page.keyboard.press("Enter")
    page.wait_for_selector(".message.assistant .text:not(:empty)")
    idle(page)
    assert page.locator(".message.user .text").inner_text() == "<img src=x onerror=alert(1)> the cat"
    assert page.locator("#log img").count() == 0
    first = page.locator(".message.assistant .text").inner_text()
    page.get_by_role("button", name="Regenerate").press("Enter")
    page.wait_for_selector(".message.assistant .text:not(:empty)")
    idle(page)
    assert page.locator(".message.assistant .text").inner_text() == first  # greedy
    page.reload()
    page.wait_for_selector(".message.assistant")
    assert page.locator(".message.assistant .text").inner_text() == first, "the history is kept in the browser"
    page.get_by_role("button", name="Edit").press("Enter")
    assert page.locator(".message").count() == 0
    assert page.locator("#ask textarea").input_value().endswith("the cat")


@pytest.mark.slow
def test_stop_ends_an_answer(page: Any, server: Running) -> None:
    page.click("summary")
    engine = server.models.engines["instruct"]
    step = engine.step
    engine.step = lambda: (page_pause(), step())[0]  # type: ignore[method-assign]
    page.fill("#ask textarea", "the cat sat on")
    page.click("#send")
    page.wait_for_selector(".message.assistant .text:not(:empty)")
    page.click("#stop")
    idle(page)
    engine.step = step  # type: ignore[method-assign]
    assert page.locator("#problem").is_hidden()
    while engine.busy:
        page_pause()


def page_pause() -> None:
    import time

    time.sleep(0.03)


@pytest.mark.slow
def test_compare_classify_and_look_inside(page: Any) -> None:
    page.click("#tab-compare")
    page.fill("#versus textarea", "the cat")
    page.click("#versus button >> text=Compare")
    page.wait_for_selector("#left:not(:empty)")
    page.wait_for_selector("#right:not(:empty)")
    page.wait_for_selector("#versus-stop", state="hidden")
    page.keyboard.press("Home")
    page.focus("#tab-compare")
    page.keyboard.press("ArrowRight")
    assert page.locator("#tab-classify").get_attribute("aria-selected") == "true"
    page.fill("#label textarea", "you have <b>won</b> spam 😀 now")
    page.click("#label button")
    page.wait_for_selector("#labelled h2")
    assert page.locator("#labelled .words").inner_text() == "you have <b>won</b> spam 😀 now"
    assert page.locator("#labelled meter").count() == 2
    page.click("#tab-look")
    page.fill("#inspect textarea", "the cat sat on the mat")
    page.click("#inspect button")
    page.wait_for_selector("#inside .tokens button")
    page.locator("#inside .tokens button").nth(1).click()
    assert page.get_by_role("heading", name="Token 2").count() == 1
    assert "embedding" in page.locator("#inside").inner_text()


@pytest.mark.slow
def test_scripts_in_a_models_output_are_shown_as_text(page: Any) -> None:
    said = "<script>document.title = 1</script><img src=x onerror='document.title = 1'>"
    chunk = json.dumps({"choices": [{"index": 0, "delta": {"content": said}, "finish_reason": None}]})
    answer = {"content_type": "text/event-stream", "body": f"data: {chunk}\n\ndata: [DONE]\n\n"}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**answer))
    page.fill("#ask textarea", "the cat")
    page.click("#send")
    page.wait_for_selector(".message.assistant .text:not(:empty)")
    idle(page)
    assert page.locator(".message.assistant .text").inner_text() == said
    page.click("#tab-compare")
    page.fill("#versus textarea", "the cat")
    page.click("#versus button >> text=Compare")
    page.wait_for_selector("#left:not(:empty)")
    page.wait_for_selector("#versus-stop", state="hidden")
    assert page.locator("#left").inner_text() == said
    assert page.locator("#log img, #log script, #left img, #left script").count() == 0 and page.title() == "textmill"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(page: Any, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page.emulate_media(color_scheme=scheme)
    page.fill("#ask textarea", "the cat")
    page.click("#send")
    page.wait_for_selector(".message.assistant .text:not(:empty)")
    idle(page)
    for tab in ("chat", "compare", "classify", "look"):
        page.click(f"#tab-{tab}")
        if tab == "classify":
            page.fill("#label textarea", "you have won")
            page.click("#label button")
            page.wait_for_selector("#labelled h2")
        if tab == "look":
            page.fill("#inspect textarea", "the cat sat")
            page.click("#inspect button")
            page.wait_for_selector("#inside .tokens button")
        found = axe.run(page).response["violations"]
        assert not [each["id"] for each in found if each["impact"] in ("serious", "critical")], found


@pytest.mark.slow
def test_the_description_of_the_api_shows_every_path(page: Any, server: Running) -> None:
    page.goto(f"{server.url}/docs")
    page.wait_for_selector("#endpoints table")
    shown = page.locator("#endpoints").inner_text()
    paths = requests.get(f"{server.url}/openapi.json").json()["paths"]
    assert "/v1/chat/completions" in paths and all(path in shown for path in paths)
    page.goto(server.url)
