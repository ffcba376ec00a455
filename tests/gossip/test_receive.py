from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

from p2pmesh.gossip.events import Disconnect, Rejected
from p2pmesh.gossip.publisher import OWNER_BURST
from p2pmesh.gossip.receive import DOUBTFUL_BYTES_MAX, PEER_BURST, PEER_RATE_PER_S, PushResult
from p2pmesh.identity.keys import MeshId, NodeId
from p2pmesh.state import trust
from p2pmesh.state.document import AHEAD_S_MAX, EPOCH_AHEAD_S_MAX, Document, MergeOutcome
from p2pmesh.state.trust import members_only
from p2pmesh.wire.codec import encode
from p2pmesh.wire.evidence import (
    EVIDENCE_MAX,
    Accusation,
    accused_to_wire,
    make_certificate,
    make_fork,
)
from p2pmesh.wire.facts import Fact
from p2pmesh.wire.messages import Push
from p2pmesh.wire.records import CREDENTIAL, Record
from p2pmesh.wire.registers import ACCUSED, CAPS, MEMBER
from tests.gossip.builders import (
    STARTED,
    View,
    accusation,
    accused_by,
    certificate_by,
    fork_of,
    member_of,
    mesh_of,
)
from tests.gossip.receiver import ME, PEER, Inlet, caps
from tests.state.builders import MESH, NODES, NOW, record, sealed
from tests.state.statements import ANNA, CARL, EMMA, PAUL, Person


def forged(one: Record) -> bytes:
    return bytes([one.raw[0] ^ 1]) + one.raw[1:]


def cut_off(taken: PushResult) -> bool:
    return [type(out) for out in taken.out] == [Disconnect]


# Records


def test_news_is_merged_and_passed_on() -> None:
    inlet, news = Inlet(), caps()
    taken = inlet.take(news)
    assert inlet.view.document.get(NODES[1], CAPS) == news
    assert taken.news == Push(records=(news.raw,))
    assert taken.ids == [news.digest]
    assert taken.owners == {NODES[1]}
    assert taken.out == []


@pytest.mark.parametrize("again", [caps(seq=2), caps(seq=1), caps(seq=9, epoch=STARTED - 1)])
def test_what_is_known_costs_no_signature(again: Record) -> None:
    inlet = Inlet()
    inlet.take(caps(seq=2))
    inlet.verified.clear()
    assert inlet.take(again, again) == PushResult()
    assert inlet.verified == []


@pytest.mark.parametrize(
    "void",
    [
        caps(mesh=MeshId(b"n" * 16)),
        caps(issued_at=NOW + AHEAD_S_MAX + 1),
        caps(issued_at=NOW - 1000, ttl_s=10),
        record(1, "member", epoch=NOW + EPOCH_AHEAD_S_MAX + 1),
    ],
    ids=["other mesh", "future", "run out", "forged epoch"],
)
def test_what_is_void_costs_no_signature_and_does_no_harm(void: Record) -> None:
    inlet = Inlet()
    before = inlet.view.document.fingerprint
    assert inlet.take(void) == PushResult()
    assert inlet.verified == []
    assert inlet.view.document.fingerprint == before


@pytest.mark.parametrize("bad", [b"junk", b"", forged(caps()), caps().raw[:-1], caps().raw + b"\0"])
def test_a_bad_record_ends_the_link_and_what_came_before_it_stands(bad: bytes) -> None:
    inlet, good = Inlet(), caps(2)
    taken = inlet.take(good, bad, caps(3))
    assert cut_off(taken)
    assert taken.news.records == (good.raw,)
    assert inlet.view.document.get(NODES[3], CAPS) is None


def test_an_owner_with_too_much_is_not_believed() -> None:
    inlet = Inlet()
    pages = [record(1, f"x/{n}", epoch=STARTED, body={"x": "y" * 16_000}) for n in range(10, 30)]
    taken = inlet.take(*pages, asked=True)
    assert {type(out) for out in taken.out} == {Rejected}
    assert 0 < len(taken.ids) < len(pages)


def test_own_records_of_other_lives_are_reported_and_not_merged() -> None:
    inlet, mine = Inlet(), caps(0, instance=99)
    taken = inlet.take(mine)
    assert taken.own == [mine]
    assert taken.news == Push()
    assert inlet.view.document.get(ME, CAPS) is None


