"""A real browser for tests: Chromium, found on this machine, driven by playwright.

The sync API runs an event loop while it is open. Keep it inside one test, so that no trio test
starts meanwhile.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# Quiet and alone: nothing is looked up, updated or cached outside its own temporary profile.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A headless browser, closed at the end; skips the test where there is none.

    With `P2PMESH_TESTS=full` a missing browser fails instead.
    """
    with sync_playwright() as playwright:
        on_path = next((found for name in NAMES if (found := shutil.which(name))), None)
        executable = on_path or playwright.chromium.executable_path
        if not Path(executable).exists():
            reason = "no browser: install chromium, or run `playwright install chromium`"
            if os.environ.get("P2PMESH_TESTS") == "full":
                pytest.fail(reason)
            pytest.skip(reason)
        browser = playwright.chromium.launch(executable_path=executable, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()
