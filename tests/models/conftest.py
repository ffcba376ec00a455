"""A store with a home and a user's folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pmesh.home import Home
from p2pmesh.models.store import Store


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home.at(tmp_path / "node")
    home.models.mkdir(parents=True)
    return home


@pytest.fixture
def user(tmp_path: Path) -> Path:
    return tmp_path / "user"


@pytest.fixture
def store(home: Home, user: Path) -> Store:
    return Store(home, environ={"HOME": str(user), "USERPROFILE": str(user)})
