from __future__ import annotations

from pathlib import Path

import pytest

from tests.node.isolated_node import Hearsay, Parts, make_parts


@pytest.fixture
async def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Parts:
    """A node that holds the demo model, number 0, and models 1 and 2; nothing runs yet."""
    return make_parts(Hearsay(), tmp_path, monkeypatch, files=(0, 1, 2))