def test_own_records_must_be_signed_as_well() -> None:
    assert cut_off(Inlet().take(forged(caps(0, instance=99))))


def test_what_is_asked_for_is_read_and_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inlet, old, certificate, fork = Inlet(), caps(2), certificate_by([0, 1, 2], 4), fork_of(1)
    inlet.take(old)
    inlet.parsed.clear()
    judged: list[object] = []
    judge = Document.judge

    def counted(self: Document, fact: Fact, now: float) -> MergeOutcome:
        judged.append(fact)
        return judge(self, fact, now)

    monkeypatch.setattr(Document, "judge", counted)
    news = caps(3)
    taken = inlet.take(news, old, certificates=[certificate.raw], forks=[fork.raw], asked=True)
    assert taken.seen == {news.digest, old.digest, certificate.id, fork.id}
    assert judged == [news, certificate, fork]
    both = [fork.first, fork.second]
    assert inlet.parsed == [one.raw for one in (news, *certificate.evidence, *both)]


# Rates


def test_an_owner_is_taken_at_its_rate_and_the_newest_when_asked_for() -> None:
    inlet = Inlet()
    versions = [caps(seq=seq) for seq in range(1, OWNER_BURST + 6)]
    for version in versions[:-1]:
        inlet.take(version)
    standing = inlet.view.document.get(NODES[1], CAPS)
    assert standing == versions[OWNER_BURST - 1]
    assert inlet.take(versions[-1], at=NOW + 0.5).ids == []
    assert inlet.take(versions[-1], asked=True, at=NOW + 0.5).ids == [versions[-1].digest]
    assert inlet.take(caps(2)).ids, "other owners have their own rate"


def test_who_only_says_that_it_was_asked_is_taken_at_the_rate_as_well() -> None:
    inlet = Inlet()
    versions = tuple(caps(seq=seq).raw for seq in range(1, 3 * OWNER_BURST))
    taken = inlet.receiver.take(PEER, Push(records=versions, asked=True), NOW, NOW)
    assert len(taken.ids) == OWNER_BURST


def test_a_neighbour_is_complained_of_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pmesh.gossip.receive.PEER_BURST", 1)
    inlet = Inlet()
    taken = [inlet.take(caps(1), caps(2), caps(3), at=NOW + at) for at in (0, 0.001, 61)]
    assert [len(one.out) for one in taken] == [1, 0, 1]
    assert not any(one.whole for one in taken)


def test_what_is_asked_for_is_passed_on_at_the_rate_of_its_owner() -> None:
    inlet = Inlet()
    versions = [caps(seq=seq) for seq in range(1, 3 * OWNER_BURST)]
    taken = [inlet.take(version, asked=True) for version in versions]
    assert sum(len(one.ids) for one in taken) == len(versions)
    assert sum(len(one.news.records) for one in taken) == OWNER_BURST


def test_forks_are_taken_at_the_rate_of_their_owner() -> None:
    inlet = Inlet()
    forks = [fork_of(1, seq) for seq in range(1, 3 * OWNER_BURST)]
    passed_on = [inlet.take(forks=[fork.raw]).news.forks for fork in forks]
    assert sum(map(len, passed_on)) == OWNER_BURST


def test_a_fork_in_the_making_is_found_at_the_rate_of_its_owner() -> None:
    inlet = Inlet()
    inlet.take(caps())
    values = [caps(body={"value": value}) for value in range(2, 2 * OWNER_BURST)]
    passed_on = [inlet.take(value).news for value in values]
    assert sum(len(news.forks) + len(news.records) for news in passed_on) <= 2 * OWNER_BURST


def test_nobody_else_can_use_up_the_rate_of_an_owner() -> None:
    inlet = Inlet()
    for seq in range(1, 2 * OWNER_BURST):
        inlet.take(forged(caps(seq=seq)))
    assert inlet.take(caps(seq=99)).ids


def test_signatures_for_one_peer_are_bounded_whatever_it_sends() -> None:
    view = mesh_of(5)
    inlet = Inlet(view)
    inlet.receiver._peers.take(PEER, NOW, PEER_BURST)
    assert [type(out) for out in inlet.take(caps()).out] == [Rejected]
    assert inlet.verified == []
    later = NOW + 3 / PEER_RATE_PER_S
    assert len(inlet.take(caps(1), caps(2), caps(3), caps(4), at=later).ids) == 3


