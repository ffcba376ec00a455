"""Rankings and scores of neurons as files."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from p2pmesh.errors import LocalError, ModelError
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.importance import Neurons, Ranking, digest_of, rank
from p2pmesh.models.rankings import load, load_neurons, newest, save, save_neurons

SCORES = np.arange(2 * 1 * 3 * 5, dtype=np.float32).reshape(2, 1, 3, 5)


def ranking(neurons: Neurons | None = None) -> Ranking:
    rows = {"text": [[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]}
    return rank(ModelDigest("a" * 64), "counts-energy", (0, 1), rows, ((), (2,)), neurons=neurons)


def test_a_ranking_is_found_by_its_digest(tmp_path: Path) -> None:
    folder = tmp_path / "home" / "rankings"
    path = save(folder, ranking())
    assert path == folder / f"{digest_of(ranking())}.ranking"
    assert load(folder, digest_of(ranking())) == ranking()
    path.unlink()
    assert load(folder, digest_of(ranking())) is None


def test_a_changed_ranking_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, ranking())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="is damaged: its bytes are not those that its name says"):
        load(tmp_path, digest_of(ranking()))


def test_the_newest_ranking_of_a_model_is_found(tmp_path: Path) -> None:
    assert newest(tmp_path / "none", ModelDigest("a" * 64)) is None
    later = replace(ranking(), critical=((), ()))
    other = replace(ranking(), model=ModelDigest("b" * 64))
    for at_s, one in enumerate((ranking(), later, other)):
        os.utime(save(tmp_path, one), (at_s, at_s))
    (tmp_path / f"{'c' * 64}.ranking").write_bytes(b"damaged, and newer than all")
    assert newest(tmp_path, ModelDigest("a" * 64)) == later
    assert newest(tmp_path, ModelDigest("b" * 64)) == other
    assert newest(tmp_path, ModelDigest("c" * 64)) is None


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LocalError, match="choose another --home"):
        save(tmp_path / "file" / "rankings", ranking())


def test_the_scores_of_neurons_are_found_by_the_ranking(tmp_path: Path) -> None:
    neurons = save_neurons(tmp_path, list(SCORES))
    assert neurons.width == 5
    found = load_neurons(tmp_path, ranking(neurons))
    assert found is not None
    assert np.array_equal(found, SCORES)
    assert load_neurons(tmp_path, ranking()) is None
    assert load_neurons(tmp_path, ranking(replace_digest(neurons))) is None
    assert {path.suffix for path in tmp_path.iterdir()} == {".neurons"}


def replace_digest(neurons: Neurons) -> Neurons:
    return neurons._replace(digest="c" * 64)


@pytest.mark.parametrize("change", [lambda data: data[:-4], lambda data: bytes(len(data))])
def test_changed_scores_are_refused(change: object, tmp_path: Path) -> None:
    neurons = save_neurons(tmp_path, list(SCORES))
    (path,) = tmp_path.iterdir()
    assert callable(change)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ModelError, match="run p2pmesh experts rank again"):
        load_neurons(tmp_path, ranking(neurons))


def test_the_digest_of_a_ranking_covers_its_neurons() -> None:
    with_neurons = replace(ranking(), neurons=Neurons("b" * 64, 5))
    assert digest_of(with_neurons) != digest_of(ranking())
