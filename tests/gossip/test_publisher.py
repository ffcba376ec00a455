from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from p2pmesh.gossip.events import Out, PersistEpoch, Send, TwinFound
from p2pmesh.gossip.publisher import (
    EARLY_FIRST,
    EARLY_LATER,
    KEPT_FOR_URGENT,
    LEASE_SHARE,
    OWNER_BURST,
    OWNER_RATE_PER_S,
    TWIN_SLACK_S,
    Publisher,
)
from p2pmesh.identity.credentials import Credential, Role
from p2pmesh.state.document import EPOCH_AHEAD_S_MAX, EXPIRY_GRACE_S, Document
from p2pmesh.state.trust import Trust, members_only
from p2pmesh.wire.messages import Push
from p2pmesh.wire.records import CREDENTIAL, Record, credential_of, verify_record
from p2pmesh.wire.registers import (
    ACCUSED,
    CAPS,
    MEMBER,
    REFRESHES_PER_S,
    REGISTERS,
    RENEWED_TTL_S_MAX,
    TTL_S_MAX,
    WANTS,
)
from tests.identity import builders
from tests.state.builders import KEYS, MESH, NODES, NOW, member, record

ME = NODES[0]
LEASE_REFRESH_S = int(REGISTERS[MEMBER].refresh_s)
LEASE_TTL_FACTOR = REGISTERS[MEMBER].ttl_factor
BODY = member().to_wire()
INSTANCE = 50
SMALL = 3  # a mesh in which leases are refreshed as often as they ever are


def publisher(
    number: int = 0,
    *,
    writing: bool = True,
    lease: bool = True,
    credential: Credential | None = None,
) -> tuple[Publisher, Document]:
    """An author that has said that it is here, unless it is not yet writing."""
    document = Document(MESH)
    one = Publisher(KEYS[number], MESH, INSTANCE, NOW, document, credential=credential)
    one.start(NOW)
    one.writing = writing
    if lease:
        one.publish(MEMBER, BODY)
        one.due(NOW, SMALL)
    return one, document


def registers(records: list[Record]) -> list[str]:
    return [record.register for record in records]


def other_life(**changes: Any) -> Record:
    """A record with the author's key that it did not write."""
    arguments = {"epoch": NOW, "instance": INSTANCE + 1, "seq": 99, "issued_at": NOW}
    return record(0, MEMBER, **{**arguments, **changes})


# Credentials


def owned(*, ttl_s: int = 86400, role: Role = Role.SERVE, now: float = NOW) -> Credential:
    return builders.credential(KEYS[0], role, now=now, ttl_s=ttl_s)


def test_what_stands_by_itself_carries_the_credential_of_its_author() -> None:
    own = owned()
    one, document = publisher(credential=own)
    for register in (WANTS, CAPS):
        one.publish(register, {"value": 1})
    assert registers(one.due(NOW, SMALL)) == [CAPS, WANTS]
    lease, wants, caps = (document.get(ME, register) for register in (MEMBER, WANTS, CAPS))
    assert lease is not None
    assert wants is not None
    assert caps is not None
    assert lease.body == {**BODY, CREDENTIAL: own.raw}
    assert credential_of(lease) == credential_of(wants) == own
    assert caps.body == {"value": 1}
    assert all(members_only(Trust(), record, NOW) for record in (lease, wants, caps))


def test_without_a_credential_nothing_is_added() -> None:
    _, document = publisher()
    lease = document.get(ME, MEMBER)
    assert lease is not None
    assert lease.body == BODY


def test_nothing_lasts_longer_than_the_credential_that_it_carries() -> None:
    one, document = publisher(credential=owned(ttl_s=100))
    one.publish(WANTS, {"value": 1})
    one.due(NOW, SMALL)
    for register in (MEMBER, WANTS):
        record = document.get(ME, register)
        assert record is not None
        assert record.expires_at == NOW + 100
        assert members_only(Trust(), record, NOW)


