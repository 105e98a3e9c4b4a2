"""The app in a real browser: picked, asked, moved, and in trouble. Needs gradio, playwright and Chromium."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil

import pytest

from drum_hf import DemoRetriever, TransformersLVLM
from drum_hf.errors import EndpointError
from drum_hf.playground import make_world
from drum_hf.serving.app import build_app, launch, similarity

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
PATIENCE = 60_000  # milliseconds

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)"),
    pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}"),
]


class Switch:
    """The playground's LVLM, behind an endpoint that can go down."""

    def __init__(self) -> None:
        self.lvlm = TransformersLVLM.from_pretrained("playground/lvlm", device="cpu")
        self.fingerprint = self.lvlm.fingerprint
        self.down = False

    def generate(self, requests, *, max_new_tokens=32):
        if self.down:
            raise EndpointError("expected an answer of http://localhost:1/v1, got none; is the server up?")
        return self.lvlm.generate(requests, max_new_tokens=max_new_tokens)


@pytest.fixture(scope="module")
def served():
    world = make_world(0)
    retriever = DemoRetriever.from_encoder("playground/clip", support=world.support, device="cpu")
    lvlm = Switch()
    app = build_app(retriever, lvlm, second=similarity(retriever, "si"), examples=world.queries)
    yield launch(app, block=False), lvlm, world
    app.close()


@pytest.fixture
def page(served):
    from playwright.sync_api import sync_playwright

    url = served[0]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.set_default_timeout(PATIENCE)
        tab.outside = []
        tab.on("request", lambda request: tab.outside.append(request.url))
        tab.goto(url)
        tab.get_by_role("button", name="Ask").wait_for()
        yield tab
        strangers = [u for u in tab.outside if not u.startswith((url, "data:", "blob:"))]
        browser.close()
    assert strangers == []


def shown(tab, place: int, count: int):
    """The cards of a strategy, once there are `count`."""
    tab.wait_for_function(f"document.querySelectorAll('#strategy-{place} li').length == {count}")
    return tab.locator(f"#strategy-{place} li")


def test_a_visit(page, served):
    _, lvlm, world = served
    ask = page.get_by_role("button", name="Ask")
    error = page.locator("#error [role=alert]")

    ask.click()
    error.wait_for()
    assert "expected an image" in error.inner_text()

    page.locator("#examples button.thumbnail-item").nth(2).click()
    question = page.get_by_label("Question")
    page.wait_for_function("document.querySelector('textarea').value != ''")
    row = next(row for row in world.queries if row.prompt == question.input_value())
    assert row.id in world.queries and error.count() == 0

    ask.click()
    first, second = shown(page, 1, 4), shown(page, 2, 4)
    for cards in (first, second):
        scores = [float(re.search(r"score (-?[\d.]+)", text)[1]) for text in cards.all_inner_texts()]
        assert scores == sorted(scores, reverse=True)
    assert "Gold response" in page.locator("#zero-shot").inner_text()
    assert "SIT + draft: answer with 4" in page.locator("#strategy-1").inner_text()
    assert "SI: answer with 4" in page.locator("#strategy-2").inner_text()

    if where := os.environ.get("DRUM_APP_SCREENSHOT"):  # how docs/images/app.png is made
        page.screenshot(path=where, full_page=True)

    slider = page.locator("#shots input[type=range]")
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 1 / 15, box["y"] + box["height"] / 2)  # two shots
    shown(page, 1, 2)
    shown(page, 2, 2)
    assert "answer with 2" in page.locator("#strategy-2").inner_text()

    lvlm.down = True
    try:
        question.fill("where is the thing?")
        ask.click()
        error.wait_for()
        assert "expected an answer of http://localhost:1/v1" in error.inner_text()
        assert page.locator("#strategy-1 li").count() == 0
    finally:
        lvlm.down = False


def test_a_narrow_screen_holds_all_there_is(page):
    page.set_viewport_size({"width": 420, "height": 900})
    beyond = "[...document.querySelectorAll('#examples .thumbnail-item, input[type=range]')]"
    beyond += ".filter(part => part.getBoundingClientRect().right > innerWidth - 24).length"
    page.wait_for_function(f"{beyond} == 0")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_file_that_is_no_picture_is_told(page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    page.get_by_label("Question").fill("what colour?")
    with page.expect_response(lambda answer: "upload" in answer.url):
        page.locator("input[type=file]").first.set_input_files(str(broken))
    page.wait_for_function('document.querySelector(\'button[aria-label="Remove Image"], button[aria-label="Clear"]\')')
    page.get_by_role("button", name="Ask").click()
    error = page.locator("#error [role=alert]")
    error.wait_for()
    assert "expected an image, got broken.png" in error.inner_text()
