"""The laws of a document: told the same, whatever came first, all come to hold the same."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from p2pmesh.identity.keys import NodeId
from p2pmesh.state import owner_records as bounds
from p2pmesh.state.document import Document, MergeOutcome
from p2pmesh.state.fingerprint import fingerprint_of
from p2pmesh.wire.evidence import Certificate, Fork
from p2pmesh.wire.records import Record
from tests.state.builders import MESH, NODES
from tests.state.facts import (
    FACTS,
    LATER,
    RECORDS,
    items,
    raws,
    some_facts,
    some_records,
    tell,
    told,
    written,
)

# --- a CRDT ---------------------------------------------------------------------------------------


@given(some_facts, st.randoms(use_true_random=False))
def test_the_order_of_arrival_does_not_matter(facts: list[int], rng: Any) -> None:
    shuffled = list(facts)
    rng.shuffle(shuffled)
    one, other = told(facts), told(shuffled)
    assert one.ids() == other.ids()
    assert raws(one) == raws(other)
    assert one.fingerprint == other.fingerprint
    assert one.removed == other.removed
    assert one.held(LATER) == other.held(LATER)


@given(some_facts, some_facts)
def test_merging_again_or_in_two_parts_changes_nothing(left: list[int], right: list[int]) -> None:
    together = told(left + right)
    assert told(left + right + left).ids() == together.ids()
    # Parts, that is documents, not what was told to them: nothing else travels in a repair.
    parts = told([*items(told(right)), *items(told(left)), *items(told(right))])
    waited = told([*items(parts), *(FACTS[fact] for fact in left + right)])
    assert waited.ids() == together.ids()
    # A record that waited for a lease was in neither part; nothing else is missing from them.
    for item in parts.ids():
        mine, theirs = parts.item(item), together.item(item)
        if theirs is None and isinstance(mine, Record):
            theirs = together.get(*mine.key)
            assert theirs is not None
            assert theirs.version > mine.version
        assert theirs is not None


@given(some_records, some_records, some_records)
def test_records_merge_in_any_grouping(one: list[int], two: list[int], three: list[int]) -> None:
    # With a lease of the newest epoch in each part nothing has to wait, unseen.
    leases = [written(owner, "member", 1, 0) for owner in (0, 1)]
    lists = [[*leases, *(RECORDS[n] for n in numbers)] for numbers in (one, two, three)]
    a, b, c = (items(told(facts)) for facts in lists)
    left = told([*items(told([*a, *b])), *c])
    right = told([*a, *items(told([*b, *c]))])
    assert left.ids() == right.ids()


@given(some_facts, some_facts)
def test_equal_fingerprints_mean_equal_items(left: list[int], right: list[int]) -> None:
    one, other = told(left), told(right)
    assert (one.fingerprint == other.fingerprint) == (one.ids() == other.ids())
    assert one.fingerprint == fingerprint_of(one.ids())


@given(some_facts)
def test_every_item_is_found_by_its_id(facts: list[int]) -> None:
    document = told(facts)
    found = items(document)
    records = [item for item in found if isinstance(item, Record)]
    assert sorted(one.raw for one in records) == sorted(raws(document))
    assert {i.subject for i in found if isinstance(i, Certificate)} == document.removed
    for owner in NODES:
        forks = [item for item in found if isinstance(item, Fork) and item.owner == owner]
        assert {fork.id for fork in forks} == {fork.id for fork in document.forks(owner)}
    standing = set(document.ids())
    for record_ in RECORDS:
        assert (document.item(record_.digest) is not None) == (record_.digest in standing)


@given(some_records)
def test_stale_says_nothing_that_judging_would_not(records: list[int]) -> None:
    document = told(records)
    for one in RECORDS:
        outcome = document.judge(one, LATER)
        if document.stale(one.owner, one.register, one.epoch, one.seq):
            assert outcome is MergeOutcome.STALE
        elif outcome is MergeOutcome.STALE:  # the very one that stands, or that waits
            mine = document.get(one.owner, one.register)
            assert mine == one or one.key[1] == "caps"
        rival = document.get(one.owner, one.register)
        same = rival is not None and (rival.epoch, rival.seq) == (one.epoch, one.seq)
        assert (outcome is MergeOutcome.EQUIVOCATION) == (
            same and rival is not None and rival.digest != one.digest
        )


# --- replicas -------------------------------------------------------------------------------------


class Replicas(RuleBasedStateMachine):
    """Three documents that hear things in their own order, under bounds that bite."""

    @initialize()
    def begin(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(bounds, "REGISTERS_PER_OWNER_MAX", 2)
        self.documents = [Document(MESH) for _ in range(3)]
        self.newest: list[dict[tuple[NodeId, str], tuple[int, int, bytes]]] = [{}, {}, {}]
        self.now = LATER

    @rule(which=st.integers(0, 2), facts=some_facts)
    def hear(self, which: int, facts: list[int]) -> None:
        tell(self.documents[which], [FACTS[fact] for fact in facts], self.now)

    @rule(which=st.integers(0, 2))
    def look(self, which: int) -> None:
        self.documents[which].expire(self.now)

    @rule(seconds=st.integers(1, 60))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule(one=st.integers(0, 2), other=st.integers(0, 2))
    def repair(self, one: int, other: int) -> None:
        tell(self.documents[one], items(self.documents[other]), self.now)

    @precondition(lambda self: hasattr(self, "documents"))
    @invariant()
    def holds(self) -> None:
        for document, newest in zip(self.documents, self.newest, strict=True):
            ids = document.ids()
            assert ids == sorted(ids)
            assert document.fingerprint == fingerprint_of(ids)
            items(document)
            for one in document.records():
                assert one.version >= newest.get(one.key, one.version)
                newest[one.key] = one.version
            assert all(len(document.registers(owner)) <= 2 for owner in document.owners)

    def teardown(self) -> None:
        if not hasattr(self, "documents"):
            return
        for document in self.documents:
            document.expire(self.now)
        rounds = 0
        while len({document.fingerprint for document in self.documents}) > 1:
            rounds += 1
            assert rounds <= 5, "they do not come to agree"
            for document in self.documents:
                for other in self.documents:
                    tell(document, items(other), self.now)
        self.patch.undo()


TestReplicas = Replicas.TestCase
TestReplicas.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
