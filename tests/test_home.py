"""Where a node writes, and that it writes whole files or none."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import platformdirs
import pytest

from p2pmesh.config import Settings
from p2pmesh.errors import ConfigError, LocalError
from p2pmesh.home import Home, read_json, write_atomic
from tests.repository import ROOT


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home.at(tmp_path / "home")
    home.create()
    return home


def test_a_named_home_holds_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    home = Home.of(Settings(home=Path("here")))
    assert home.root == tmp_path / "here", "the working directory may change, the home not"
    places = [
        getattr(home, name) for name, kind in vars(Home).items() if isinstance(kind, property)
    ]
    assert len(set(places)) == len(places) >= 10
    assert all(home.root in place.parents for place in places)
    assert home.cache in home.engine.parents


def test_without_a_name_it_is_the_systems_folders() -> None:
    home = Home.of(Settings())
    assert home.root == platformdirs.user_data_path("p2pmesh", appauthor=False)
    assert home.cache == platformdirs.user_cache_path("p2pmesh", appauthor=False)


def test_create_makes_what_is_missing_and_leaves_what_is_there(home: Home) -> None:
    home.epoch_file.write_text("5", "ascii")
    home.create()
    assert home.logs.is_dir()
    assert home.cache.is_dir()
    assert home.epoch_file.read_text("ascii") == "5"


def test_a_home_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "ascii")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(LocalError) as caught:
            Home.at(place).create()
        assert str(caught.value).startswith(f"Cannot create {place} (")
        assert str(caught.value).endswith("; choose another place with --home")


# The config file


def test_no_config_file_is_an_empty_one(home: Home) -> None:
    assert home.read_config() == ""


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "with a byte order mark"])
def test_the_config_file_is_read(home: Home, mark: bytes) -> None:
    home.config_file.write_bytes(mark + "name = 'küche'\n".encode())
    assert home.read_config() == "name = 'küche'\n"


def test_a_config_file_that_cannot_be_read_is_said(home: Home) -> None:
    home.config_file.write_bytes(b"name = '\xff'")
    with pytest.raises(ConfigError, match=r"config\.toml is not UTF-8 text; "):
        home.read_config()
    home.config_file.unlink()
    home.config_file.mkdir()
    with pytest.raises(ConfigError, match=r"Cannot read .*config\.toml \(Is a directory\); "):
        home.read_config()


def test_a_home_that_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=f"{root} is no directory; .* --home"):
            Home.at(root).read_config()


# The lock


def test_a_home_is_for_one_node(home: Home) -> None:
    with home.locked():
        with pytest.raises(LocalError) as caught, home.locked():
            pass
        assert str(caught.value) == (
            f"A node is running in {home.root} already; start a second one with its own --home DIR"
        )
    with home.locked():
        assert (home.root / "lock").exists()


def test_two_homes_are_for_two_nodes(home: Home, tmp_path: Path) -> None:
    other = Home.at(tmp_path / "other")
    other.create()
    with home.locked(), other.locked():
        assert (other.root / "lock").exists()


def test_a_lock_ends_with_its_process_however_it_ends(home: Home) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from p2pmesh.home import Home\n"
        "with Home.at(Path(sys.argv[1])).locked():\n"
        "    print('locked', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(home.root)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline().strip() == b"locked"
            with pytest.raises(LocalError, match="is running in"), home.locked():
                pass
        finally:
            holder.kill()
            holder.wait(10)
    with home.locked():
        assert holder.returncode != 0


def test_a_lock_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="Cannot write"), Home.at(tmp_path / "none").locked():
        pass


# Files


@pytest.mark.parametrize("damaged", ["", "{", "[" * 100_000, "\udcff"])
def test_a_damaged_file_is_a_value_error(tmp_path: Path, damaged: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(damaged, "utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=r"."):
        read_json(path)


def test_a_file_is_replaced_whole_with_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"a long first version")
    write_atomic(path, b"second", 0o600)
    assert path.read_bytes() == b"second"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    if sys.platform != "win32":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.skipif(sys.platform == "win32", reason="permission bits")
def test_a_private_file_is_never_readable_by_others_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int] = []
    sync = os.fsync

    def look(descriptor: int) -> None:
        modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    write_atomic(tmp_path / "key", b"secret", 0o600)
    assert modes[0] == 0o600


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "file"
    write_atomic(path, b"old")
    with monkeypatch.context() as patch:
        if step == "write":
            patch.setattr("tempfile.mkstemp", lambda **_: full())
        elif step == "fsync":
            patch.setattr(os, "fsync", full)
        else:
            patch.setattr(Path, "replace", full)
        with pytest.raises(LocalError) as caught:
            write_atomic(path, b"new")
    assert str(caught.value) == (
        f"Cannot write {path} (No space left on device); make room, or choose another --home"
    )
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="Cannot write"):
        write_atomic(tmp_path / "gone" / "file", b"")
