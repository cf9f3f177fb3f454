"""A real browser for tests of the page. It is Chromium as the system has it; where there is none, tests are skipped."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Chromium writes this itself where a test has a request fail.
EXPECTED_MESSAGE = "Failed to load resource"


@contextmanager
def chromium() -> Iterator[Browser]:
    """Yield a browser. While it runs, asyncio.run cannot be used in the same thread: keep it to one test module."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("no Chromium on this machine (Debian, Ubuntu: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, url: str, **options: object) -> Iterator[Page]:
    """Yield the page of a server. Whatever a test does: no other host is asked, and the console stays empty."""
    with browser.new_context(permissions=["clipboard-read", "clipboard-write"], **options) as context:
        page = context.new_page()
        asked: list[str] = []
        complaints: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: complaints.append(f"{error}"))
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(url)
        yield page
        assert {urlsplit(address).netloc for address in asked} == {urlsplit(url).netloc}
        assert [text for text in complaints if not text.startswith(EXPECTED_MESSAGE)] == []


def send(page: Page, text: str) -> None:
    """Send a message."""
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def wait_for_answer(page: Page) -> None:
    """Return when nothing is being written any more."""
    page.get_by_role("button", name="Send", exact=True).wait_for(timeout=120_000)
