"""What the engine tests share: the small model and ways to look at processes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import platformdirs
import psutil
import pytest

import p2pmesh
from p2pmesh.engine.confined import confinement_of
from p2pmesh.engine.confinement import Confinement
from p2pmesh.engine.find import managed_directory
from p2pmesh.home import Home

MODEL = Path(p2pmesh.__file__).parent / "models" / "data" / "p2pmesh-demo-tiny.gguf"
# Where P2PMESH_TESTS=full keeps the engine that it built, for the next time.
BUILT = Home(
    platformdirs.user_data_path("p2pmesh-tests", appauthor=False),
    platformdirs.user_cache_path("p2pmesh-tests", appauthor=False),
)
EMBEDDED = (sys.executable, "-P", "-m", "p2pmesh.engine.embedded")


@dataclass(frozen=True)
class Plain:
    """An engine that is only a command."""

    command: tuple[str, ...]

    @property
    def confinement(self) -> Confinement:
        return confinement_of(self.command)


def native() -> Path:
    """The folder of the engine that was built; skips the test where none was."""
    directory = managed_directory(BUILT.engine)
    if directory is None:
        pytest.skip("no engine was built: P2PMESH_TESTS=full builds one")
    return directory


def lives(pid: int) -> bool:
    """Whether the process is there and not a zombie."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], bool], within_s: float) -> bool:
    """Polls real processes; the caller asserts."""
    deadline_s = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.01)
    return True
