from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog

from p2pmesh import log


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    """As the command line sets it up: nothing on standard output but answers."""
    log.configure(None, debug=False)
    yield
    structlog.reset_defaults()
