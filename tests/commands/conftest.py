from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from p2pmesh import log
from tests.console.running import console, write_run_file


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    """As the command line sets it up: nothing on standard output but answers."""
    log.configure(None, debug=False)
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="module")
def running_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home in which a fake node runs."""
    home = tmp_path_factory.mktemp("home")
    with console() as running:
        write_run_file(home / "run.json", pid=running.process.pid, console_port=running.port)
        yield home
