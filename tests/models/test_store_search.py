"""What the store finds on real files, and what it takes a name for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from p2pmesh.errors import ConfigError
from p2pmesh.home import Home
from p2pmesh.models import store as module
from p2pmesh.models.store import EMBEDDED, ModelFile, Store
from tests.models.builders import bad_files, other_files, split, tiny_gguf


def stems(models: list[ModelFile]) -> list[str]:
    return [model.stem for model in models]


# Searching


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_models_of_all_programs_are_found_once(home: Home, user: Path, store: Store) -> None:
    tiny_gguf(home.models / "mine.gguf")
    repo = user / ".cache" / "huggingface" / "hub" / "models--o--n"
    for revision in ("r1", "r2"):
        (repo / "snapshots" / revision).mkdir(parents=True)
    (repo / "blobs").mkdir()
    tiny_gguf(repo / "blobs" / "abc", seed=2)
    for revision in ("r1", "r2"):
        (repo / "snapshots" / revision / "hub-model.gguf").symlink_to(repo / "blobs" / "abc")
    (home.models / "link.gguf").symlink_to(repo / "blobs" / "abc")
    (user / ".cache" / "llama.cpp").mkdir()
    tiny_gguf(user / ".cache" / "llama.cpp" / "ggml-org_x.gguf", seed=3)
    split(user / ".lmstudio" / "models" / "pub" / "repo", "studio")
    ollama = user / ".ollama" / "models"
    (ollama / "blobs").mkdir(parents=True)
    blob = tiny_gguf(ollama / "blobs" / f"sha256-{'a' * 64}", seed=4)
    named = ollama / "manifests" / "registry.ollama.ai" / "library" / "llama3.2" / "3b"
    named.parent.mkdir(parents=True)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:" + "a" * 64}
    named.write_text(json.dumps({"layers": [layer]}))

    found = store.discover()
    assert stems(found) == ["link", "mine", "ggml-org_x", "studio", "llama3.2-3b"]
    assert store.unusable == ()
    assert found[-1].parts == (blob,)
    assert len(found[3].parts) == 3
    assert store.locate("llama3.2:3b") == found[-1]
    (home.models / "link.gguf").unlink()
    again = store.discover()
    assert stems(again) == ["mine", "hub-model", "ggml-org_x", "studio", "llama3.2-3b"]
    assert again[1].parts == (repo / "snapshots" / "r1" / "hub-model.gguf",)


def test_what_cannot_be_used_is_skipped_and_remembered(home: Home, store: Store) -> None:
    bad = bad_files(home.models)
    split(home.models / "split")[0].unlink()
    with capture_logs() as logs:
        assert stems(store.discover()) == ["good"]
    reasons = {one.path.name: one.reason for one in store.unusable}
    for name in ("empty", "zip", "cut", "cutheader", "clip", "lfs"):
        assert bad[name][2] in reasons.pop(f"{name}.gguf")
    (orphan,) = reasons.values()
    assert "big-00001-of-00003.gguf is missing" in orphan
    assert [entry["event"] for entry in logs] == ["model_skipped"] * 7
    with capture_logs() as logs:
        store.discover()
    assert logs == []  # said once
    (home.models / "empty.gguf").unlink()
    store.discover()
    assert "empty.gguf" not in {one.path.name for one in store.unusable}


def test_an_unusable_file_is_damaged_or_missing_or_of_another_kind(
    home: Home, user: Path, store: Store
) -> None:
    (home.models / "damaged.gguf").write_bytes(b"")
    split(home.models)[0].unlink()
    others = other_files(home.models)
    manifest = user / ".ollama/models/manifests/registry.ollama.ai/library/m/3b"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{")
    with capture_logs():
        assert store.discover() == []
    states = {one.path: one.state for one in store.unusable}
    assert states.pop(home.models / "damaged.gguf") == "damaged"
    assert states.pop(manifest) == "missing"
    for path, words in others.values():
        assert states.pop(path) == "other"
        (reason,) = (one.reason for one in store.unusable if one.path == path)
        assert words in reason
    assert list(states.values()) == ["missing"]


def test_known_files_are_not_read_again(
    home: Home, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_gguf(home.models / "a.gguf")
    split(home.models)
    first = store.discover()

    def never(*args: object) -> None:
        pytest.fail("a header was read again")

    monkeypatch.setattr(module, "_read_card", never)
    assert store.discover() == first
    assert Store(home, environ={}).discover() == first


# What the user means


def test_names_that_locate_a_model(home: Home, user: Path, store: Store) -> None:
    model = store.open(tiny_gguf(home.models / "my-model-Q8_0.gguf", name="My Model"))
    digest = store.digest(model)
    in_home = user / "x" / "other.gguf"
    in_home.parent.mkdir(parents=True)
    tiny_gguf(in_home)
    for text in (
        "my-model-Q8_0",
        "my-model-Q8_0.gguf",
        "My Model",
        digest,
        digest[:8].upper(),
        str(model.parts[0]),
    ):
        assert store.locate(text) == model, text
    assert store.locate("~/x/other.gguf").parts == (in_home,)
    assert store.locate("p2pmesh-demo-tiny").parts == (EMBEDDED,)


def test_what_is_not_found_is_said_with_the_closest_names(home: Home, store: Store) -> None:
    tiny_gguf(home.models / "qwen3-8b-q4.gguf")
    with pytest.raises(ConfigError) as caught:
        store.locate("qwen3-8b-q5")
    message = str(caught.value)
    assert "'qwen3-8b-q5'" in message
    assert str(home.models) in message
    assert "closest: qwen3-8b-q4" in message
    with pytest.raises(ConfigError, match="p2pmesh models"):
        store.locate("zzzzzz")
    with pytest.raises(ConfigError, match="no such file"):
        store.locate(str(home.models / "nothing.gguf"))


@pytest.mark.parametrize("text", ["", "  ", "a\0b", "x" * 5000, "/" * 5000, "\udcff", "..", "[a"])
def test_odd_texts_are_the_users_error(store: Store, text: str) -> None:
    with pytest.raises(ConfigError):
        store.locate(text)


def test_two_files_with_one_name_are_listed(home: Home, store: Store) -> None:
    for folder in ("a", "b"):
        (home.models / folder).mkdir()
        tiny_gguf(home.models / folder / "same.gguf", seed=ord(folder))
    with pytest.raises(ConfigError, match="Several models are called 'same'") as caught:
        store.locate("same")
    for folder in ("a", "b"):
        path = home.models / folder / "same.gguf"
        assert str(path) in str(caught.value)
        assert store.locate(str(path)).parts == (path,)


def test_a_bad_file_that_was_named_is_an_error(store: Store, tmp_path: Path) -> None:
    for path, kind, words in bad_files(tmp_path / "bad").values():
        if path.exists():
            with pytest.raises(kind, match=words):
                store.locate(str(path))


def test_a_name_is_stronger_than_a_folder_of_that_name(
    home: Home, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_gguf(home.models / "llama.gguf")
    (tmp_path / "llama").mkdir()
    monkeypatch.chdir(tmp_path)
    assert store.locate("llama").parts == (home.models / "llama.gguf",)
