"""Scores of experts and neurons, against the formulas written out."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from p2pmesh.errors import ModelError
from p2pmesh.models import expert_scores
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.expert_scores import layer_scores, ranking_of
from p2pmesh.models.imatrix import DownTensor, down_tensors
from p2pmesh.models.importance import ordered
from p2pmesh.models.store import Store
from tests.models.imatrices import random_imatrix
from tests.models.layouts import moe_gguf

Q8_0 = gguf.GGMLQuantizationType.Q8_0
F32 = gguf.GGMLQuantizationType.F32


def found(store: Store, path: Path, kind: gguf.GGMLQuantizationType = F32) -> dict[int, DownTensor]:
    return down_tensors(store.open(moe_gguf(path, "qwen3moe", kind=kind)))


def nothing(_done: int, _total: int) -> None:
    pass


@pytest.mark.parametrize("kind", [F32, Q8_0])
@pytest.mark.parametrize("chunk_bytes", [1, expert_scores.CHUNK_BYTES])
def test_the_scores_are_those_of_the_formulas(
    kind: gguf.GGMLQuantizationType,
    chunk_bytes: int,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(expert_scores, "CHUNK_BYTES", chunk_bytes)
    tensors = found(store, tmp_path / "moe.gguf", kind)
    matrices = [random_imatrix(tensors, seed=seed) for seed in (1, 2)]
    down = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(tmp_path / "moe.gguf").tensors
    }
    for scores in layer_scores(tensors, matrices, nothing):
        squares = down[tensors[scores.layer].info.name].astype(np.float64) ** 2
        for domain, matrix in enumerate(matrices):
            seen = matrix.layers[scores.layer]
            outputs = np.einsum("ej,eij->eij", seen.in_sum2.astype(np.float64), squares)
            assert np.allclose(scores.counts[domain], seen.counts)
            assert np.allclose(scores.energy[domain], outputs.sum(axis=(1, 2)), rtol=1e-4)
            per_token = outputs.sum(axis=1) / seen.counts.sum()
            assert np.allclose(scores.neurons[domain], per_token, rtol=1e-4)
            peaks = outputs.sum(axis=2).max(axis=1) / np.maximum(seen.counts, 1)
            assert np.allclose(scores.peak[domain], peaks, rtol=1e-4)


def test_experts_are_ranked_by_tokens_and_energy(store: Store, tmp_path: Path) -> None:
    tensors = found(store, tmp_path / "moe.gguf")
    scores = list(layer_scores(tensors, [random_imatrix(tensors)], nothing))
    for method in ("counts-energy", "counts"):
        ranking = ranking_of(ModelDigest("a" * 64), method, ["text"], scores)
        for one, (order,) in zip(scores, ordered(ranking, "text"), strict=True):
            exact = one.counts[0]
            if method == "counts-energy":
                exact = np.sqrt(one.counts[0] * one.energy[0])
            assert (np.diff(exact[list(order)]) <= exact.max() / 2**16).all()
            assert order[-1] == 0  # no token reached it
    assert ranking.critical == ((), (), ())


def test_an_outlier_of_one_channel_is_critical(store: Store, tmp_path: Path) -> None:
    tensors = found(store, tmp_path / "moe.gguf")
    matrix = random_imatrix(tensors)
    matrix.layers[1].in_sum2[5, 7] *= 1e6
    scores = list(layer_scores(tensors, [random_imatrix(tensors), matrix], nothing))
    ranking = ranking_of(ModelDigest("a" * 64), "counts-energy", ["calm", "odd"], scores)
    assert ranking.critical == ((), (5,), ())


def test_progress_ends_with_all_layers(store: Store, tmp_path: Path) -> None:
    tensors = found(store, tmp_path / "moe.gguf")
    told: list[tuple[int, int]] = []
    list(layer_scores(tensors, [random_imatrix(tensors)], lambda *step: told.append(step)))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_damaged_weights_and_a_cut_file_are_named(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "moe.gguf"
    tensors = found(store, path)
    data = bytearray(path.read_bytes())
    at = tensors[0].at_bytes
    data[at : at + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"'blk\.0\.ffn_down_exps\.weight' is damaged"):
        list(layer_scores(tensors, [random_imatrix(tensors)], nothing))
    path.write_bytes(data[:at])
    with pytest.raises(ModelError, match="became shorter while it was read"):
        list(layer_scores(tensors, [random_imatrix(tensors)], nothing))
