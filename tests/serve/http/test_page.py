"""The chat page in a browser: send, stream, stop, regenerate, settings, and who can use it.

Needs chromium and playwright: ``apt-get install chromium``, ``pip install playwright``, then
``pytest -m browser``.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mixtral_jax.serve.routes.status import PAGE
from tests.serve.http.fake import FakeEngine
from tests.serve.http.live import serving, wait_until
from tests.test_tokenizer import V1

LONG = "word " * 200


def test_the_page_names_no_other_address_and_fits_the_rules():
    text = PAGE.read_text(encoding="utf-8")
    assert "http://" not in text
    assert "https://" not in text
    assert "innerHTML" not in text
    assert len(text.splitlines()) <= 400
    assert text.count("<script>") == 1


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    # By its name: only these tests need it.
    sync_playwright = importlib.import_module("playwright.sync_api").sync_playwright
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    assert chromium, "chromium is missing: apt-get install chromium"
    with sync_playwright() as play:
        made = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(V1, max_total_tokens=4096)


@pytest.fixture
def page(browser: Any, engine: FakeEngine) -> Iterator[Any]:
    with serving(engine) as port:
        made = browser.new_page()
        faults: list[str] = []
        made.on("pageerror", lambda error: faults.append(str(error)))
        made.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
        made.goto(f"http://127.0.0.1:{port}/")
        made.get_by_role("heading", name="fake").wait_for()
        yield made
        made.close()
        assert faults == []


def send(page: Any, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def last_answer(page: Any) -> str:
    return page.locator("article.assistant p").last.inner_text()


def is_idle(page: Any) -> bool:
    return page.get_by_role("button", name="Send").is_visible()


@pytest.mark.browser
def test_an_answer_streams_and_tells_its_speed_and_experts(page, engine):
    engine.say("Hello there, how are you", delay=0.1)
    send(page, "Hi")
    page.locator("article.assistant p", has_text="Hello").wait_for()
    assert not is_idle(page)  # shown before it is whole
    page.get_by_role("button", name="Send").wait_for()
    assert last_answer(page) == "Hello there, how are you"
    assert "tokens/s" in page.locator("#speed").inner_text()
    load = page.get_by_role("img", name="Expert load")
    load.wait_for()
    assert load.get_attribute("aria-label") == "Expert load. 0: 25 %, 1: 25 %, 2: 25 %, 3: 25 %"
    assert page.get_by_role("status").inner_text() == "Answer complete"


@pytest.mark.browser
@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_keeps_what_came_and_frees_the_slot(page, engine, how):
    engine.say(LONG, delay=0.02)
    send(page, "Hi")
    page.locator("article.assistant p", has_text="word word").wait_for()
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    page.get_by_role("button", name="Send").wait_for()
    assert 0 < len(last_answer(page)) < len(LONG.strip())
    wait_until(lambda: not engine.running, seconds=2)
    assert engine.tickets[-1].is_cancelled


@pytest.mark.browser
def test_regenerate_asks_the_same_again(page, engine):
    engine.say("first")
    send(page, "Hi")
    page.locator("article.assistant p", has_text="first").wait_for()
    page.get_by_role("button", name="Send").wait_for()
    engine.say("second")
    page.get_by_role("button", name="Regenerate").click()
    page.locator("article.assistant p", has_text="second").wait_for()
    assert page.locator("article.assistant").count() == 1
    one, two = (ticket.request.prompt_ids for ticket in engine.tickets)
    assert one == two


@pytest.mark.browser
def test_a_conversation_goes_on_and_begins_anew(page, engine):
    engine.say("fine")
    for text in ("one", "two"):
        send(page, text)
        page.get_by_role("button", name="Send").wait_for()
        page.locator("article.user", has_text=text).wait_for()
        page.wait_for_function("() => !document.querySelector('[aria-busy=true]')")
    prompt = V1.decode(engine.tickets[-1].request.prompt_ids)
    assert "one" in prompt
    assert "fine" in prompt
    page.get_by_role("button", name="New").click()
    assert page.locator("article").count() == 0
    send(page, "three")
    page.locator("article.assistant p", has_text="fine").wait_for()
    assert "one" not in V1.decode(engine.tickets[-1].request.prompt_ids)


@pytest.mark.browser
def test_settings_reach_the_engine_and_are_kept(page, engine):
    engine.say("ok")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief")
    page.get_by_label("Temperature").fill("0.25")
    page.get_by_label("Longest answer").fill("7")
    page.get_by_label("Seed").fill("42")
    page.get_by_label("Colours").select_option("dark")
    page.keyboard.press("Escape")
    page.reload()
    page.get_by_role("heading", name="fake").wait_for()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    send(page, "Hi")
    page.locator("article.assistant p", has_text="ok").wait_for()
    asked = engine.tickets[-1].request
    assert (asked.sampling.temperature, asked.sampling.seed) == (0.25, 42)
    assert asked.sampling.max_new_tokens == 7
    assert "Be brief" in V1.decode(asked.prompt_ids)


@pytest.mark.browser
def test_what_goes_wrong_is_said_and_can_be_tried_again(page, engine):
    engine.say("never", fails_after=1)
    send(page, "Hi")
    page.get_by_role("alert").get_by_text("scripted: generation").wait_for()
    engine.say("better")
    page.get_by_role("button", name="Regenerate").click()
    page.locator("article.assistant p", has_text="better").wait_for()
    assert page.get_by_role("alert").inner_text() == ""


@pytest.mark.browser
def test_markup_in_answers_stays_text(page, engine):
    engine.say("<img src=x onerror=alert(1)><b>bold</b>")
    send(page, "<script>alert(2)</script>")
    page.get_by_role("button", name="Send").wait_for()
    page.locator("article.assistant p", has_text="<b>bold</b>").wait_for()
    assert page.locator("article img, article b, article script").count() == 0


@pytest.mark.browser
def test_a_server_with_a_key_asks_for_it(browser, engine):
    engine.say("ok")
    with serving(engine, keys=(b"k",)) as port:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}/")
        page.get_by_label("API key").wait_for()
        assert page.evaluate("document.activeElement.name") == "key"
        page.get_by_label("API key").fill("k")
        page.get_by_role("button", name="Done").click()
        page.get_by_role("heading", name="fake").wait_for()
        send(page, "Hi")
        page.locator("article.assistant p", has_text="ok").wait_for()
        page.close()


@pytest.mark.browser
def test_the_keyboard_reaches_everything_and_everything_has_a_name(page):
    names = []
    page.get_by_label("Message").focus()
    for _ in range(8):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.innerText"))
    assert {"Send", "New", "Settings"} <= set(names)
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('button, input, textarea, select')].filter(
            (e) => !e.innerText.trim() && !e.labels?.length && !e.ariaLabel).length"""
    )
    assert unnamed == 0


