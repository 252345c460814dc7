"""The page to chat at, in a browser."""

import json
import shutil
import time
from dataclasses import replace

import pytest

from convai_fast.generation.engine import GenerationEngine
from convai_fast.generation.params import SamplingParams
from convai_fast.generation.request import Request
from convai_fast.serving.app import Settings
from tests.helpers.http_server import serving, wait_until

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PARAMS = SamplingParams(max_length=12, min_length=4, temperature=1.5)
SETTINGS = Settings(model="mine", params=PARAMS, max_history=2)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    context = browser.new_context()
    page = context.new_page()
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda line: line.type == "error" and page.problems.append(line.text))
    yield page
    context.close()


@pytest.fixture
def engine(model, tokenizer):
    return GenerationEngine(model, tokenizer)


def turns(page):
    return page.locator("#turns > li > span").all_inner_texts()


def wait_until_answered(page):
    page.wait_for_selector("#stop:disabled", timeout=20_000)


def shown(text):
    """As a browser shows it: control characters are not, and spaces are one."""
    return " ".join("".join(c for c in text if c.isprintable() or c.isspace()).split())


def test_a_conversation_is_typed_answered_retried_and_copied(page, engine, model, tokenizer):
    alone = GenerationEngine(model, tokenizer)

    def reply(history, seed):
        request = Request(
            persona=["i like tea ."], history=history, params=replace(PARAMS, seed=seed)
        )
        return alone.generate([request])[0][0].text

    with serving(engine, SETTINGS) as url:
        page.goto(url)
        page.wait_for_selector("h1:text('mine')")
        page.get_by_label("Persona of the model").fill("i like tea .")
        page.get_by_label("Your turn").fill("hello")
        page.keyboard.press("Enter")
        wait_until_answered(page)
        first = reply(["hello"], 1)
        assert [shown(turn) for turn in turns(page)] == ["hello", shown(first)]
        page.get_by_role("button", name="Retry").click()
        wait_until_answered(page)
        second = reply(["hello"], 2)
        assert [shown(turn) for turn in turns(page)] == ["hello", shown(second)]
        page.get_by_label("Your turn").fill("and you ?")
        page.get_by_role("button", name="Send").click()
        wait_until_answered(page)
        assert shown(turns(page)[-1]) == shown(reply(["hello", second, "and you ?"], 2))
        page.evaluate(
            "navigator.clipboard ??= {}; navigator.clipboard.writeText = (t) => { copied = t; };"
            "var copied"
        )
        page.get_by_role("button", name="Copy as JSON").click()
        body = json.loads(page.evaluate("copied"))
        assert body["messages"][0] == {"role": "system", "content": "i like tea ."}
        assert [m["role"] for m in body["messages"][1:]] == ["user", "assistant", "user"]
        assert body["seed"] == 2 and body["stream"] is True
        assert page.problems == []


def test_drafts_are_shown_with_their_scores_and_one_can_be_picked(page, engine):
    with serving(engine, SETTINGS) as url:
        page.goto(url)
        page.get_by_label("Best of").fill("5")
        page.get_by_label("Your turn").fill("hello")
        page.keyboard.press("Enter")
        wait_until_answered(page)
        page.get_by_text("5 drafts, the best first").click()
        drafts = page.locator("#turns details li")
        assert drafts.count() == 5
        scores = [float(text.split()[-1]) for text in drafts.all_inner_texts()]
        assert scores == sorted(scores, reverse=True)
        third = drafts.nth(2).get_by_role("button")
        text = third.inner_text()
        third.click()
        assert turns(page)[-1] == text
        assert page.problems == []


def test_a_reply_is_stopped_by_escape_and_what_there_is_of_it_stays(page, engine, monkeypatch):
    forward = engine._backend.forward
    monkeypatch.setattr(
        engine._backend, "forward", lambda step: (time.sleep(0.05), forward(step))[1]
    )
    params = replace(PARAMS, max_length=60, min_length=60)
    with serving(engine, replace(SETTINGS, params=params)) as url:
        page.goto(url)
        page.get_by_label("Your turn").fill("hello")
        page.keyboard.press("Enter")
        page.wait_for_selector("#turns .writing")
        wait_until(lambda: len(turns(page)[1]) > 5)
        assert page.get_by_role("button", name="Send").is_disabled()
        page.keyboard.press("Escape")
        wait_until_answered(page)
        assert len(turns(page)) == 2 and turns(page)[1]
        wait_until(lambda: engine.load.running == 0)
        page.get_by_role("button", name="Retry").click()
        wait_until(lambda: len(turns(page)) == 2 and len(turns(page)[1]) > 5)
        page.get_by_role("button", name="New").click()
        wait_until_answered(page)
        assert turns(page) == [] and page.evaluate("history") == []  # nothing comes after it


def test_a_page_streams_one_reply_whatever_the_server_draws_by_default(page, engine):
    params = replace(PARAMS, n=2, best_of=3)
    with serving(engine, replace(SETTINGS, params=params)) as url:
        page.goto(url)
        page.get_by_label("Your turn").fill("hello")
        page.keyboard.press("Enter")
        wait_until_answered(page)
        assert len(turns(page)) == 2 and page.problems == []


def test_errors_are_told_and_the_question_can_be_asked_again(page, engine):
    with serving(engine, replace(SETTINGS, api_key="s3cret")) as url:
        page.goto(url)
        page.wait_for_selector("#key_row:not([hidden])")
        page.get_by_label("Your turn").fill("hello")
        page.keyboard.press("Enter")
        wait_until_answered(page)
        assert "asks for a key" in page.get_by_role("alert").inner_text()
        page.get_by_label("Key of the server").fill("s3cret")
        page.get_by_role("button", name="Retry").click()
        wait_until_answered(page)
        assert len(turns(page)) == 2 and page.get_by_role("alert").inner_text() == ""
    page.get_by_label("Your turn").fill("are you there ?")
    page.keyboard.press("Enter")
    wait_until_answered(page)
    assert page.get_by_role("alert").inner_text() == "the server cannot be reached"
    assert len(turns(page)) == 3
