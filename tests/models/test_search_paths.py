"""Where models are looked for, on each system, and what a bounded walk finds."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from p2pmesh.models import search_paths
from p2pmesh.models.search_paths import Candidate, Place, find_candidates, usual_places

OWN = Path("/own")
HEX = "0123456789abcdef" * 4


def by_owner(environ: dict[str, str], platform: str = "linux") -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for place in usual_places(OWN, environ, platform):
        found.setdefault(place.owner, []).append(place.path.as_posix())
    return found


def test_linux() -> None:
    assert by_owner({"HOME": "/h"}) == {
        "p2pmesh": ["/own"],
        "Hugging Face": ["/h/.cache/huggingface/hub"],
        "llama.cpp": ["/h/.cache/llama.cpp"],
        "LM Studio": ["/h/.lmstudio/models", "/h/.cache/lm-studio/models"],
        "Ollama": ["/h/.ollama/models", "/usr/share/ollama/.ollama/models"],
    }


def test_macos_and_windows() -> None:
    mac = by_owner({"HOME": "/h"}, "darwin")
    assert mac["llama.cpp"] == ["/h/Library/Caches/llama.cpp"]
    assert mac["Ollama"] == ["/h/.ollama/models"]
    windows = by_owner({"USERPROFILE": "C:/u", "LOCALAPPDATA": "C:/l", "HOME": "/msys"}, "win32")
    assert windows["llama.cpp"] == ["C:/l/llama.cpp"]
    assert windows["LM Studio"][0] == "C:/u/.lmstudio/models"


def test_variables_come_first() -> None:
    environ = {
        "HOME": "/h",
        "HF_HOME": "/hf",
        "LLAMA_CACHE": "/lc",
        "OLLAMA_MODELS": "/om",
        "XDG_CACHE_HOME": "/x",
    }
    found = by_owner(environ)
    assert found["Hugging Face"] == ["/hf/hub"]
    assert found["llama.cpp"] == ["/lc"]
    assert found["Ollama"][0] == "/om"
    assert by_owner({**environ, "HF_HUB_CACHE": "/hub"})["Hugging Face"] == ["/hub"]
    assert by_owner({"XDG_CACHE_HOME": "/x"})["llama.cpp"] == ["/x/llama.cpp"]


def test_without_a_user_there_is_only_our_own_place() -> None:
    assert by_owner({}, "darwin") == {"p2pmesh": ["/own"]}


def names(root: Path, owner: str = "p2pmesh") -> list[str]:
    found = find_candidates(Place(owner=owner, path=root))
    return [candidate.path.relative_to(root).as_posix() for candidate in found]


def touch(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_walk_finds_gguf_files_in_order(tmp_path: Path) -> None:
    for name in ("b/2.gguf", "b/1.GGUF", "a.gguf", "a.txt", ".hidden/x.gguf", "c.gguf.part"):
        touch(tmp_path / name)
    assert names(tmp_path) == ["a.gguf", "b/1.GGUF", "b/2.gguf"]


def test_a_missing_place_is_empty() -> None:
    assert names(Path("/nonexistent-place")) == []
    assert names(Path("/nonexistent-place"), "Ollama") == []


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_links_are_followed_once(tmp_path: Path) -> None:
    disk = touch(tmp_path / "disk" / "m.gguf").parent
    root = tmp_path / "models"
    touch(root / "blobs" / HEX)
    (root / "snapshots").mkdir()
    (root / "snapshots" / "named.gguf").symlink_to(root / "blobs" / HEX)
    (root / "snapshots" / "broken.gguf").symlink_to(root / "gone")
    (root / "loop.gguf").symlink_to(root / "loop.gguf")
    (root / "back").symlink_to(root)
    (root / "big").symlink_to(disk)
    (root / "big2").symlink_to(disk)
    assert names(root) == ["big/m.gguf", "snapshots/named.gguf"]


def test_depth_and_number_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path.joinpath(*"12345678", "in.gguf"))
    touch(tmp_path.joinpath(*"123456789", "out.gguf"))
    assert names(tmp_path) == ["1/2/3/4/5/6/7/8/in.gguf"]
    monkeypatch.setattr(search_paths, "ENTRIES_MAX", 5)
    with capture_logs() as logs:
        assert names(tmp_path) == []
    assert logs[0]["event"] == "walk_stopped"


@pytest.mark.skipif(sys.platform == "win32", reason="permissions differ there")
def test_a_locked_folder_hides_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "locked" / "x.gguf")
    touch(tmp_path / "open" / "y.gguf")
    real = os.scandir

    def scandir(path: Path) -> Any:
        if path.name == "locked":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with capture_logs() as logs:
        assert names(tmp_path) == ["open/y.gguf"]
    assert [(entry["event"], entry["reason"]) for entry in logs] == [
        ("directory_skipped", "Permission denied")
    ]


def manifest(digest: str, media: str = "application/vnd.ollama.image.model") -> bytes:
    other = {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:" + "f" * 64}
    return json.dumps({"layers": [other, {"mediaType": media, "digest": digest}]}).encode()


def test_ollamas_blobs_get_their_names(tmp_path: Path) -> None:
    blob = touch(tmp_path / "blobs" / f"sha256-{HEX}")
    registry = tmp_path / "manifests" / "registry.ollama.ai"
    touch(registry / "library" / "llama3.2" / "latest", manifest(f"sha256:{HEX}"))
    touch(registry / "me" / "tuned" / "3b-q4", manifest(f"sha256:{HEX}"))
    found = list(find_candidates(Place(owner="Ollama", path=tmp_path)))
    assert found == [
        Candidate(path=blob, stem="llama3.2-latest", aliases=("llama3.2:latest", "llama3.2")),
        Candidate(path=blob, stem="me-tuned-3b-q4", aliases=("me/tuned:3b-q4",)),
    ]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"layers": 5}',
        b'{"layers": [5]}',
        b'{"layers": [{}]}',
        b"[" * 100_000,
        b"\xff\xfe",
        manifest("sha256:../../../../etc/passwd"),
        manifest("md5:abc"),
        manifest(f"sha256:{HEX}\n"),
    ],
)
def test_a_bad_manifest_is_named_with_its_problem(tmp_path: Path, content: bytes) -> None:
    touch(tmp_path / "blobs" / f"sha256-{HEX}")
    folder = tmp_path / "manifests" / "registry.ollama.ai" / "library" / "m"
    bad = touch(folder / "bad", content)
    touch(folder / "good", manifest(f"sha256:{HEX}"))
    found = list(find_candidates(Place(owner="Ollama", path=tmp_path)))
    assert [candidate.path for candidate in found] == [bad, tmp_path / "blobs" / f"sha256-{HEX}"]
    assert found[0].problem == (
        f"{bad} cannot be used: it is no manifest of Ollama's; ollama pull m:bad"
    )
    assert found[1].problem == ""


def test_a_manifest_without_its_blob_is_named_with_its_problem(tmp_path: Path) -> None:
    named = tmp_path / "manifests" / "registry.ollama.ai" / "library" / "m" / "3b"
    touch(named, manifest(f"sha256:{HEX}"))
    (found,) = find_candidates(Place(owner="Ollama", path=tmp_path))
    assert found.problem == (
        f"m:3b cannot be used: its file {tmp_path / 'blobs' / f'sha256-{HEX}'} is missing; "
        "ollama pull m:3b"
    )


def test_a_manifest_of_something_else_is_passed_over(tmp_path: Path) -> None:
    named = tmp_path / "manifests" / "registry.ollama.ai" / "library" / "m" / "3b"
    touch(named, manifest(f"sha256:{HEX}", media="application/octet-stream"))
    assert list(find_candidates(Place(owner="Ollama", path=tmp_path))) == []
