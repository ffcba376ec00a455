"""Writing shards: what is on the disk afterwards, and when it goes wrong."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from p2pmesh.errors import ConfigError, LocalError, MeshError, ModelError
from p2pmesh.models import slice as module
from p2pmesh.models.experts import ExpertLists
from p2pmesh.models.gguf import scan
from p2pmesh.models.slice import read_layout, shard_bytes, write_shard
from p2pmesh.models.store import ModelFile, Store
from tests.models.builders import tiny_gguf
from tests.models.layouts import moe_gguf
from tests.models.sliced import Source, assert_kept

LISTS: ExpertLists = {0: (3, 1), 1: (15, 0), 2: (7, 8)}
needs_permissions = pytest.mark.skipif(
    os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0,
    reason="a user for whom permissions count",
)


@pytest.fixture
def model(store: Store, tmp_path: Path) -> ModelFile:
    return store.open(moe_gguf(tmp_path / "model.gguf", "qwen3moe"))


def loaded(*paths: Path) -> Source:
    files = tuple(path.read_bytes() for path in paths)
    return Source(files, tuple(map(scan, files)))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_shard_is_a_model_with_these_experts(
    store: Store, model: ModelFile, tmp_path: Path
) -> None:
    output = tmp_path / "shard.gguf"
    size = write_shard(model, LISTS, output)
    assert output.stat().st_size == size == shard_bytes(model, LISTS)
    assert_kept(loaded(*model.parts), loaded(output), LISTS)
    assert store.open(output).card.experts == 2


def test_a_model_of_several_files_becomes_one(store: Store, tmp_path: Path) -> None:
    parts = store.open(moe_gguf(tmp_path / "m.gguf", "qwen3moe", split_tensors=4)).parts
    assert len(parts) > 5
    output = tmp_path / "shard.gguf"
    write_shard(store.open(parts[3]), LISTS, output)
    assert_kept(loaded(*parts), loaded(output), LISTS)


def test_progress_grows_in_small_steps_to_the_whole(
    model: ModelFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step is all that is in memory at a time."""
    monkeypatch.setattr(module, "COPY_STEP_BYTES", 4096)
    seen: list[tuple[int, int]] = []
    output = tmp_path / "shard.gguf"
    size = write_shard(model, LISTS, output, lambda done, total: seen.append((done, total)))
    assert {total for _, total in seen} == {size}
    done = [one for one, _ in seen]
    assert (done[0], done[-1]) == (0, size)
    assert all(0 <= after - before <= 4096 for before, after in itertools.pairwise(done))
    assert_kept(loaded(*model.parts), loaded(output), LISTS)


def test_the_layout_of_a_model_without_experts_is_an_error(store: Store, tmp_path: Path) -> None:
    dense = store.open(tiny_gguf(tmp_path / "dense.gguf"))
    with pytest.raises(ModelError, match=r"dense\.gguf cannot be cut into shards: it has no exp"):
        read_layout(dense)
    with pytest.raises(ModelError, match=r"dense\.gguf cannot be cut into shards: it has no exp"):
        write_shard(dense, {}, tmp_path / "shard.gguf")
    assert "shard.gguf" not in names(tmp_path)


@pytest.mark.parametrize("link", ["model.gguf", "link.gguf"])
def test_the_model_itself_is_never_written(model: ModelFile, tmp_path: Path, link: str) -> None:
    before = model.parts[0].read_bytes()
    if link != "model.gguf":
        (tmp_path / link).symlink_to(model.parts[0])
    with pytest.raises(ConfigError, match="is the model itself"):
        write_shard(model, LISTS, tmp_path / link)
    assert model.parts[0].read_bytes() == before


def interrupted(_done: int, _total: int) -> None:
    raise KeyboardInterrupt


def grow(model: ModelFile) -> None:
    with model.parts[0].open("ab") as file:
        file.write(b"more")


def shrink(model: ModelFile) -> None:
    os.truncate(model.parts[0], model.size_bytes // 2)


def fail(path: Path, model: ModelFile, lists: ExpertLists, progress: Any) -> BaseException:
    """Writing over an old file fails, and leaves it as it was and nothing beside it."""
    path.write_bytes(b"old")
    before = names(path.parent)
    with pytest.raises((MeshError, KeyboardInterrupt)) as caught:
        write_shard(model, lists, path, progress)
    assert path.read_bytes() == b"old"
    assert names(path.parent) <= before
    return caught.value


def test_what_stops_the_work_leaves_the_old_file(model: ModelFile, tmp_path: Path) -> None:
    problem = fail(tmp_path / "shard.gguf", model, LISTS, interrupted)
    assert isinstance(problem, KeyboardInterrupt)


def test_bad_lists_leave_the_old_file(model: ModelFile, tmp_path: Path) -> None:
    problem = fail(tmp_path / "shard.gguf", model, {0: (1, 2)}, None)
    assert isinstance(problem, ConfigError)


@pytest.mark.parametrize("change", [grow, shrink])
def test_a_model_that_changes_meanwhile_makes_no_shard(
    model: ModelFile, tmp_path: Path, change: Callable[[ModelFile], None]
) -> None:
    def progress(done: int, _total: int) -> None:
        if done == 0:
            change(model)

    problem = fail(tmp_path / "shard.gguf", model, LISTS, progress)
    assert isinstance(problem, ModelError)
    assert "changed while it was read" in str(problem)


def test_a_model_that_is_gone_makes_no_shard(model: ModelFile, tmp_path: Path) -> None:
    def progress(done: int, _total: int) -> None:
        if done == 0:
            model.parts[0].unlink()

    problem = fail(tmp_path / "shard.gguf", model, LISTS, progress)
    assert isinstance(problem, LocalError)
    assert "Cannot read" in str(problem)
    with pytest.raises(LocalError, match="Cannot read"):
        write_shard(model, LISTS, tmp_path / "shard.gguf")


def test_too_little_room_is_seen_before_anything_is_written(
    model: ModelFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=2**20 // 2))
    problem = fail(tmp_path / "shard.gguf", model, LISTS, None)
    assert isinstance(problem, LocalError)
    assert "0 MiB are free there; make room, or choose another place" in str(problem)


def test_a_folder_that_is_not_there_is_named(model: ModelFile, tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"shard\.gguf \(No such file or directory\); choose"):
        write_shard(model, LISTS, tmp_path / "gone" / "shard.gguf")


@needs_permissions
def test_a_folder_that_may_not_be_written_is_named(model: ModelFile, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(LocalError, match=r"shard\.gguf \(Permission denied\); make room, or"):
        write_shard(model, LISTS, tmp_path / "locked" / "shard.gguf")
