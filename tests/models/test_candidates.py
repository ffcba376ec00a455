from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from p2pmesh.errors import LocalError, ModelError
from p2pmesh.home import Home
from p2pmesh.models import rankings
from p2pmesh.models.candidates import Candidate, candidates
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.importance import Ranking, digest_of, rank
from p2pmesh.models.parts import UNMEASURED, ShardKind
from p2pmesh.models.slice import of_headers
from p2pmesh.models.store import ModelFile, Store, read_header
from p2pmesh.models.thin import thin_layout_of
from tests.models.builders import tiny_gguf
from tests.models.layouts import EXPERTS, moe_gguf
from tests.models.sliced import assert_kept
from tests.models.test_slice import loaded


def ranking(layers: tuple[int, ...] = (0, 1, 2)) -> Ranking:
    """The last expert of each layer is the most important one."""
    rows = [[float(expert) for expert in range(EXPERTS)]] * len(layers)
    critical = [()] * len(layers)
    return rank(ModelDigest("a" * 64), "counts-energy", layers, {"text": rows}, critical)


def opened(path: Path) -> ModelFile:
    return Store(Home.at(path.parent / "home"), environ={}).open(path)


def expert_shards(model: ModelFile, one: Ranking) -> list[Candidate]:
    return list(candidates(ShardKind.EXPERTS, model, one, Path("/nowhere")))


def test_shards_of_whole_experts_hold_the_first_places(tmp_path: Path) -> None:
    path = moe_gguf(tmp_path / "moe.gguf", "qwen3moe")
    shards = expert_shards(opened(path), ranking())
    assert [one.quality.critical for one in shards] == [*range(8, 16)]
    assert shards[0].holds == "8 of 16 experts"
    quality = shards[0].quality
    assert quality.kind is ShardKind.EXPERTS
    assert quality.ranking == digest_of(ranking())
    assert quality.divergence == UNMEASURED
    assert quality.coverage == pytest.approx(1e6 * sum(range(8, 16)) / sum(range(16)), abs=20)
    output = tmp_path / "shard.gguf"
    assert shards[0].write(output, lambda _done, _total: None) == output.stat().st_size
    assert_kept(loaded(path), loaded(output), dict.fromkeys(range(3), tuple(range(8, 16))))


def test_what_progress_raises_stops_the_writing(tmp_path: Path) -> None:
    path = moe_gguf(tmp_path / "moe.gguf", "qwen3moe")
    [shard, *_] = expert_shards(opened(path), ranking())

    def stop(_done: int, _total: int) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        shard.write(tmp_path / "shard.gguf", stop)
    assert {one.name for one in tmp_path.iterdir()} <= {"moe.gguf", "home"}


def test_groups_of_experts_are_counted_as_experts(tmp_path: Path) -> None:
    path = moe_gguf(tmp_path / "moe.gguf", "deepseek-v3")
    shards = expert_shards(opened(path), ranking((1, 2)))
    assert [(one.quality.places, one.holds) for one in shards] == [
        (4, "8 of 16 experts"),
        (4, "12 of 16 experts"),
    ]


def test_models_without_experts_and_rankings_of_others_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="it has no experts"):
        expert_shards(opened(tiny_gguf(tmp_path / "dense.gguf")), ranking())
    path = moe_gguf(tmp_path / "moe.gguf", "qwen3moe")
    with pytest.raises(ModelError, match="of a model with other experts"):
        expert_shards(opened(path), ranking((0, 9)))


def test_thin_shards_hold_the_first_neurons(tmp_path: Path) -> None:
    path = moe_gguf(tmp_path / "moe.gguf", "qwen3moe")
    model = opened(path)
    layout = of_headers(model, thin_layout_of)
    scores = np.ones((1, EXPERTS, layout.width), dtype=np.float32)
    neurons = rankings.save_neurons(tmp_path, [scores] * 3)
    with pytest.raises(LocalError, match="p2pmesh experts rank moe"):
        candidates(ShardKind.THIN, model, replace(ranking(), neurons=None), tmp_path)
    shards = candidates(ShardKind.THIN, model, replace(ranking(), neurons=neurons), tmp_path)
    assert {one.kind for one in shards} == {ShardKind.THIN}
    assert shards[0].holds == f"{layout.width // 2} of {layout.width} neurons"
    output = tmp_path / "shard.gguf"
    shards[0].write(output, lambda _done, _total: None)
    assert read_header(output).metadata["qwen3moe.expert_feed_forward_length"] == layout.width // 2
