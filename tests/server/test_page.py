"""The page in a real browser: it chats, shows Markdown as elements, and completes with Tab."""

from __future__ import annotations

import os
import shutil

import pytest

from qwen_mlx import load
from tests.helpers.fim_model import save_fim_folder
from tests.helpers.running_server import serving

pytestmark = [pytest.mark.heavy, pytest.mark.browser]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
    return load(save_fim_folder(tmp_path_factory.mktemp("page") / "m", seed=3, max_position_embeddings=256))


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        with playwright.chromium.launch(executable_path=path, args=arguments) as browser:
            yield browser


@pytest.fixture
def page(browser, small):
    with serving(small) as service:
        page = browser.new_page()
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(service.url)
        page.wait_for_function("() => document.activeElement.id === 'input'")  # keys typed before are lost
        yield page
        page.close()
        assert not errors


MARKDOWN = """# Title

Some **bold** and `code` <img src=x onerror="alert(1)">

```python
def f():
    return "<b>"
```

1. one
2. two

| a | b |
|---|---|
| 1 | 2 |
"""


def test_markdown_is_elements_and_html_is_text(page):
    page.evaluate("text => markdown(show('assistant', ''), text)", MARKDOWN)
    message = page.locator(".message.assistant")
    assert message.locator("h3").inner_text() == "Title"
    assert message.locator("strong").inner_text() == "bold"
    assert message.locator("pre code").inner_text() == 'def f():\n    return "<b>"'
    assert message.locator("ol li").all_inner_texts() == ["one", "two"]
    assert message.locator("th").all_inner_texts() == ["a", "b"]
    assert message.locator("td").all_inner_texts() == ["1", "2"]
    assert message.locator("img").count() == 0
    assert "<img src=x" in message.inner_text()


def test_a_conversation_by_keyboard(page):
    page.keyboard.type("hello")
    page.keyboard.press("Enter")
    page.wait_for_function("() => !running && messages.length === 2")
    page.keyboard.type("hello again")
    page.keyboard.press("Enter")
    page.wait_for_function("() => !running && messages.length === 4")
    assert [m["role"] for m in page.evaluate("messages")] == ["user", "assistant"] * 2
    assert page.locator(".message.user").all_inner_texts() == ["hello", "hello again"]
    assert page.locator(".message.error").count() == 0


def test_clearing_while_an_answer_runs_begins_anew(page):
    page.keyboard.type("hello")
    page.keyboard.press("Enter")
    page.wait_for_selector(".message.assistant:not(:empty)")
    page.locator("#clear").click()
    page.wait_for_function("() => !running")
    assert page.evaluate("messages") == []
    assert page.locator(".message").count() == 0


def test_tab_completes_and_escape_leaves(page, small):
    page.locator("#tab-chat").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#code").is_visible()
    before, after = "hello\nhe", " hell\n"
    script = "([a, b]) => { code.value = a + b; code.focus(); code.setSelectionRange(a.length, a.length); }"
    page.evaluate(script, [before, after])
    page.keyboard.press("Tab")
    page.wait_for_function("() => !$('fill-status').textContent.startsWith('Completing')")
    proposed = page.evaluate("proposed")
    assert page.locator("#ghost").text_content() == before + proposed + after
    assert proposed
    page.keyboard.press("Tab")
    assert page.evaluate("code.value") == before + proposed + after
    page.keyboard.press("Escape")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") != "code"


def test_a_cursor_that_moves_drops_the_proposal_and_a_blank_line_is_indented_once(page):
    page.locator("#tab-edit").click()
    page.evaluate("code.value = 'hello\\n    \\nhell'; code.focus(); code.setSelectionRange(10, 10)")
    with page.expect_request("**/infill") as request:
        page.keyboard.press("Tab")
    assert (request.value.post_data_json["input_prefix"], request.value.post_data_json["prompt"]) == ("hello\n", "")
    page.wait_for_function("() => !$('fill-status').textContent.startsWith('Completing')")
    assert not page.evaluate("proposed.startsWith('    ')")
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("() => proposed === '' && !$('editor').classList.contains('proposing')")


def test_errors_of_the_server_are_shown(browser, small):
    with serving(small) as service:
        page = browser.new_page()
        page.goto(service.url)
        page.evaluate("messages = [{role: 'king', content: 'x'}]")
        page.locator("#input").fill("hello")
        page.keyboard.press("Enter")
        page.wait_for_selector(".message.error")
        assert "role is" in page.locator(".message.error").inner_text()
        page.close()


def test_both_themes_and_narrow_screens_fit(browser, small):
    with serving(small) as service:
        grounds = set()
        for scheme in ("light", "dark"):
            page = browser.new_page(color_scheme=scheme, viewport={"width": 360, "height": 640})
            page.goto(service.url)
            grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            assert page.evaluate("document.documentElement.scrollWidth") <= 360
            page.close()
        assert len(grounds) == 2
