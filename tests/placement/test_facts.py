from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import TypeVar

from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.models.parts import ShardKind, ShardQuality
from p2pmesh.placement.facts import (
    FORMAT,
    ModelFacts,
    NodeFacts,
    PlacementInputs,
    PlacementRequest,
    Resident,
    facts_digest,
)
from p2pmesh.wire.codec import decode
from tests.placement.placement_strategies import GIB, any_facts, facts_of, model, node

Part = TypeVar("Part")


@given(any_facts, st.integers(0, 2**32))
def test_neither_order_nor_repetition_matters(facts: PlacementInputs, seed: int) -> None:
    rng = Random(seed)

    def shuffled(parts: tuple[Part, ...]) -> tuple[Part, ...]:
        return tuple(rng.sample(parts * 2, 2 * len(parts)))

    again = PlacementInputs(
        nodes=shuffled(facts.nodes),
        models=shuffled(tuple(replace(m, holders=shuffled(m.holders)) for m in facts.models)),
        wants=shuffled(facts.wants),
        residents=shuffled(facts.residents),
    )
    assert again == facts
    assert again.encode() == facts.encode()
    assert facts_digest(again) == facts_digest(facts)


@given(any_facts, any_facts)
def test_different_facts_have_different_bytes(one: PlacementInputs, other: PlacementInputs) -> None:
    assert (one == other) == (one.encode() == other.encode())
    assert (one == other) == (facts_digest(one) == facts_digest(other))


@given(any_facts)
def test_the_bytes_are_canonical(facts: PlacementInputs) -> None:
    assert decode(facts.encode(), bytes_max=1 << 20)[0] == FORMAT


def test_every_field_reaches_the_digest() -> None:
    a, b = node("a"), node("b")
    quality = ShardQuality(ShardKind.EXPERTS, "ab" * 32, 16, 8, 50_000, 930_000)
    base = facts_of(
        {a: GIB},
        [ModelFacts(digest=model("m"), need_bytes=1, holders=(a,))],
        [PlacementRequest(owner=a, digest=model("m"))],
        [Resident(node=a, digest=model("m"), state="loading")],
    )
    part, described, want, resident = (
        base.nodes[0],
        base.models[0],
        base.wants[0],
        base.residents[0],
    )
    others = [
        replace(base, nodes=(replace(part, node=b),)),
        replace(base, nodes=(replace(part, budget_bytes=GIB + 1),)),
        replace(base, nodes=(replace(part, confined=True),)),
        replace(base, models=(replace(described, digest=model("n")),)),
        replace(base, models=(replace(described, need_bytes=2),)),
        replace(base, models=(replace(described, holders=(a, b)),)),
        replace(base, models=(replace(described, fallback=True),)),
        replace(base, models=(replace(described, own_needs=((a, 2),)),)),
        replace(base, models=(replace(described, expert_bytes=((a, 1),)),)),
        replace(base, models=(replace(described, qualities=(quality,)),)),
        replace(base, models=(replace(described, hearsay=(quality,)),)),
        replace(base, models=(replace(described, smaller=(model("n"),)),)),
        replace(base, models=(replace(described, failing=(a,)),)),
        replace(base, wants=(replace(want, owner=b),)),
        replace(base, wants=(replace(want, digest=model("n")),)),
        replace(base, wants=(replace(want, replicas=2),)),
        replace(base, wants=(replace(want, priority=1),)),
        replace(base, residents=(replace(resident, node=b),)),
        replace(base, residents=(replace(resident, digest=model("n")),)),
        replace(base, residents=(replace(resident, state="ready"),)),
    ]
    assert len({facts_digest(facts) for facts in [base, *others]}) == 1 + len(others)


def test_a_holder_that_says_what_all_say_is_no_exception() -> None:
    a, b, c = node("a"), node("b"), node("c")
    one = ModelFacts(digest=model("m"), need_bytes=5, holders=(a, b, c), own_needs=((b, 7), (a, 5)))
    assert one.own_needs == ((b, 7),)
    assert [one.need_on(n) for n in (a, b, c)] == [5, 7, 5]


def test_of_two_claims_the_larger_stands() -> None:
    a = node("a")
    facts = PlacementInputs(
        nodes=(NodeFacts(node=a, budget_bytes=3), NodeFacts(node=a, budget_bytes=5)),
        residents=(
            Resident(node=a, digest=model("m"), state="ready"),
            Resident(node=a, digest=model("m"), state="loading"),
        ),
    )
    assert facts.nodes == (NodeFacts(node=a, budget_bytes=5),)
    assert [resident.state for resident in facts.residents] == ["ready"]