def test_whose_credential_has_run_out_says_no_more_until_it_has_another() -> None:
    one, document = publisher(credential=owned(ttl_s=100))
    said = [record for at in range(1, 400) for record in one.due(NOW + at / 2, SMALL)]
    assert said == [], "no other lease could last longer"
    assert one.due(NOW + 300, SMALL) == []
    fresh = owned(now=NOW + 300)
    one.use(fresh)
    (lease,) = one.due(NOW + 300, SMALL)
    assert credential_of(lease) == fresh
    assert document.get(ME, MEMBER) is lease


def test_another_credential_is_said_at_once_in_all_that_carries_one() -> None:
    one, _ = publisher(credential=owned())
    for register in (WANTS, CAPS):
        one.publish(register, {"value": 1})
    one.due(NOW, SMALL)
    better = owned(role=Role.INVITE)
    one.use(better)
    written = one.due(NOW + 1, SMALL)
    assert registers(written) == [MEMBER, WANTS]
    assert {credential_of(record) for record in written} == {better}


# Writing


def test_what_is_published_is_signed_and_stands() -> None:
    one, document = publisher()
    one.publish(CAPS, {"value": 1})
    (written,) = one.due(NOW, SMALL)
    assert document.get(ME, CAPS) is written
    assert verify_record(written)
    assert (written.epoch, written.instance, written.issued_at) == (NOW, INSTANCE, NOW)
    assert written.body == {"value": 1}
    assert one.due(NOW + 1, SMALL) == []


def test_a_lease_of_a_small_mesh_is_renewed_in_time_when_the_mesh_turns_out_large() -> None:
    one, document = publisher()
    lease = document.get(ME, MEMBER)
    assert lease is not None
    most_s = LEASE_SHARE * lease.ttl_s
    assert one.due(NOW + (1 - EARLY_FIRST) * most_s - 1, 10_000) == []
    (renewed,) = one.due(NOW + most_s, 10_000)
    assert renewed.register == MEMBER
    assert renewed.expires_at > lease.expires_at + LEASE_REFRESH_S
    assert one.due(NOW + most_s + 3 * LEASE_REFRESH_S, 10_000) == []


def test_what_it_said_itself_before_its_lease_ran_out_outranks_nobody() -> None:
    one, document = publisher()
    own = document.get(ME, MEMBER)
    assert own is not None
    document.expire(own.expires_at + 1000)
    assert one.on_own_record(own, own.expires_at + 1000) == []


def test_a_value_published_again_is_not_news() -> None:
    one, _ = publisher()
    one.publish(CAPS, {"value": 1})
    one.due(NOW, SMALL)
    one.publish(CAPS, {"value": 1})
    assert one.due(NOW, SMALL) == []


def test_of_values_that_wait_only_the_newest_is_written() -> None:
    one, _ = publisher(writing=False)
    for value in range(5):
        one.publish(CAPS, {"value": value})
    assert one.due(NOW, SMALL) == []
    one.writing = True
    assert [written.body for written in one.due(NOW, SMALL)] == [BODY, {"value": 4}]


def test_withdrawing_is_publishing_nothing() -> None:
    one, document = publisher()
    one.publish(CAPS, {"value": 1})
    one.due(NOW, SMALL)
    one.publish(CAPS, None)
    assert [written.body for written in one.due(NOW, SMALL)] == [{}]
    one.publish(CAPS, None)
    assert one.due(NOW + 1, SMALL) == []
    standing = document.get(ME, CAPS)
    assert standing is not None
    assert standing.body == {}


def test_what_others_live_on_is_written_first() -> None:
    one, _ = publisher(lease=False)
    for register in (CAPS, WANTS, MEMBER, ACCUSED):
        one.publish(register, {"value": 1})
    assert registers(one.due(NOW, SMALL)) == [MEMBER, ACCUSED, CAPS, WANTS]


