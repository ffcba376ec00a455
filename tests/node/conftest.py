from __future__ import annotations

from pathlib import Path

import pytest

from p2pmesh.node import run
from tests.node.isolated_node import Hearsay, Parts, make_parts


@pytest.fixture
async def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Parts:
    """A node that holds the demo model, number 0, and models 1 and 2; nothing runs yet."""
    return make_parts(Hearsay(), tmp_path, monkeypatch, files=(0, 1, 2))


@pytest.fixture(autouse=True)
def quick_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole nodes do not spend most of a second on the speed of this machine's memory."""
    monkeypatch.setattr(run, "measure_mib_per_s", lambda: 24_000)
    monkeypatch.setattr(run, "is_machine_busy", lambda: False)
