"""What holds for all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable

import pytest
import structlog
from hypothesis import settings

# The same examples on every run and machine, and no time limit: what else a shared machine does
# at that moment is nobody's bug. `pytest --hypothesis-profile explore` looks for new examples.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.register_profile("explore", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile("repeatable")

# Runners that start tests in the background have Ctrl-C ignored, which children inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Leave tests that are marked `full` to P2PMESH_TESTS=full."""
    if os.environ.get("P2PMESH_TESTS") != "full":
        skip = pytest.mark.skip(reason="takes long: P2PMESH_TESTS=full runs it")
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(skip)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Undo how a command configured logging in this process: other tests read what is logged."""
    structlog.reset_defaults()
