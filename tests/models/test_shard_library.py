from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from p2pmesh.errors import LocalError, ModelError, PeerError
from p2pmesh.home import Home
from p2pmesh.models import measured, rankings
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.importance import (
    NEURONS_MAX,
    Neurons,
    Ranking,
    RankingDigest,
    digest_of,
    rank,
    to_bytes,
)
from p2pmesh.models.parts import QUALITIES_MAX, UNMEASURED, Shard, ShardKind, ShardQuality
from p2pmesh.models.shard_cache import ShardCache
from p2pmesh.models.shard_library import ShardLibrary
from p2pmesh.models.shards import Places
from p2pmesh.models.slice import of_headers, read_layout
from p2pmesh.models.store import Store, read_header
from p2pmesh.models.thin import thin_layout_of
from tests.models.layouts import moe_gguf

STORE = Store(Home.at(Path("/nowhere")), environ={})
FILE = STORE.embedded()
MODEL = ModelDigest("a" * 64)
LAYOUT = read_layout(FILE)


def ranking(steepness: float = 2.0, model: ModelDigest = MODEL) -> Ranking:
    row = [steepness**-place for place in range(LAYOUT.count)]
    layers = LAYOUT.layers
    return rank(model, "counts-energy", layers, {"x": [row] * len(layers)}, [()] * len(layers))


@pytest.fixture
def library(tmp_path: Path) -> ShardLibrary:
    return ShardLibrary(tmp_path / "rankings", ShardCache(tmp_path / "shards", None))


def keep(tmp_path: Path, one: Ranking) -> str:
    return rankings.save(tmp_path / "rankings", one).stem


def test_nothing_is_known_without_rankings(library: ShardLibrary) -> None:
    assert not library.look({MODEL: FILE})
    assert library.known(MODEL) == ()


def test_what_commands_find_out_is_seen_while_a_node_runs(
    tmp_path: Path, library: ShardLibrary
) -> None:
    name = keep(tmp_path, ranking())
    assert library.look({MODEL: FILE})
    [predicted] = library.known(MODEL)
    assert not predicted.is_measured
    assert predicted.coverage >= 900_000
    assert not library.look({MODEL: FILE}), "nothing has changed"
    quality = Places(ranking(), LAYOUT).quality(8, 50_000)
    measured.add(tmp_path / "rankings", name, [quality])
    assert library.look({MODEL: FILE})
    assert library.known(MODEL) == (quality, predicted)
    (tmp_path / "rankings" / f"{name}.ranking").unlink()
    assert library.look({MODEL: FILE})
    assert library.known(MODEL) == ()


def test_only_rankings_of_models_here_count(tmp_path: Path, library: ShardLibrary) -> None:
    keep(tmp_path, ranking(model=ModelDigest("b" * 64)))
    assert not library.look({MODEL: FILE})
    keep(tmp_path, ranking())
    assert not library.look({})
    assert library.look({MODEL: FILE}), "the model came later"


def test_a_damaged_ranking_or_one_of_other_experts_harms_no_other(
    tmp_path: Path, library: ShardLibrary
) -> None:
    good = keep(tmp_path, ranking())
    (tmp_path / "rankings" / f"{'0' * 64}.ranking").write_bytes(b"junk")
    (tmp_path / "rankings" / "a folder.ranking").mkdir()
    other = rank(MODEL, "counts", (0,), {"x": [[1.0, 2.0]]}, [()])
    keep(tmp_path, other)
    assert library.look({MODEL: FILE})
    assert {one.ranking for one in library.known(MODEL)} == {good}


def test_no_more_is_told_than_a_record_takes_and_measured_ones_first(
    tmp_path: Path, library: ShardLibrary
) -> None:
    places = Places(ranking(), LAYOUT)
    name = keep(tmp_path, ranking())
    rows = [places.quality(size, 1000 * (20 - size)) for size in range(5, 15)]
    measured.add(tmp_path / "rankings", name, rows)
    library.look({MODEL: FILE})
    told = library.known(MODEL)
    assert len(told) == QUALITIES_MAX
    assert all(one.is_measured for one in told)
    assert (told[0], told[-1]) == (rows[0], rows[-1]), "the best are the largest"


