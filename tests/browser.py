"""Pages in a real browser: Debian's Chromium, headless."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

QUIET = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@contextlib.contextmanager
def open_page(url: str, width: int = 1280) -> Iterator[tuple[Any, list[str]]]:
    """(playwright's page, what went wrong on it: errors on its console, requests to other places)."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    wrong: list[str] = []
    origin = "/".join(url.split("/")[:3])
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=QUIET.split(), env=dict(os.environ))
        try:
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("request", lambda request: None if request.url.startswith(origin) else wrong.append(request.url))
            page.goto(url)
            yield page, wrong
        finally:
            browser.close()