def test_a_certificate_counts_as_many_signatures() -> None:
    inlet, certificate = Inlet(), certificate_by([1, 2, 3], 4)
    inlet.receiver._peers.take(PEER, NOW, PEER_BURST - EVIDENCE_MAX + 1)
    inlet.take(certificates=[certificate.raw])
    assert inlet.verified == []
    inlet.take(certificates=[certificate.raw], at=NOW + 1)
    assert len(inlet.verified) == 3


def test_forged_records_cost_one_signature_and_the_link() -> None:
    inlet = Inlet()
    assert cut_off(inlet.take(*(forged(caps(seq=seq)) for seq in range(1, 2000))))
    assert len(inlet.verified) == 1


# Forks


def test_two_values_under_one_number_are_a_fork_that_everybody_is_shown() -> None:
    inlet, one, other = Inlet(), caps(body={"value": 1}), caps(body={"value": 2})
    inlet.take(one)
    taken = inlet.take(other)
    fork = make_fork(one, other)
    assert taken.news.forks == (fork.raw,)
    assert fork.id in taken.ids
    assert inlet.view.document.forks(NODES[1]) == (fork,)
    assert inlet.view.document.get(NODES[1], CAPS) == max(one, other, key=lambda r: r.digest)


def test_a_fork_that_others_found_is_checked_once_and_passed_on() -> None:
    inlet, fork = Inlet(), fork_of(1)
    assert inlet.take(forks=[fork.raw]).news == Push(forks=(fork.raw,))
    inlet.verified.clear()
    assert inlet.take(forks=[fork.raw]) == PushResult()
    assert inlet.verified == []


def test_a_forged_fork_ends_the_link() -> None:
    one, other = caps(body={"value": 1}), caps(body={"value": 2})
    raws = sorted([one, other], key=lambda r: r.digest)
    raw = encode(["fork", raws[0].raw, forged(raws[1])])
    assert cut_off(Inlet().take(forks=[raw]))
    assert cut_off(Inlet().take(forks=[b"junk"]))


# Certificates


def test_a_convincing_certificate_stands_and_is_not_flooded() -> None:
    inlet, certificate = Inlet(), certificate_by([0, 1, 2], 4)
    taken = inlet.take(certificates=[certificate.raw])
    assert inlet.view.document.removed == {NODES[4]}
    assert taken.news == Push()
    assert taken.ids == [certificate.id]
    assert taken.owners == {NODES[4]}
    inlet.verified.clear()
    assert inlet.take(certificates=[certificate.raw]) == PushResult()
    assert inlet.verified == []


def test_one_that_does_not_convince_waits_for_what_might_make_it() -> None:
    inlet = Inlet(mesh_of(1))
    certificate = certificate_by([1, 2, 3], 4)
    assert inlet.take(certificates=[certificate.raw]) == PushResult()
    inlet.view.learn(*(member_of(number) for number in range(5)))
    assert inlet.view.document.removed == frozenset()
    assert inlet.receiver.reconsider(NOW).ids == [certificate.id]
    assert inlet.view.document.removed == {NODES[4]}
    assert inlet.receiver.reconsider(NOW) == PushResult()


def test_who_does_not_know_everybody_believes_only_what_would_do_in_any_mesh() -> None:
    inlet = Inlet(mesh_of(6))
    weak, strong = certificate_by([0, 1, 2], 5), certificate_by([0, 1, 2, 3], 4)
    inlet.view.learn(member_of(3, 2, left=True))
    inlet.receiver.learning = True
    assert inlet.take(certificates=[weak.raw, strong.raw]).ids == [strong.id]
    inlet.receiver.learning = False
    assert inlet.receiver.reconsider(NOW).ids == [weak.id]


def test_what_was_refuted_meanwhile_does_not_wait_any_longer() -> None:
    inlet = Inlet(mesh_of(1))
    inlet.take(certificates=[certificate_by([1], 4).raw])
    inlet.view.learn(member_of(4, 2))
    assert inlet.receiver.reconsider(NOW) == PushResult()
    assert inlet.receiver._doubtful == {}


