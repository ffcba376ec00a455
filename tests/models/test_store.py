"""The store on real files: what it finds, opens, hashes, and what it says when it cannot."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from p2pmesh.errors import ConfigError, LocalError, ModelError
from p2pmesh.home import Home
from p2pmesh.models import store as module
from p2pmesh.models.store import EMBEDDED, Store
from tests.models.builders import bad_files, split, tiny_gguf

EMBEDDED_SHA256 = "160557fb0c1ed0ec30647c15f420c410a2509af4c1ad2c5d240c25e2248a2f4f"

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
    with pytest.raises(LocalError, match=r"big-00002-of-00003\.gguf is missing"):
        store.open(files[0])
    files[0].unlink()
    with pytest.raises(LocalError, match=r"big-00001-of-00003\.gguf and 1 more are missing"):
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