@pytest.mark.browser
@pytest.mark.parametrize(
    ("name", "width", "height", "scheme"),
    [("wide", 1200, 800, "light"), ("phone", 360, 640, "light"), ("dark", 1200, 800, "dark")],
)
def test_it_fits(browser, engine, name, width, height, scheme, tmp_path):
    """Nothing is wider than the window, buttons can be hit with a thumb, contrast is enough."""
    engine.say(
        "A layer with several feed-forward parts, the experts, and a router that gives each token "
        "to two of them: many weights to know things with, few of them to compute with.",
        delay=0.01,
    )
    with serving(engine) as port:
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.goto(f"http://127.0.0.1:{port}/")
        page.get_by_role("heading", name="fake").wait_for()
        send(page, "What is a mixture of experts?")
        page.get_by_role("button", name="Send").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for button in page.get_by_role("button").all():
            box = button.bounding_box()
            assert box["height"] >= 44
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
        contrasts = page.evaluate(CONTRASTS)
        assert min(contrasts) >= 4.5, contrasts
        # MIXTRAL_JAX_SCREENSHOTS=docs makes those of the documentation.
        file = Path(os.environ.get("MIXTRAL_JAX_SCREENSHOTS") or tmp_path) / f"chat-{name}.png"
        page.screenshot(path=file)
        page.close()
    assert file.stat().st_size > 5_000


# WCAG's contrast of each text with the first ground behind it that is not transparent.
CONTRASTS = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const color = rgb(getComputedStyle(e).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll('h1, h2, p, button, span, textarea')]
    .filter((e) => e.offsetParent && !e.disabled && (e.innerText || e.value))
    .map((e) => {
      const [a, b] = [light(rgb(getComputedStyle(e).color)), light(ground(e))];
      return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    });
}"""