def test_what_waits_is_bounded_in_bytes_and_the_newest_is_kept() -> None:
    inlet, largest = Inlet(), 0
    for number in range(DOUBTFUL_BYTES_MAX // 10_000):
        subject = NodeId(number.to_bytes(16, "big"))
        row = accusation(0)._replace(subject=subject)
        body = {"s": [list(row)], "x": b"y" * 15_000}
        evidence = record(1, ACCUSED, epoch=STARTED, body=body, ttl_s=3600, seq=number)
        certificate = make_certificate(row, [evidence])
        largest = max(largest, len(certificate.raw))
        inlet.take(certificates=[certificate.raw])
    waiting = inlet.receiver._doubtful
    kept_bytes = sum(len(one.raw) for one in waiting.values())
    assert DOUBTFUL_BYTES_MAX - largest < kept_bytes <= DOUBTFUL_BYTES_MAX
    assert list(waiting)[-1] == subject


def test_one_certificate_of_each_subject_waits() -> None:
    inlet = Inlet()
    for accuser in (1, 2, 1):
        inlet.take(certificates=[certificate_by([accuser], 4).raw])
    (waiting,) = inlet.receiver._doubtful.values()
    assert waiting.accusers == {NODES[1]}


def test_a_certificate_of_a_refuted_version_costs_nothing() -> None:
    inlet = Inlet()
    inlet.view.learn(member_of(4, 2))
    assert inlet.take(certificates=[certificate_by([1, 2, 3], 4).raw]) == PushResult()
    assert inlet.verified == []


def test_one_against_this_node_is_a_reason_to_speak_up() -> None:
    inlet = Inlet()
    taken = inlet.take(certificates=[certificate_by([1, 2, 3], 0).raw])
    assert taken.doubted
    assert inlet.view.document.removed == frozenset()


def test_one_by_strangers_against_this_node_is_no_reason_until_they_are_known() -> None:
    inlet = Inlet(mesh_of(3))
    certificate = certificate_by([3, 4], 0)
    assert inlet.take(certificates=[certificate.raw]) == PushResult()
    inlet.view.learn(member_of(4))
    assert inlet.receiver.reconsider(NOW).doubted
    assert inlet.receiver.reconsider(NOW) == PushResult(), "told once"
    assert inlet.view.document.removed == frozenset()


def test_one_that_would_not_do_here_may_have_done_elsewhere() -> None:
    inlet = Inlet(mesh_of(7))
    taken = inlet.take(certificates=[certificate_by([1], 0).raw])
    assert taken.doubted
    assert inlet.view.document.removed == frozenset()


EVERYBODY = [accusation(number) for number in range(7)]


@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        (EVERYBODY, {}),
        ([*EVERYBODY, *(accusation(number, 9) for number in range(7))], {}),
        (EVERYBODY, {"epoch": 1, "issued_at": STARTED - 1}),
    ],
    ids=["once", "twice each", "dated back"],
)
def test_one_record_that_names_everybody_removes_nobody(
    rows: list[Accusation], changes: dict[str, Any]
) -> None:
    inlet = Inlet(mesh_of(7))
    inlet.view.learn(member_of(7, epoch=changes.get("epoch", STARTED)))
    liar = {"epoch": STARTED, "ttl_s": 3600, "body": accused_to_wire(rows), **changes}
    evidence = record(7, ACCUSED, **liar)
    made = [make_certificate(row, [evidence]).raw for row in EVERYBODY]
    assert inlet.take(certificates=made).ids == []
    assert inlet.take(evidence, certificates=made).ids == [evidence.digest]
    assert inlet.receiver.reconsider(NOW + 1).ids == []
    assert inlet.view.document.removed == frozenset()


def test_a_forged_certificate_ends_the_link() -> None:
    evidence = [accused_by(1, 4).raw, forged(accused_by(2, 4))]
    by_owner = sorted(evidence, key=lambda raw: raw[115:150])
    raw = encode(["cert", NODES[4], STARTED, 1, by_owner])
    assert cut_off(Inlet().take(certificates=[raw]))
    assert cut_off(Inlet().take(certificates=[b"junk"]))


# Credentials and statements


def strict() -> Inlet:
    """The receiver of a mesh in which credentials are asked for, which knows nothing yet."""
    return Inlet(View(authorised=members_only))


def leased(person: Person, **changes: Any) -> Record:
    """The lease of a member, with its credential."""
    return sealed(person.key, MEMBER, **{"body": {CREDENTIAL: person.own.raw}, **changes})


def flipped(raw: bytes, place: int) -> bytes:
    return raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]


def test_a_lease_counts_with_a_credential_and_not_without() -> None:
    inlet = strict()
    taken = inlet.take(leased(CARL), sealed(PAUL.key, MEMBER), leased(EMMA, body={}))
    assert (taken.owners, taken.out) == ({CARL.id}, [])
    assert inlet.view.document.owners == (CARL.id,)