def test_a_ranking_goes_from_one_library_to_another(tmp_path: Path, library: ShardLibrary) -> None:
    digest = digest_of(ranking())
    other = ShardLibrary(tmp_path / "other", ShardCache(tmp_path / "other-shards", None))
    claim = Places(ranking(), LAYOUT).quality(8, 50_000)
    assert library.read(digest) is None
    keep(tmp_path, ranking())
    data = library.read(digest)
    assert data == to_bytes(ranking())
    other.take(digest, data)
    other.adopt(digest, [claim])
    assert other.read(digest) == data
    other.look({MODEL: FILE})
    assert claim in other.known(MODEL)


def test_what_was_measured_here_stands_against_what_others_say(
    tmp_path: Path, library: ShardLibrary
) -> None:
    name = RankingDigest(keep(tmp_path, ranking()))
    mine, more = (Places(ranking(), LAYOUT).quality(size, 50_000) for size in (8, 9))
    measured.add(tmp_path / "rankings", name, [mine])
    guess = mine._replace(critical=10, divergence=UNMEASURED)
    library.adopt(name, [mine._replace(divergence=0), more, guess])
    assert measured.load(tmp_path / "rankings", name) == (mine, more)


def test_what_is_told_of_coverage_is_computed_here(tmp_path: Path, library: ShardLibrary) -> None:
    name = RankingDigest(keep(tmp_path, ranking()))
    honest = Places(ranking(), LAYOUT).quality(8, 50_000)
    library.adopt(name, [honest._replace(coverage=1_000_000), honest._replace(places=7)])
    library.look({MODEL: FILE})
    assert [one for one in library.known(MODEL) if one.is_measured] == [honest]


def test_nothing_is_told_of_thin_shards_without_the_scores_of_neurons(
    tmp_path: Path, library: ShardLibrary
) -> None:
    layout = of_headers(FILE, thin_layout_of)
    scores = np.ones((1, layout.experts, layout.width), dtype=np.float32)
    neurons = rankings.save_neurons(tmp_path / "rankings", [scores] * len(LAYOUT.layers))
    name = RankingDigest(keep(tmp_path, replace(ranking(), neurons=neurons)))
    thin = ShardQuality(ShardKind.THIN, name, layout.count, 2, 50_000, 500_000)
    library.adopt(name, [thin])
    library.look({MODEL: FILE})
    assert any(one.kind is ShardKind.THIN for one in library.known(MODEL))
    rankings.neurons_path(tmp_path / "rankings", neurons).unlink()
    assert library.look({MODEL: FILE})
    assert all(one.kind is ShardKind.EXPERTS for one in library.known(MODEL))


def test_what_a_peer_sends_is_checked(tmp_path: Path, library: ShardLibrary) -> None:
    digest = digest_of(ranking())
    with pytest.raises(ModelError, match="another ranking"):
        library.take(digest, to_bytes(ranking(3.0)))
    with pytest.raises(PeerError):
        library.take(digest, b"\xc1junk")
    assert not list((tmp_path / "rankings").glob("*"))


def test_a_shard_is_made_once(tmp_path: Path, library: ShardLibrary) -> None:
    name = keep(tmp_path, ranking())
    shard = Shard(ShardKind.EXPERTS, name, LAYOUT.count, 4, 0b111111)
    seen: list[int] = []
    path = library.make(FILE, MODEL, shard, lambda done, _: seen.append(done))
    assert seen[-1] == path.stat().st_size < FILE.size_bytes
    assert read_header(path).metadata["qwen3moe.expert_count"] == 6
    before = path.stat().st_mtime_ns
    os.utime(path, ns=(1, 1))
    assert library.make(FILE, MODEL, shard, lambda *_: seen.clear()) == path
    assert seen
    assert path.stat().st_mtime_ns >= before


def test_a_thin_shard_is_made_where_the_scores_of_neurons_are(
    tmp_path: Path, library: ShardLibrary
) -> None:
    thin = of_headers(FILE, thin_layout_of)
    scores = np.random.default_rng(1).random((len(LAYOUT.layers), 1, thin.experts, thin.width))
    neurons = rankings.save_neurons(tmp_path / "rankings", list(scores.astype(np.float32)))
    name = keep(tmp_path, replace(ranking(), neurons=neurons))
    shard = Shard(ShardKind.THIN, name, thin.count, 3, 0b111)
    path = library.make(FILE, MODEL, shard)
    width = read_header(path).metadata["qwen3moe.expert_feed_forward_length"]
    assert width == 3 * thin.step
    (tmp_path / "rankings" / f"{neurons.digest}.neurons").unlink()
    with pytest.raises(LocalError, match="p2pmesh experts rank"):
        library.make(FILE, MODEL, shard)


