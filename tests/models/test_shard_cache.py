"""The shards that a machine keeps: made once, found again, and never more than may be."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest

from p2pmesh.errors import ConfigError, LocalError, ModelError
from p2pmesh.home import Home, locked
from p2pmesh.models import slice as slice_module
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.experts import ExpertLists
from p2pmesh.models.importance import digest_of, rank
from p2pmesh.models.parts import Shard, ShardKind
from p2pmesh.models.shard_cache import ShardCache
from p2pmesh.models.slice import shard_bytes
from p2pmesh.models.store import ModelFile, Progress, Store
from p2pmesh.models.thin_places import Floats
from tests.models.layouts import moe_gguf
from tests.models.sliced import Source, assert_kept, tensors
from tests.models.test_slice import LISTS, loaded


@pytest.fixture
def model(store: Store, tmp_path: Path) -> ModelFile:
    return store.open(moe_gguf(tmp_path / "model.gguf", "qwen3moe"))


class Shards:
    """A cache of shards of one model, each of the same size."""

    def __init__(self, home: Home, store: Store, model: ModelFile) -> None:
        self.folder = home.shards
        self.store = store
        self.model, self.digest = model, store.digest(model)
        self.each = shard_bytes(model, LISTS)

    def make(self, lists: ExpertLists = LISTS, *, room: int | None = None) -> Path:
        return ShardCache(self.folder, room).make(self.model, self.digest, lists)

    def files(self) -> set[Path]:
        return set(self.folder.glob("*shard*"))


@pytest.fixture
def shards(home: Home, store: Store, model: ModelFile) -> Shards:
    return Shards(home, store, model)


def pairs(expert: int) -> ExpertLists:
    return dict.fromkeys(range(3), (expert, expert + 1))


def age(path: Path, seconds: int) -> None:
    os.utime(path, (seconds, seconds))


def whole_of(shards: Shards) -> Source:
    return loaded(*shards.model.parts)


def test_a_shard_is_made_once(shards: Shards) -> None:
    path = shards.make()
    made = path.stat().st_ino
    assert shards.make() == path
    assert path.stat().st_ino == made
    assert_kept(whole_of(shards), loaded(path), LISTS)


def test_other_lists_and_rankings_are_other_shards(shards: Shards) -> None:
    cache = ShardCache(shards.folder, None)
    cache.make(shards.model, shards.digest, LISTS, ranking="r")
    shards.make()
    shards.make({0: (1, 3), 1: (15, 0), 2: (7, 8)})
    assert len(shards.files()) == 3


def test_a_shard_that_was_cut_off_is_made_again(shards: Shards) -> None:
    path = shards.make()
    os.truncate(path, 100)
    assert shards.make() == path
    assert_kept(whole_of(shards), loaded(path), LISTS)


def test_those_unused_longest_go_first(shards: Shards) -> None:
    first, second = shards.make(pairs(0)), shards.make(pairs(2))
    age(first, 1)
    age(second, 2)
    room = 2 * shards.each
    assert shards.make(pairs(0), room=room) == first  # used again
    third = shards.make(pairs(4), room=room)
    assert shards.files() == {first, third}


def test_a_shard_larger_than_all_may_be_is_refused_and_nothing_deleted(shards: Shards) -> None:
    first = shards.make()
    with pytest.raises(LocalError, match="keep less of the model, or allow more with --disk"):
        shards.make(pairs(0), room=shards.each - 1)
    assert shards.files() == {first}


def test_bad_lists_delete_nothing(shards: Shards) -> None:
    first = shards.make()
    with pytest.raises(ConfigError, match="No list for layer 1"):
        shards.make({0: (1, 2)}, room=1)
    assert shards.files() == {first}


def test_without_a_bound_half_of_the_free_disk_is_used(
    shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = shards.make(pairs(0))
    free = 2 * shards.each - shards.each  # and twice a shard without the one that is there
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=free))
    second = shards.make(pairs(2))
    assert shards.files() == {second} != {first}


def test_what_a_killed_process_left_is_deleted(shards: Shards) -> None:
    first = shards.make(pairs(0))
    left = shards.folder / f".{first.name}.abc"
    left.write_bytes(b"half")
    shards.make(pairs(2))
    assert not left.exists()


def test_one_process_makes_shards_at_a_time(shards: Shards) -> None:
    shards.folder.mkdir(parents=True)
    with (
        locked(shards.folder / "lock", "taken"),
        pytest.raises(LocalError, match="Another p2pmesh is making a shard"),
    ):
        shards.make()


def test_a_thread_waits_while_another_makes_a_shard(shards: Shards) -> None:
    cache = ShardCache(shards.folder, None)
    made: list[Path] = []

    def make_another() -> None:
        made.append(cache.make(shards.model, shards.digest, pairs(2)))

    other = Thread(target=make_another)

    def progress(done: int, _total: int) -> None:
        if not done:
            other.start()
            other.join(0.1)  # had it not waited, it would have ended
            assert other.is_alive()

    first = cache.make(shards.model, shards.digest, pairs(0), progress=progress)
    other.join()
    assert shards.files() == {first, *made}
    assert len(made) == 1


def test_a_folder_that_cannot_be_made_is_named(shards: Shards) -> None:
    shards.folder.parent.mkdir(parents=True, exist_ok=True)
    shards.folder.write_bytes(b"a file")
    with pytest.raises(LocalError, match="Cannot keep a shard in"):
        shards.make()


def test_a_shard_that_runs_is_never_deleted(shards: Shards) -> None:
    first, second = shards.make(pairs(0)), shards.make(pairs(2))
    age(first, 1)
    cache = ShardCache(shards.folder, 2 * shards.each, in_use=lambda: [first])
    third = cache.make(shards.model, shards.digest, pairs(4))
    assert shards.files() == {first, third}
    assert not second.exists()
    full = ShardCache(shards.folder, 2 * shards.each, in_use=lambda: [first, third])
    with pytest.raises(LocalError, match="of it by those that run; keep less of the model"):
        full.make(shards.model, shards.digest, pairs(6))
    assert shards.files() == {first, third}


class Thin:
    """A ranking of a model with scores of its neurons."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        weights = {"x": [[1.0] * 16] * 3}
        self.ranking = rank(shards.digest, "counts", range(3), weights, ((),) * 3)
        self.neurons = np.random.default_rng(1).random((3, 1, 16, 64), np.float32)

    def make(self, kept: int, neurons: Floats | None, progress: Progress | None = None) -> Path:
        shards = self.shards
        shard = Shard(ShardKind.THIN, digest_of(self.ranking), 8, kept, (1 << kept) - 1)
        return ShardCache(shards.folder, None).make_thin(
            shards.model, shards.digest, self.ranking, neurons, shard, progress=progress
        )


