"""What is read of importance matrices, and which are refused for which model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from p2pmesh.errors import LocalError, ModelError
from p2pmesh.models.imatrix import DownTensor, down_tensors, read_imatrix, saved_chunks
from p2pmesh.models.store import Store
from tests.models.builders import tiny_gguf
from tests.models.imatrices import random_imatrix, write_imatrix
from tests.models.layouts import EXPERT, EXPERTS, moe_gguf

Tensors = dict[int, DownTensor]


@pytest.fixture
def tensors(store: Store, tmp_path: Path) -> Tensors:
    return down_tensors(store.open(moe_gguf(tmp_path / "moe.gguf", "qwen3moe")))


def test_the_experts_of_a_model_are_found(tensors: Tensors) -> None:
    assert list(tensors) == [0, 1, 2]
    assert {(tensor.width, tensor.experts) for tensor in tensors.values()} == {(EXPERT, EXPERTS)}


def test_dense_layers_and_those_for_drafts_are_left_out(store: Store, tmp_path: Path) -> None:
    assert list(down_tensors(store.open(moe_gguf(tmp_path / "moe.gguf", "glm4moe")))) == [1]


def test_a_model_of_several_files_has_all_its_experts(store: Store, tmp_path: Path) -> None:
    first = moe_gguf(tmp_path / "moe.gguf", "qwen3moe", split_tensors=9)
    found = down_tensors(store.open(first))
    assert list(found) == [0, 1, 2]
    assert len({tensor.path for tensor in found.values()}) > 1


def test_a_model_without_experts_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="it has no experts"):
        down_tensors(store.open(tiny_gguf(tmp_path / "dense.gguf")))


def test_what_was_written_is_read(tensors: Tensors, tmp_path: Path) -> None:
    matrix = random_imatrix(tensors, chunks=12)
    found = read_imatrix(write_imatrix(tmp_path / "imatrix.gguf", tensors, matrix), tensors)
    assert found.chunks == 12
    for layer, statistics in matrix.layers.items():
        assert np.array_equal(found.layers[layer].counts, statistics.counts)
        assert np.array_equal(found.layers[layer].in_sum2, statistics.in_sum2)


def test_a_file_that_is_no_importance_matrix_is_refused(tensors: Tensors, tmp_path: Path) -> None:
    matrix = random_imatrix(tensors)
    model = write_imatrix(tmp_path / "model.gguf", tensors, matrix, kind="model")
    with pytest.raises(ModelError, match="it is no importance matrix"):
        read_imatrix(model, tensors)
    (tmp_path / "imatrix.dat").write_bytes(b"\x90\0\0\0")
    with pytest.raises(ModelError, match="--output-format gguf makes one"):
        read_imatrix(tmp_path / "imatrix.dat", tensors)
    with pytest.raises(LocalError, match="No such file"):
        read_imatrix(tmp_path / "none.gguf", tensors)


def test_a_cut_file_is_refused_and_counts_as_not_saved(tensors: Tensors, tmp_path: Path) -> None:
    whole = write_imatrix(tmp_path / "imatrix.gguf", tensors, random_imatrix(tensors, chunks=5))
    assert saved_chunks(whole) == 5
    whole.write_bytes(whole.read_bytes()[:-100])
    assert saved_chunks(whole) == 0
    assert saved_chunks(tmp_path / "none.gguf") == 0
    with pytest.raises(ModelError, match=r"imatrix\.gguf cannot be used"):
        read_imatrix(whole, tensors)


def test_a_matrix_of_another_model_is_refused(
    tensors: Tensors, store: Store, tmp_path: Path
) -> None:
    path = write_imatrix(tmp_path / "imatrix.gguf", tensors, random_imatrix(tensors))
    wider = down_tensors(store.open(moe_gguf(tmp_path / "wide.gguf", "mixtral")))
    fewer = {layer: tensors[layer] for layer in (0, 1)}
    for other in (wider, {**tensors, 3: renamed(tensors[0], 3)}):
        with pytest.raises(ModelError, match="it is of another model"):
            read_imatrix(path, other)
    with pytest.raises(ModelError, match="is of another model: this one has no experts for"):
        read_imatrix(path, fewer)


def renamed(tensor: DownTensor, layer: int) -> DownTensor:
    name = f"blk.{layer}.ffn_down_exps.weight"
    return replace(tensor, info=replace(tensor.info, name=name))


@pytest.mark.parametrize("value", [-1.0, np.inf, np.nan])
def test_numbers_that_are_no_sums_are_refused(
    value: float, tensors: Tensors, tmp_path: Path
) -> None:
    matrix = random_imatrix(tensors)
    matrix.layers[1].in_sum2[3, 4] = value
    with pytest.raises(ModelError, match=r"'blk\.1\.ffn_down_exps\.weight\.in_sum2' is damaged"):
        read_imatrix(write_imatrix(tmp_path / "imatrix.gguf", tensors, matrix), tensors)
