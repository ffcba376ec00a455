from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.gateway.route import choose, rank_auto
from p2pmesh.models.cards import ModelDigest
from tests.gateway.fake import HERE, THERE, YONDER, model, target

RNG = random.Random(1)


def test_nobody_is_chosen_from_none() -> None:
    assert choose([], {}, RNG) is None


def test_the_local_replica_is_first_while_it_has_room() -> None:
    here, there = target(HERE, slots=2), target(THERE, slots=2)
    for busy in (0, 1):
        for _ in range(10):
            assert choose([there, here], {here.key: busy}, RNG) == here


def test_a_local_replica_of_unknown_size_is_first() -> None:
    here, there = target(HERE), target(THERE)
    assert choose([here, there], {here.key: 99}, RNG) == here


def test_a_full_local_replica_competes_with_the_others() -> None:
    here, there = target(HERE, slots=2), target(THERE, slots=2)
    assert choose([here, there], {here.key: 2, there.key: 1}, RNG) == there
    assert choose([here, there], {here.key: 2, there.key: 3}, RNG) == here


def test_load_counts_per_slot() -> None:
    small, large = target(THERE, slots=1), target(YONDER, slots=8)
    for _ in range(10):
        assert choose([small, large], {small.key: 1, large.key: 7}, RNG) == large
        assert choose([small, large], {small.key: 1, large.key: 9}, RNG) == small


def test_what_was_tried_is_not_chosen_again() -> None:
    here, there = target(HERE), target(THERE)
    assert choose([here, there], {}, RNG, tried={here.key}) == there
    assert choose([here, there], {}, RNG, tried={here.key, there.key}) is None


def test_equally_idle_replicas_share_the_requests() -> None:
    there, yonder = target(THERE), target(YONDER)
    drawn: Counter[str] = Counter()
    for _ in range(400):
        chosen = choose([there, yonder], {}, RNG)
        assert chosen is not None
        drawn[chosen.node_name] += 1
    assert min(drawn["there"], drawn["yonder"]) > 150


SHARDS = [
    target(node, part=f"shard-{number:016x}") for number, node in enumerate((HERE, THERE, YONDER))
]


def test_a_conversation_stays_on_its_shard_whoever_is_asked_and_however_busy() -> None:
    drawn: Counter[str] = Counter()
    for number in range(300):
        beginning = [{"role": "user", "content": f"question {number}"}]
        chosen = choose(SHARDS, {}, RNG, beginning=beginning)
        assert chosen is not None
        drawn[chosen.node_name] += 1
        busy = {chosen.key: 50}
        assert choose(SHARDS[::-1], busy, RNG, beginning=list(beginning)) == chosen
        left = [one for one in SHARDS if one != chosen]
        moved = choose(left, {}, RNG, beginning=beginning)
        assert moved == choose(SHARDS, {}, RNG, tried={chosen.key}, beginning=beginning)
        assert choose(SHARDS, {}, RNG, beginning=b"%d" % number) is not None
    assert min(drawn.values()) > 60, "they share the conversations"


def test_the_death_of_one_shard_moves_only_its_conversations() -> None:
    for number in range(100):
        before = choose(SHARDS, {}, RNG, beginning=number)
        after = choose(SHARDS[:2], {}, RNG, beginning=number)
        assert before in (after, SHARDS[2])


def test_conversations_do_not_bind_requests_to_whole_models() -> None:
    here, there = target(HERE, slots=1), target(THERE, slots=1)
    assert {choose([here, there], {here.key: busy}, RNG, beginning="x") for busy in (0, 5)} == {
        here,
        there,
    }


@given(
    loads=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    tried=st.sets(st.integers(0, 2)),
    seed=st.integers(),
)
def test_a_choice_is_a_candidate_that_was_not_tried(
    loads: list[int], tried: set[int], seed: int
) -> None:
    nodes = [HERE, THERE, YONDER][: len(loads)]
    candidates = [target(node, slots=4) for node in nodes]
    in_flight = {t.key: load for t, load in zip(candidates, loads, strict=True)}
    used = {candidates[i].key for i in tried if i < len(candidates)}
    chosen = choose(candidates, in_flight, random.Random(seed), tried=used)
    if len(used) == len(candidates):
        assert chosen is None
    else:
        assert chosen in candidates
        assert chosen is not None
        assert chosen.key not in used


def test_auto_prefers_ready_then_anything_but_the_demo_then_the_kind_then_the_largest() -> None:
    def digest(letter: str) -> ModelDigest:
        return ModelDigest(letter * 64)

    demo = model(digest("0"), "demo", size_bytes=999, demo=True)
    loading = model(digest("1"), "big", state="loading", size_bytes=500)
    plain = model(digest("2"), "plain", modality="completion", size_bytes=400)
    small = model(digest("3"), "small", size_bytes=10)
    large = model(digest("4"), "large", size_bytes=20)
    failed = model(digest("5"), "failed", state="failed", size_bytes=900)
    vectors = model(digest("6"), "vectors", modality="embedding", size_bytes=900)
    wanted = ("chat", "completion")
    ranking = [large, small, plain, demo, loading]
    everything = [vectors, failed, *reversed(ranking)]
    assert rank_auto(everything, wanted) == ranking


def test_auto_leaves_out_what_nobody_placed() -> None:
    huge = model(ModelDigest("a" * 64), "huge", size_bytes=2**63, placed=False)
    small = model(ModelDigest("b" * 64), "small", size_bytes=1)
    assert rank_auto([huge, small], ("chat",)) == [small]


def test_auto_takes_a_model_that_any_of_its_nodes_says_can_do_it() -> None:
    doubtful = model(
        ModelDigest("a" * 64),
        "doubtful",
        gives=frozenset({"chat", "embedding"}),
    )
    surely = model(ModelDigest("b" * 64), "surely", modality="embedding")
    assert rank_auto([doubtful, surely], ("chat", "completion")) == [doubtful]


def test_auto_is_the_same_in_any_order() -> None:
    twins = [model(ModelDigest(c * 64), f"m{c}") for c in "abc"]
    assert rank_auto(twins, ("chat",)) == rank_auto(twins[::-1], ("chat",)) == twins
