"""The chat page in a real browser, before the real app on a real socket."""

import json
from collections.abc import Iterator

import httpx
import pytest
from playwright.sync_api import Browser, Page, Route, expect

from inputs import smollm2_gguf
from serve.browsing import chromium, opened, send, wait_for_answer
from serve.scripted import SCRIPTS, ScriptedAnswers, ended, said, text
from serve.servers import running_server

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
# WCAG 2.2, 1.4.3: of text to what is behind it.
LEAST_CONTRAST = 4.5

HAS_ROOM = "document.documentElement.scrollWidth <= innerWidth && scroller.scrollWidth <= scroller.clientWidth"
UNNAMED = """() => [...document.querySelectorAll('button, input, textarea, select, [role=group], dialog, nav, ol')]
  .filter((e) => !(e.ariaLabel || e.labels?.length || (e.matches('button') && e.textContent.trim()) ||
                   document.getElementById(e.getAttribute('aria-labelledby'))))
  .filter((e) => !e.closest('.answer') || e.matches('button, [role=group]')).map((e) => e.outerHTML)"""
FAINT = """(least) => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => parts(colour).slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    const colour = getComputedStyle(e).backgroundColor;
    return (parts(colour)[3] ?? 1) > 0 ? colour : behind(e.parentElement);
  };
  return [...document.querySelectorAll('body *')].filter((e) => e.checkVisibility() && !e.closest('svg, .unseen'))
    .filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || e.placeholder)
    .map((e) => {
      const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
      return [e.outerHTML.slice(0, 90), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
    }).filter(([, ratio]) => ratio < least);
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def scripted(*script: object) -> ScriptedAnswers:
    answers = ScriptedAnswers(*script)
    answers.longest = 4096  # what /v1/models says of it
    return answers


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """The page of a server that answers each message with "Hello you"."""
    with running_server(scripted(*SCRIPTS["text"])) as url, opened(browser, url) as page:
        yield page


def answers_of(page: Page) -> list[str]:
    return page.locator(".reply > .answer").all_inner_texts()


def questions_of(page: Page) -> list[str]:
    return page.locator(".question .said").all_inner_texts()


def fail_once(page: Page, status: int, body: str) -> None:
    def refuse(route: Route) -> None:
        route.fulfill(status=status, body=body, content_type="application/json")

    page.route("**/v1/chat/completions", refuse, times=1)


def test_a_real_model_answers_and_a_reload_keeps_the_conversation(browser):
    question = "Tell me about Paris."  # long enough an answer to have a rate
    with running_server(smollm2_gguf()) as url, opened(browser, url) as page:
        page.get_by_role("button", name="Settings", exact=True).click()
        page.get_by_label("System prompt").fill("Be brief.")
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Longest answer").fill("160")
        page.keyboard.press("Escape")
        with page.expect_request("**/v1/chat/completions") as asked:
            send(page, question)
        body = asked.value.post_data_json
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
        assert (body["temperature"], body["max_tokens"], body["stream"]) == (0, 160, True)
        wait_for_answer(page)
        (first,) = answers_of(page)
        assert "Paris" in first
        expect(page.locator(".reply .numbers")).to_contain_text("tokens/s")
        page.get_by_role("button", name="Regenerate").click()
        wait_for_answer(page)
        assert answers_of(page) == [first]
        expect(page.get_by_role("group", name="Versions")).to_contain_text("2/2")
        page.reload()
        assert answers_of(page) == [first]
        expect(page.get_by_role("heading", level=1)).to_have_text(question)


def test_the_empty_page_says_what_it_is_and_an_example_begins_a_conversation(page):
    expect(page.get_by_role("heading", name="Your model, on your machine.")).to_be_visible()
    expect(page.locator("#empty-model")).to_have_text("scripted")
    page.locator("#examples button").first.click()
    expect(page.locator(".reply > .answer")).to_have_text("Hello you")
    assert len(questions_of(page)) == 1


def test_an_answer_is_shown_while_it_is_written_and_stopped_at_once(browser):
    answers = scripted(said(text("Hel")), None)
    with running_server(answers) as url, opened(browser, url) as page:
        send(page, "Hello?")
        expect(page.locator(".reply > .answer")).to_have_text("Hel")
        assert not answers.closed.is_set()
        page.get_by_role("button", name="Stop the answer").click()
        assert answers.closed.wait(30), "the server still writes"
        expect(page.locator(".reply .numbers")).to_contain_text("stopped")
        assert answers_of(page) == ["Hel"]


def test_two_answers_are_written_at_once_in_two_conversations(browser):
    answers = scripted(said(text("Hel")), None)
    with running_server(answers) as url, opened(browser, url) as page:
        for number in ("one", "two"):
            page.get_by_role("button", name="New conversation").click()
            send(page, number)
            expect(page.locator(".reply > .answer")).to_have_text("Hel")
        page.get_by_role("button", name="one", exact=True).click()
        expect(page.get_by_role("button", name="Stop the answer")).to_be_visible()
        assert questions_of(page) == ["one"]


def test_an_edited_message_goes_on_from_there_and_the_old_way_is_kept(page):
    for words in ("one", "two"):
        send(page, words)
        wait_for_answer(page)
    page.get_by_role("button", name="Edit your message").first.click()
    page.get_by_label("Your message", exact=True).fill("three")
    with page.expect_request("**/v1/chat/completions") as asked:
        page.keyboard.press("Enter")
    assert asked.value.post_data_json["messages"] == [{"role": "user", "content": "three"}]
    wait_for_answer(page)
    assert questions_of(page) == ["three"]
    page.get_by_role("button", name="Earlier version").click()
    assert questions_of(page) == ["one", "two"]
    assert answers_of(page) == ["Hello you", "Hello you"]


@pytest.mark.parametrize(
    ("status", "body", "shown"),
    [
        (503, '{"error": {"message": "the server is about to stop"}}', "The server is about to stop"),
        (502, "<html>Bad gateway</html>", "The server answered with status 502."),
        (200, 'data: {"error": {"message": "out of\\nmemory"}}\n\n', "Out of memory"),
        (200, 'data: {"choices": [{"delta": {"content": "H"}}]}\n\n', "The connection ended before the answer did."),
        (200, "data: {\n\n", "The server sent something that is not an answer."),
    ],
    ids=["refused", "by a proxy", "in the stream", "cut", "garbled"],
)
def test_a_failure_is_one_line_with_a_way_to_try_again(page, status, body, shown):
    fail_once(page, status, body)
    send(page, "Hello?")
    expect(page.locator(".failure span")).to_have_text(shown)
    page.reload()
    assert questions_of(page) == ["Hello?"]
    page.get_by_role("button", name="Try again").click()
    wait_for_answer(page)
    assert answers_of(page) == ["Hello you"]
    expect(page.locator(".failure")).to_have_count(0)


def test_a_server_that_is_gone_is_said_to_be_and_nothing_written_is_lost(page):
    page.route("**/v1/chat/completions", lambda route: route.abort())
    send(page, "Hello?")
    expect(page.locator(".failure")).to_contain_text("The server cannot be reached.")
    page.get_by_label("Message", exact=True).fill("half a thou")
    page.reload()
    assert questions_of(page) == ["Hello?"]
    expect(page.get_by_label("Message", exact=True)).to_have_value("half a thou")


def test_a_key_is_asked_for_sent_and_forgotten_with_the_tab(page):
    def guard(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer fh-right":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": {"message": "no key"}})

    page.route("**/v1/**", guard)
    page.reload()
    for key in ("fh-wrong", "fh-right"):
        page.get_by_label("Key", exact=True).fill(key)
        page.get_by_role("button", name="Use this key").click()
    expect(page.locator("#model-name")).to_have_text("scripted")
    send(page, "Hello?")
    wait_for_answer(page)
    assert answers_of(page) == ["Hello you"]
    assert "fh-right" in page.evaluate("JSON.stringify(sessionStorage)")
    assert "fh-" not in page.evaluate("JSON.stringify(localStorage)")


def test_without_a_key_the_message_stays_and_can_be_sent_again(page):
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=401, json={}))
    send(page, "Hello?")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".failure")).to_contain_text("only with an API key")
    expect(page.get_by_role("button", name="Try again")).to_be_visible()


def test_reasoning_and_calls_are_folded(browser):
    with running_server(scripted(*SCRIPTS["calls"])) as url, opened(browser, url) as page:
        send(page, "Weather?")
        wait_for_answer(page)
        expect(page.locator(".thought .fold-body")).to_be_hidden()
        page.locator(".thought summary").click()
        expect(page.locator(".thought .fold-body")).to_have_text("Two.")
        expect(page.locator(".calls summary").first).to_have_text("Calls weather")
        page.locator(".calls summary").first.click()
        assert json.loads(page.locator(".calls pre").first.inner_text()) == {"city": "Graz"}


def test_conversations_are_listed_renamed_and_deleted(page):
    send(page, "one")
    wait_for_answer(page)
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#empty")).to_be_visible()
    send(page, "two")
    wait_for_answer(page)
    names = page.locator("#conversations .row")
    assert names.all_inner_texts() == ["two", "one"]
    names.last.hover()
    page.get_by_role("button", name="Rename one").click()
    page.get_by_label("Name of the conversation").fill("first")
    page.keyboard.press("Enter")
    assert names.all_inner_texts() == ["two", "first"]
    assert questions_of(page) == ["two"]
    names.first.hover()
    page.get_by_role("button", name="Delete two").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(page.locator("#empty")).to_be_visible()
    page.reload()
    assert names.all_inner_texts() == ["first"]
    names.first.click()
    assert questions_of(page) == ["one"]
    page.go_back()
    expect(page.locator("#empty")).to_be_visible()


def test_a_full_storage_is_said_and_the_conversation_goes_on(page):
    page.evaluate("""() => { for (let size = 1 << 22; size >= 1; size >>= 1)
        try { for (let n = 0; ; n += 1) localStorage.setItem(`x${size}.${n}`, 'x'.repeat(size)); } catch {} }""")
    send(page, "Hello?")
    wait_for_answer(page)
    expect(page.locator("#notice")).to_contain_text("The browser keeps no more")
    assert answers_of(page) == ["Hello you"]
    page.evaluate(
        "() => { for (const key of Object.keys(localStorage)) if (key[0] === 'x') delete localStorage[key]; }"
    )
    send(page, "Still there?")
    wait_for_answer(page)
    expect(page.locator("#notice")).to_be_hidden()
    page.reload()
    assert questions_of(page) == ["Hello?", "Still there?"]


def test_the_keyboard_is_enough(browser):
    answers = scripted(said(text("Hel")), None)
    with running_server(answers) as url, opened(browser, url) as page:
        page.keyboard.type("one")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("two")
        page.keyboard.press("Enter")
        expect(page.locator(".reply > .answer")).to_have_text("Hel")
        assert questions_of(page) == ["one\ntwo"]
        page.keyboard.press("Escape")
        expect(page.locator("#said")).to_have_text("The answer was stopped.")
        for name in ("Regenerate", "Copy the answer", "Edit your message"):
            page.keyboard.press("Shift+Tab")
            expect(page.get_by_role("button", name=name)).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.get_by_label("Your message", exact=True)).to_be_focused()
        page.keyboard.press("Escape")
        expect(page.get_by_role("button", name="Edit your message")).to_be_focused()


def test_screen_readers_hear_an_answer_once_and_whole(page):
    page.evaluate("""() => { globalThis.heard = []; new MutationObserver(() => heard.push(said.textContent))
        .observe(said, { childList: true, characterData: true, subtree: true }); }""")
    send(page, "Hello?")
    wait_for_answer(page)
    assert page.evaluate("heard") == ["The model is writing.", "Answer: Hello you"]


def test_copy_puts_the_answer_as_it_was_written_on_the_clipboard(browser):
    with running_server(scripted(ended(text("*one*\n\n```py\nx = 1\n```\n")))) as url, opened(browser, url) as page:
        send(page, "Hello?")
        wait_for_answer(page)
        for button, copied in (("Copy the answer", "*one*\n\n```py\nx = 1\n```\n"), ("Copy the code", "x = 1")):
            page.get_by_role("button", name=button).click()
            expect(page.get_by_text("Copied").first).to_be_visible()
            assert page.evaluate("navigator.clipboard.readText()") == copied


def test_a_phone_shows_all_of_it_without_scrolling_sideways(browser):
    long = "a" * 300 + "\n\n```\n" + "b" * 300 + "\n```\n\n|" + "c |" * 30 + "\n|" + "-|" * 30
    with running_server(scripted(ended(text(long)))) as url, opened(browser, url, **PHONE) as page:
        assert page.evaluate(HAS_ROOM)
        send(page, "d" * 300)
        wait_for_answer(page)
        assert page.evaluate(HAS_ROOM)
        expect(page.locator("#rail")).to_be_hidden()
        page.get_by_role("button", name="Open the list of conversations").tap()
        expect(page.locator("#rail")).to_be_in_viewport()
        page.get_by_role("button", name="d" * 60).first.tap()
        expect(page.locator("#rail")).to_be_hidden()
        page.get_by_role("button", name="Settings", exact=True).tap()
        assert page.evaluate("settings.scrollWidth <= innerWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_has_a_name_and_enough_contrast(browser, scheme):
    rich = "# A\n\n`b` [c](https://d.example)\n\n> e\n\n```py\nf\n```\n\n|g|h|\n|-|-|\n|i|j|"
    with running_server(scripted(ended(text(rich)))) as url, opened(browser, url, color_scheme=scheme) as page:
        page.locator("#model[data-state=on]").wait_for()
        assert page.evaluate(FAINT, LEAST_CONTRAST) == []
        send(page, "Hello?")
        wait_for_answer(page)
        fail_once(page, 500, "{}")
        send(page, "Hello?")
        page.locator(".failure").wait_for()
        page.mouse.move(0, 0)
        assert page.evaluate(FAINT, LEAST_CONTRAST) == []
        assert page.evaluate(UNNAMED) == []
        page.get_by_role("button", name="Settings", exact=True).click()
        assert page.evaluate(FAINT, LEAST_CONTRAST) == []


def test_colours_follow_the_system_until_one_chooses(browser):
    with running_server(scripted(*SCRIPTS["text"])) as url, opened(browser, url, color_scheme="light") as page:
        paper = "getComputedStyle(document.documentElement).backgroundColor"
        light = page.evaluate(paper)
        page.get_by_role("button", name="Dark colours").click()
        dark = page.evaluate(paper)
        page.reload()
        assert page.evaluate(paper) == dark != light
        expect(page.get_by_role("button", name="Dark colours")).to_have_attribute("aria-pressed", "true")


def test_the_browser_is_told_to_let_no_script_write_markup():
    with running_server(scripted()) as url:
        policy = httpx.get(url).headers["content-security-policy"]
    assert "require-trusted-types-for 'script'; trusted-types 'none'" in policy