def test_nothing_but_wants_is_said_before_there_is_a_lease_to_live_on() -> None:
    one, _ = publisher(lease=False)
    for register in (CAPS, WANTS, ACCUSED):
        one.publish(register, {"value": 1})
    assert registers(one.due(NOW, SMALL)) == [WANTS]
    one.publish(MEMBER, BODY)
    assert registers(one.due(NOW, SMALL)) == [MEMBER, ACCUSED, CAPS]


# Rate


def test_no_more_than_a_burst_is_written_at_once_and_the_rest_later() -> None:
    one, _ = publisher()
    pages = [f"x/{page}" for page in range(OWNER_BURST)]
    for page in pages:
        one.publish(page, {"value": 1})
    first = one.due(NOW, SMALL)
    assert len(first) == OWNER_BURST - 1 - KEPT_FOR_URGENT
    later = [one.due(NOW + second / OWNER_RATE_PER_S, SMALL) for second in range(1, 9)]
    assert [len(records) for records in later] == [1, 1, 1, 1, 1, 1, 0, 0]
    assert sorted(registers(sum(later, first))) == sorted(pages)


def test_however_much_there_is_to_say_a_refutation_is_said_at_once() -> None:
    one, _ = publisher()
    for second in range(60):
        for page in range(30):
            one.publish(f"x/{page}", {"value": second})
        one.due(NOW + second, SMALL)
    one.refute()
    one.publish(ACCUSED, {"value": 1})
    assert registers(one.due(NOW + 59, SMALL)) == [MEMBER, ACCUSED]


# Leases


