"""The store on real files: what it finds, opens, hashes, and what it says when it cannot."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from p2pmesh.errors import ConfigError, LocalError, MeshError, ModelError
from p2pmesh.home import Home
from p2pmesh.models import store as module
from p2pmesh.models.store import EMBEDDED, ModelFile, Store
from tests.models.make import packed_file, packed_key, packed_string, tiny_gguf

EMBEDDED_SHA256 = "160557fb0c1ed0ec30647c15f420c410a2509af4c1ad2c5d240c25e2248a2f4f"


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


def stems(models: list[ModelFile]) -> list[str]:
    return [model.stem for model in models]


# Opening


def test_the_embedded_model_is_packed(store: Store) -> None:
    model = store.embedded()
    assert (model.stem, model.parts) == ("p2pmesh-demo-tiny", (EMBEDDED,))
    assert model.size_bytes == model.card.size_bytes == EMBEDDED.stat().st_size
    assert store.digest(model) == EMBEDDED_SHA256


def test_an_installation_without_it_says_so(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "EMBEDDED", tmp_path / "gone.gguf")
    with pytest.raises(LocalError, match="install p2pmesh again"):
        store.embedded()


def test_a_relative_path_becomes_absolute(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_gguf(tmp_path / "a.gguf")
    monkeypatch.chdir(tmp_path)
    assert store.open(Path("a.gguf")).parts == (tmp_path / "a.gguf",)


def test_headers_that_need_several_reads(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_gguf(tmp_path / "a.gguf", extra={"general.description": "x" * 50_000})
    expected = store.open(path).card
    monkeypatch.setattr(module, "HEADER_STEPS_BYTES", (100, 20_000, 2**20))
    fresh = Store(Home.at(tmp_path / "other"), environ={})
    assert fresh.open(path).card == expected


def bad_files(folder: Path) -> dict[str, tuple[Path, type[MeshError], str]]:
    folder.mkdir(exist_ok=True)
    good = tiny_gguf(folder / "good.gguf").read_bytes()
    contents = {
        "empty": (b"", "is empty"),
        "zip": (b"PK\x03\x04" * 9, "not a GGUF file"),
        "cut": (good[: len(good) // 2], "download it again"),
        "cutheader": (good[:500], "ends inside its header"),
        "clip": (
            packed_file([packed_key("general.architecture", 8, packed_string("clip"))]),
            "projector",
        ),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    }
    found: dict[str, tuple[Path, type[MeshError], str]] = {}
    for name, (content, words) in contents.items():
        path = folder / f"{name}.gguf"
        path.write_bytes(content)
        found[name] = (path, ModelError, words)
    found["missing"] = (folder / "none.gguf", ConfigError, "no model file")
    found["under a file"] = (folder / "good.gguf" / "x", ConfigError, "no model file")
    found["folder"] = (folder, ConfigError, "is a folder")
    return found


def test_bad_files_each_get_one_sentence(store: Store, tmp_path: Path) -> None:
    for path, kind, words in bad_files(tmp_path / "bad").values():
        with pytest.raises(kind, match=words) as caught:
            store.open(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_not_waited_for(store: Store, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ConfigError, match="not a regular file"):
        store.open(tmp_path / "pipe.gguf")


def test_what_the_system_refuses_is_local(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_gguf(tmp_path / "a.gguf")

    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with capture_logs(), pytest.raises(LocalError, match="Permission denied"):
        store.open(path)


# Several parts


def split(folder: Path, name: str = "big") -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    tiny_gguf(folder / f"{name}.gguf", split_tensors=8)
    return sorted(folder.glob(f"{name}-*.gguf"))


def test_any_part_opens_the_model(store: Store, tmp_path: Path) -> None:
    files = split(tmp_path / "m")
    assert len(files) == 3
    whole = store.open(tiny_gguf(tmp_path / "whole.gguf"))
    for path in files:
        model = store.open(path)
        assert model.parts == tuple(files)
        assert model.stem == "big"
        assert model.size_bytes == sum(file.stat().st_size for file in files)
        assert model.card.layer_bytes == whole.card.layer_bytes
        assert model.card.parameters == whole.card.parameters


def test_the_digest_of_parts_is_that_of_their_digests(store: Store, tmp_path: Path) -> None:
    files = split(tmp_path / "m")
    joined = "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    calls: list[tuple[int, int]] = []
    model = store.open(files[0])
    digest = store.digest(model, lambda done, total: calls.append((done, total)))
    assert digest == hashlib.sha256(joined.encode()).hexdigest()
    assert calls[0] == (0, model.size_bytes)
    assert calls[-1] == (model.size_bytes, model.size_bytes)
    assert calls == sorted(calls)


def test_a_missing_part_is_named(store: Store, tmp_path: Path) -> None:
    files = split(tmp_path / "m")
    files[1].unlink()
    with pytest.raises(ModelError, match=r"big-00002-of-00003\.gguf is missing"):
        store.open(files[0])
    files[0].unlink()
    with pytest.raises(ModelError, match=r"big-00001-of-00003\.gguf and 1 more are missing"):
        store.open(files[2])


def test_parts_that_do_not_belong_together(store: Store, tmp_path: Path) -> None:
    files = split(tmp_path / "m")
    shutil.copy(files[2], files[1])
    with pytest.raises(ModelError, match="part 2 does not belong"):
        store.open(files[0])
    lone = shutil.copy(files[0], tmp_path / "renamed.gguf")
    with pytest.raises(ModelError, match="one of 3 parts"):
        store.open(Path(lone))


@pytest.mark.parametrize("name", ["x-00004-of-00003", "x-00000-of-00002", "x-00001-of-99999"])
def test_absurd_part_numbers(store: Store, tmp_path: Path, name: str) -> None:
    path = tiny_gguf(tmp_path / "x.gguf").rename(tmp_path / f"{name}.gguf")
    with pytest.raises(ModelError, match="no model has a part"):
        store.open(path)


# Digests


def test_a_digest_is_what_sha256sum_prints_and_is_kept(
    store: Store, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_gguf(tmp_path / "a.gguf")
    model = store.open(path)
    digest = store.digest(model)
    if shutil.which("sha256sum"):
        printed = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
        assert printed.stdout.split()[0] == digest
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest

    def never(*args: object) -> None:
        pytest.fail("it was hashed again")

    monkeypatch.setattr(module, "_hash", never)
    assert store.digest(model, never) == digest
    assert Store(home, environ={}).digest(model) == digest


def test_a_changed_file_is_hashed_again(store: Store, tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "a.gguf")
    before = store.digest(store.open(path))
    tiny_gguf(path, seed=2)
    os.utime(path, ns=(1, 1))
    after = store.digest(store.open(path))
    assert before != after == hashlib.sha256(path.read_bytes()).hexdigest()


def test_progress_may_stop_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HASH_STEP_BYTES", 65_536)
    model = store.open(tiny_gguf(tmp_path / "a.gguf"))
    seen: list[int] = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if done >= 2 * 65_536:
            raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        store.digest(model, stop)
    assert seen == [0, 65_536, 131_072]
    assert store.digest(model) == hashlib.sha256(model.parts[0].read_bytes()).hexdigest()


@pytest.mark.parametrize("how", ["touched", "grown", "shortened"])
def test_a_file_that_changes_while_it_is_hashed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(module, "HASH_STEP_BYTES", 65_536)
    path = tiny_gguf(tmp_path / "a.gguf")
    model = store.open(path)

    def meddle(done: int, total: int) -> None:
        if done == 65_536:
            if how == "touched":
                os.utime(path, ns=(1, 1))
            else:
                os.truncate(path, total + (100_000 if how == "grown" else -100_000))

    with pytest.raises(ModelError, match="changed while it was read"):
        store.digest(model, meddle)


def test_a_file_is_what_was_read_until_it_changes(store: Store, tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "a.gguf", seed=1)
    model = store.open(path)
    digest = store.digest(model)
    store.check(model, digest)
    tiny_gguf(path, seed=2)
    with pytest.raises(ModelError, match=r"a\.gguf is not the file that was read"):
        store.check(model, digest)
    path.unlink()
    with pytest.raises(ConfigError, match="There is no model file"):
        store.check(model, digest)


def test_a_file_that_changed_since_it_was_opened(store: Store, tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "a.gguf")
    model = store.open(path)
    tiny_gguf(path, layers=3)
    with pytest.raises(ModelError, match="changed"):
        store.digest(model)
    path.unlink()
    with pytest.raises(ConfigError, match="no model file"):
        store.digest(model)


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