def test_a_credential_with_a_wrong_signature_ends_the_link() -> None:
    inlet = strict()
    last = CARL.own.raw.index(CARL.own.last.raw)
    body = {CREDENTIAL: flipped(CARL.own.raw, last + 5)}
    taken = inlet.take(sealed(CARL.key, MEMBER, body=body))
    assert cut_off(taken)
    assert inlet.view.document.owners == ()


def test_the_signatures_of_a_new_credential_are_paid_for() -> None:
    assert len(CARL.own.chain) == 3
    fresh = Person("carl", at=NOW)
    assert len(fresh.own.chain) == 2
    inlet = strict()
    paid: list[float] = []
    for seq, own in enumerate((CARL, CARL, CARL, fresh, fresh), 1):
        inlet.take(leased(own, seq=seq))
        paid.append(PEER_BURST - sum(paid) - inlet.receiver._peers._buckets[PEER].tokens(NOW))
    assert paid == [1 + 3, 1, 1, 1 + 2, 1]


def test_who_sends_credentials_without_end_is_not_heard_for_long() -> None:
    inlet = strict()
    inlet.receiver._peers.take(PEER, NOW, PEER_BURST - 10)
    people = [Person(f"sybil {number}") for number in range(5)]
    taken = inlet.take(*map(leased, people))
    assert (len(taken.ids), taken.whole) == (3, False), "one and two signatures for each"
    assert [type(out) for out in taken.out] == [Rejected]


def test_a_statement_is_merged_passed_on_and_stands_before_the_records_beside_it() -> None:
    inlet, revoked = strict(), ANNA.revokes(CARL)
    taken = inlet.take(leased(CARL), leased(EMMA), statements=[revoked])
    assert taken.news == Push(statements=(revoked.raw,), records=(leased(EMMA).raw,))
    assert taken.ids == [revoked.id, leased(EMMA).digest]
    assert inlet.view.document.statements == (revoked,)
    assert inlet.view.document.owners == (EMMA.id,)


def test_a_revocation_voids_what_stood_and_says_whose_it_was() -> None:
    inlet = strict()
    inlet.take(leased(CARL), leased(EMMA))
    taken = inlet.take(statements=[ANNA.revokes(PAUL)])
    assert taken.owners == {CARL.id, EMMA.id}
    assert inlet.view.document.owners == ()
    assert inlet.take(leased(CARL, seq=2)).nothing


@pytest.mark.parametrize("place", [0, 70, 300])
def test_a_statement_with_a_wrong_signature_ends_the_link_and_the_ones_before_it_stand(
    place: int,
) -> None:
    inlet, good = strict(), ANNA.revokes(EMMA)
    taken = inlet.take(statements=[good, flipped(ANNA.revokes(CARL).raw, place)])
    assert cut_off(taken)
    assert inlet.view.document.statements == (good,)
    assert taken.ids == [good.id]


def test_a_statement_without_the_right_to_it_ends_the_link() -> None:
    policy = ANNA.lays_down(1, is_open=True)
    signed = encode(["p2pmesh statement 1", MESH, "policy", NOW, {"n": 1}, PAUL.own.raw])
    inlet = strict()
    taken = inlet.take(statements=[policy, PAUL.key.sign(signed) + PAUL.key.public + signed])
    assert cut_off(taken)
    assert inlet.view.document.trust.policy == policy.body


def test_one_signer_is_heard_at_its_rate_and_all_that_was_asked_for() -> None:
    some = [ANNA.revokes(bytes([number]) * 16) for number in range(OWNER_BURST + 5)]
    inlet = strict()
    assert len(inlet.take(statements=some).fresh) == OWNER_BURST
    taken = inlet.take(statements=some, asked=True)
    assert len(taken.ids) == 5
    assert taken.fresh == []
    assert len(inlet.view.document.statements) == len(some)


def test_a_message_of_statements_changes_the_trust_once() -> None:
    some = [ANNA.revokes(bytes([number]) * 16) for number in range(200)]
    inlet = strict()
    inlet.take(leased(EMMA))
    with patch.object(trust, "_counting", wraps=trust._counting) as counting:
        inlet.take(leased(CARL), statements=some, asked=True)
    assert counting.call_count == 1