@pytest.mark.parametrize(
    ("members", "refresh_s"), [(2, LEASE_REFRESH_S), (1000, 1000 // REFRESHES_PER_S)]
)
def test_the_lease_is_refreshed_and_costs_the_same_in_any_mesh(
    members: int, refresh_s: int
) -> None:
    one, _ = publisher(lease=False)
    one.publish(MEMBER, BODY)
    (first,) = one.due(NOW, members)
    assert first.ttl_s == LEASE_TTL_FACTOR * refresh_s
    assert one.due(NOW + (1 - EARLY_FIRST) * refresh_s - 1, members) == []
    (again,) = one.due(NOW + refresh_s, members)
    assert again.version > first.version
    assert one.due(NOW + (2 - EARLY_LATER) * refresh_s - 1, members) == []
    assert registers(one.due(NOW + 2 * refresh_s, members)) == [MEMBER]


def test_those_who_start_together_do_not_refresh_together() -> None:
    moments = set[float]()
    for number in range(8):
        one, _ = publisher(number, lease=False)
        one.publish(MEMBER, BODY)
        one.due(NOW, SMALL)
        seconds = range(LEASE_REFRESH_S + 1)
        moments.add(next(second for second in seconds if one.due(NOW + second, SMALL)))
    assert len(moments) > 4
    assert min(moments) >= (1 - EARLY_FIRST) * LEASE_REFRESH_S


@pytest.mark.parametrize(
    ("members", "refresh_s"), [(2, 300), (1000, 300), (3000, 600), (100_000, 3000)]
)
def test_wants_are_renewed_and_end_ten_minutes_after_their_owner(
    members: int, refresh_s: int
) -> None:
    one, _ = publisher(lease=False)
    one.publish(WANTS, {"wants": []})
    (first,) = one.due(NOW, members)
    assert first.ttl_s == refresh_s + 600 <= RENEWED_TTL_S_MAX
    assert one.due(NOW + (1 - EARLY_FIRST) * refresh_s - 1, members) == []
    assert registers(one.due(NOW + refresh_s, members)) == [WANTS]


def test_nothing_that_is_renewed_ends_before_what_it_replaces() -> None:
    one, document = publisher(lease=False)
    for register in (MEMBER, WANTS):
        one.publish(register, BODY)
        one.due(NOW, 100_000)
        before = document.get(one._me, register)
        one.publish(register, {**BODY, "more": 1})
        one.due(NOW + 1, 2)
        after = document.get(one._me, register)
        assert before is not None
        assert after is not None
        assert after.body != before.body
        assert after.expires_at == before.expires_at


def test_a_lease_lasts_no_longer_than_others_believe_however_large_the_mesh() -> None:
    one, _ = publisher(lease=False)
    one.publish(MEMBER, BODY)
    (first,) = one.due(NOW, 100_000)
    assert first.ttl_s == RENEWED_TTL_S_MAX


def test_everything_else_lasts_as_long_as_anything_may() -> None:
    one, _ = publisher()
    one.publish(CAPS, {"value": 1})
    assert [written.ttl_s for written in one.due(NOW, SMALL)] == [TTL_S_MAX]


def test_after_a_sleep_longer_than_the_lease_everything_is_said_again() -> None:
    one, document = publisher()
    one.publish(CAPS, {"value": 1})
    one.publish(ACCUSED, {"value": 1})
    last = one.due(NOW, SMALL)[-1]
    later = NOW + LEASE_TTL_FACTOR * LEASE_REFRESH_S + EXPIRY_GRACE_S
    document.expire(later)
    again = one.due(later, SMALL)
    assert registers(again) == [MEMBER, ACCUSED, CAPS]
    assert min(written.version for written in again) > last.version


def test_a_refutation_is_a_new_version_of_the_same() -> None:
    one, _ = publisher(lease=False)
    one.refute()
    assert one.due(NOW, SMALL) == []
    one.publish(MEMBER, BODY)
    (first,) = one.due(NOW, SMALL)
    one.refute()
    (second,) = one.due(NOW, SMALL)
    assert second.body == first.body
    assert (second.epoch, second.seq) > (first.epoch, first.seq)


# Other lives of the same key


@pytest.mark.parametrize("writing", [True, False])
def test_what_an_earlier_life_left_is_outdone_by_a_higher_epoch(*, writing: bool) -> None:
    one, document = publisher(writing=writing)
    one.publish(CAPS, {"value": 1})
    one.due(NOW, SMALL)
    old = other_life(epoch=NOW + 500)
    assert one.on_own_record(old, NOW) == [PersistEpoch(epoch=NOW + 501)]
    one.writing = True
    written = one.due(NOW, SMALL)
    assert registers(written) == [MEMBER, CAPS]
    assert {record.epoch for record in written} == {NOW + 501}
    assert document.get(ME, CAPS) is written[1]


def test_what_an_earlier_life_left_under_a_lower_epoch_takes_no_new_one() -> None:
    one, _ = publisher(writing=False)
    assert one.on_own_record(other_life(epoch=NOW - 500, issued_at=NOW - 400), NOW) == []
    one.writing = True
    assert [written.epoch for written in one.due(NOW, SMALL)] == [NOW]


@pytest.mark.parametrize("ahead_s", [-500, 500])
@pytest.mark.parametrize("body", [None, {"wants": [1]}], ids=["none now", "others now"])
def test_wants_of_an_earlier_life_end_with_it(ahead_s: int, body: dict[str, Any] | None) -> None:
    one, document = publisher()
    old = record(0, WANTS, epoch=NOW + ahead_s, instance=INSTANCE + 1, body={"wants": [2]})
    one.publish(WANTS, body)
    one.on_own_record(old, NOW)
    one.due(NOW, SMALL)
    assert not document.merge(old, NOW)
    standing = document.get(ME, WANTS)
    assert standing is not None
    assert standing.body == (body or {})


@pytest.mark.parametrize(
    "alive", [{"epoch": NOW}, {"epoch": NOW + 9, "issued_at": NOW + TWIN_SLACK_S + 1}]
)
@pytest.mark.parametrize(("instance", "gives_way"), [(INSTANCE - 1, True), (INSTANCE + 1, False)])
def test_of_two_that_run_at_once_the_smaller_instance_stays(
    alive: dict[str, int], instance: int, *, gives_way: bool
) -> None:
    one, _ = publisher()
    out = one.on_own_record(other_life(instance=instance, **alive), NOW + 10)
    assert out == ([TwinFound()] if gives_way else [PersistEpoch(epoch=alive["epoch"] + 1)])


def test_who_rises_above_an_epoch_that_outranked_it_is_alive() -> None:
    one, _ = publisher()
    left_over = other_life(instance=INSTANCE - 1, epoch=NOW + 9, issued_at=NOW - TWIN_SLACK_S)
    assert one.on_own_record(left_over, NOW + 1) == [PersistEpoch(epoch=NOW + 10)]
    answer = other_life(instance=INSTANCE - 1, epoch=NOW + 11, issued_at=NOW + 1)
    assert one.on_own_record(answer, NOW + 2) == [TwinFound()]


def test_a_new_neighbour_is_told_who_this_is() -> None:
    one, document = publisher()
    member = document.get(ME, MEMBER)
    assert member is not None
    assert one.introduce(NODES[1]) == [Send(node=NODES[1], message=Push(records=(member.raw,)))]
    one, _ = publisher(writing=False, lease=False)
    assert one.introduce(NODES[1]) == []


def test_an_epoch_that_nobody_would_believe_yet_waits() -> None:
    one, _ = publisher()
    ahead = other_life(epoch=NOW + EPOCH_AHEAD_S_MAX)
    assert one.on_own_record(ahead, NOW) == []
    assert one.on_own_record(ahead, NOW + 2) == [PersistEpoch(epoch=ahead.epoch + 1)]
    assert [written.epoch for written in one.due(NOW + 2, SMALL)] == [ahead.epoch + 1]


# Whatever happens


class Writing(RuleBasedStateMachine):
    """One author and what others hold of its earlier lives and twins."""

    @initialize()
    def begin(self) -> None:
        self.now = float(NOW)
        self.publisher, self.document = publisher(writing=False, lease=False)
        self.persisted = NOW
        self.written: list[tuple[float, Record]] = []

    @rule(register=st.sampled_from([MEMBER, CAPS, WANTS, ACCUSED]), value=st.integers(0, 2))
    def publish(self, register: str, value: int) -> None:
        self.publisher.publish(register, {"value": value} if value else None)

    @rule(seconds=st.sampled_from([0.1, 1.0, 30.0, 100.0, 500.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.document.expire(self.now)

    @rule()
    def begin_writing(self) -> None:
        self.publisher.writing = True

    @rule()
    def refute(self) -> None:
        self.publisher.refute()

    @rule(ahead=st.integers(-3, 3), age_s=st.sampled_from([0, 100]))
    def on_own_record(self, ahead: int, age_s: int) -> None:
        epoch, issued_at = self.persisted + ahead, int(self.now) - age_s
        record = other_life(epoch=epoch, issued_at=issued_at)
        self.note(self.publisher.on_own_record(record, self.now))

    @rule(times=st.integers(1, 30))
    def storm(self, times: int) -> None:
        for _ in range(times):
            self.publisher.refute()
            self.write()

    @rule()
    def write(self) -> None:
        for written in self.publisher.due(self.now, SMALL):
            if self.written:
                last = self.written[-1][1]
                assert (written.epoch, written.seq) > (last.epoch, last.seq)
            assert written.epoch <= self.persisted, "the epoch was not on disk yet"
            assert self.document.get(ME, written.register) is written
            self.written.append((self.now, written))

    def note(self, outs: list[Out]) -> None:
        for out in outs:
            assert isinstance(out, PersistEpoch)
            assert out.epoch > self.persisted
            self.persisted = out.epoch

    @invariant()
    def nobody_else_would_drop_a_version_for_its_rate(self) -> None:
        times = [at for at, _ in getattr(self, "written", [])]
        for first, start in enumerate(times):
            for count, end in enumerate(times[first:], 1):
                assert count <= OWNER_BURST + (end - start) * OWNER_RATE_PER_S + 1e-3


TestWriting = Writing.TestCase