def test_no_neurons_are_lacking_that_the_model_cannot_have(
    tmp_path: Path, library: ShardLibrary
) -> None:
    width = of_headers(FILE, thin_layout_of).width

    def thin(one: Ranking) -> Shard:
        return Shard(ShardKind.THIN, keep(tmp_path, one), 8, 3, 0b111)

    good = replace(ranking(), neurons=Neurons("0" * 64, width))
    assert library.lacks(FILE, MODEL, *thin(good)[:2]) == "neurons"
    huge = replace(good, neurons=Neurons("0" * 64, NEURONS_MAX))
    for one in (huge, replace(good, model=ModelDigest("b" * 64))):
        with pytest.raises(ModelError, match="of another model"):
            library.lacks(FILE, MODEL, *thin(one)[:2])


def test_a_shard_of_a_ranking_that_is_not_here_is_not_made(
    tmp_path: Path, library: ShardLibrary
) -> None:
    shard = Shard(ShardKind.EXPERTS, "0" * 64, LAYOUT.count, 4, 0xFF)
    with pytest.raises(ModelError, match="not here"):
        library.make(FILE, MODEL, shard)
    name = keep(tmp_path, ranking())
    with pytest.raises(ModelError, match="not here"):
        library.make(FILE, ModelDigest("b" * 64), replace_ranking(shard, name))
    with pytest.raises(ModelError, match="another ranking"):
        library.make(FILE, MODEL, replace_ranking(shard, name)._replace(places=7))


def replace_ranking(shard: Shard, ranking: str) -> Shard:
    return shard._replace(ranking=RankingDigest(ranking))


def test_a_model_without_thin_shards_has_others(tmp_path: Path, library: ShardLibrary) -> None:
    file = STORE.open(moe_gguf(tmp_path / "moe.gguf", "deepseek-v3"))
    layout = read_layout(file)
    neurons = rankings.save_neurons(
        tmp_path / "rankings", [np.ones((1, layout.count, 32), dtype=np.float32)] * 2
    )
    row = [2.0**-place for place in range(layout.count)]
    made = rank(MODEL, "counts", layout.layers, {"x": [row] * 2}, [()] * 2, neurons=neurons)
    rankings.save(tmp_path / "rankings", made)
    assert library.look({MODEL: file})
    assert [one.kind for one in library.known(MODEL)] == [ShardKind.EXPERTS]


def test_a_shard_by_a_claim_that_cannot_be_true_is_not_made(
    tmp_path: Path, library: ShardLibrary
) -> None:
    name = keep(tmp_path, ranking(1.01))
    for critical, kept in ((4, 0b1111), (5, 0xFF)):
        shard = Shard(ShardKind.EXPERTS, name, LAYOUT.count, critical, kept)
        with pytest.raises(ModelError, match="too little of the importance"):
            library.make(FILE, MODEL, shard)
    assert not list((tmp_path / "shards").glob("*.gguf"))
    path = library.make(FILE, MODEL, Shard(ShardKind.EXPERTS, name, LAYOUT.count, 8, 0xFF))
    assert path.is_file()


def test_a_damaged_ranking_is_fetched_anew(tmp_path: Path, library: ShardLibrary) -> None:
    name = keep(tmp_path, ranking())
    shard = Shard(ShardKind.EXPERTS, name, LAYOUT.count, 4, 0b1111)
    assert library.lacks(FILE, MODEL, *shard[:2]) == ""
    data = library.read(RankingDigest(name))
    assert data is not None
    (tmp_path / "rankings" / f"{name}.ranking").write_bytes(data[:-1])
    assert library.lacks(FILE, MODEL, *shard[:2]) == "ranking"
    library.take(RankingDigest(name), data)
    assert library.lacks(FILE, MODEL, *shard[:2]) == ""