def test_a_thin_shard_is_made_once_for_each_width(shards: Shards) -> None:
    thin = Thin(shards)
    told: list[tuple[int, int]] = []
    path = thin.make(5, thin.neurons, lambda *step: told.append(step))
    size = path.stat().st_size
    assert (told[0], told[-1]) == ((0, size), (size, size))
    made = path.stat().st_ino
    assert thin.make(5, thin.neurons) == path
    assert path.stat().st_ino == made
    assert thin.make(6, thin.neurons).stat().st_size > size
    assert len(shards.files()) == 2
    card = shards.store.open(path).card
    assert card.experts == shards.model.card.experts


def test_a_thin_shard_has_the_best_neurons(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slice_module, "COPY_STEP_BYTES", 1000)  # less than a matrix
    thin = Thin(shards)
    shard, whole = tensors(loaded(thin.make(5, thin.neurons))), tensors(whole_of(shards))
    for layer in range(3):
        best = np.sort(np.argsort(-thin.neurons[layer, 0], axis=1)[:, :40], axis=1)
        for part, axis in (("gate", 1), ("up", 1), ("down", 2)):
            name = f"blk.{layer}.ffn_{part}_exps.weight"
            (columns, rows, experts), _, data = whole[name]
            matrix = np.frombuffer(data, np.float32).reshape(experts, rows, columns)
            indices = best[:, :, None] if axis == 1 else best[:, None, :]
            expected = np.take_along_axis(matrix, indices, axis)
            assert shard[name][2] == expected.tobytes()


def test_what_a_thin_shard_cannot_be_made_of_is_named(shards: Shards) -> None:
    thin = Thin(shards)
    with pytest.raises(LocalError, match=r"no scores of the neurons .*experts rank model"):
        thin.make(5, None)
    with pytest.raises(ModelError, match="another ranking"):
        thin.make(9, thin.neurons)
    thin.ranking = replace(thin.ranking, model=ModelDigest("b" * 64))
    with pytest.raises(ModelError, match="the ranking is of another model"):
        thin.make(5, thin.neurons)
    assert not shards.files()
