from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.identity.credentials import EARLY_S_MAX, LAN_TTL_S, Credential, Role
from p2pmesh.state import trust as bounds
from p2pmesh.state.document import Document, MergeOutcome
from p2pmesh.state.owner_records import EXPIRY_GRACE_S
from p2pmesh.state.trust import Statements, Trust, members_only
from p2pmesh.wire.records import CREDENTIAL, Record, seal
from p2pmesh.wire.statements import (
    POLICY_NUMBER_MAX,
    Grant,
    Invitation,
    Policy,
    Revocation,
    Statement,
)
from tests.identity.builders import FOUNDED_AT, MESH, credential
from tests.state.statements import (
    ANNA,
    BERT,
    CARL,
    DORA,
    EMMA,
    EVERYBODY,
    FOUNDERS_ID,
    LARS,
    NAMES,
    NOW,
    PAUL,
    ROSA,
    Person,
)


def out(*statements: Statement) -> str:
    """The names of those whose credential is void."""
    trust = Trust(statements)
    return " ".join(sorted(NAMES[one.id] for one in EVERYBODY if trust.cut(one.own)))


def held(statements: Iterable[Statement]) -> Statements:
    kept = Statements()
    for one in statements:
        if kept.judge(one, NOW) is MergeOutcome.NEWS:
            kept.add(one)
    return kept


# --- revocations --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "gone"),
    [
        (ANNA.revokes(PAUL), "carl dora emma lars paul"),
        (ANNA.revokes(PAUL, keeps=[CARL.link]), "dora emma paul"),
        (ANNA.revokes(PAUL, keeps=[CARL.link, DORA.link]), "paul"),
        (ANNA.revokes(PAUL, keeps=[EMMA.link]), "carl dora emma lars paul"),
        (ANNA.revokes(EMMA), "emma"),
        (ANNA.revokes(BERT), "bert rosa"),
        (ROSA.revokes(BERT, keeps=[ROSA.link]), "bert"),
        (PAUL.revokes(DORA), "dora emma"),
        (PAUL.revokes(EMMA), "emma"),
        (PAUL.revokes(LARS), "lars"),
        (DORA.revokes(EMMA), "emma"),
        (DORA.revokes(CARL), ""),
        (DORA.revokes(PAUL), ""),
        (PAUL.revokes(ANNA), ""),
    ],
)
def test_a_revocation_reaches_what_its_signer_gave_and_an_admins_everybody(
    statement: Statement, gone: str
) -> None:
    assert out(statement) == gone


@pytest.mark.parametrize(
    ("revoked", "again", "good"),
    [
        (ANNA.revokes(CARL), ANNA.grants(CARL, at=NOW + 1), True),
        (ANNA.revokes(CARL), BERT.grants(CARL, at=NOW + 1), True),
        (ANNA.revokes(CARL), PAUL.grants(CARL, at=NOW + 1), False),
        (ANNA.revokes(CARL), ANNA.grants(CARL, at=NOW), False),
        (PAUL.revokes(CARL), PAUL.grants(CARL, at=NOW + 1), True),
        (PAUL.revokes(CARL), DORA.grants(CARL, at=NOW + 1), False),
        (PAUL.revokes(CARL), PAUL.grants(CARL, at=NOW - 1), False),
        (PAUL.revokes(CARL), ANNA.grants(CARL, at=NOW - 1), True),
    ],
)
def test_who_was_revoked_comes_back_by_the_word_of_an_admin_or_the_revoker(
    revoked: Statement, again: Statement, *, good: bool
) -> None:
    trust = Trust([revoked, again])
    assert trust.cut(CARL.own) is revoked
    assert isinstance(again.body, Grant)
    assert trust.allows(again.body.credential) == good
    assert (trust.best_grant(CARL.id, NOW) is not None) == good


def test_nobody_comes_back_because_an_admin_let_in_whoever_is_on_its_network() -> None:
    again = credential(
        CARL.key, own=ANNA.own, signer=ANNA.key, now=NOW + 1, ttl_s=LAN_TTL_S, basis="lan"
    )
    assert Trust([BERT.revokes(CARL)]).cut(again) is not None
    assert Trust([]).cut(again) is None


def test_who_is_granted_anew_is_good_with_what_it_signs_from_then_on() -> None:
    given = credential(PAUL.key, Role.INVITE, own=ANNA.own, signer=ANNA.key, now=NOW + 1)
    trust = Trust([ANNA.revokes(PAUL)])
    assert trust.cut(given) is None
    later = credential(CARL.key, own=given, signer=PAUL.key, now=NOW + 2)
    assert trust.cut(later) is None
    backdated = credential(CARL.key, own=given, signer=PAUL.key, now=NOW - 2)
    assert trust.cut(backdated) is not None


def test_a_revoked_member_revokes_nobody_unless_that_is_kept() -> None:
    theirs = PAUL.revokes(CARL, at=NOW - 500)
    assert out(theirs) == "carl lars"
    assert out(ANNA.revokes(PAUL, keeps=[CARL.link, DORA.link]), theirs) == "paul"
    keeps = [CARL.link, DORA.link, theirs.id]
    assert out(ANNA.revokes(PAUL, keeps=keeps), theirs) == "carl lars paul"


def test_the_time_that_a_revoked_member_claims_does_not_save_it() -> None:
    for at in (0, NOW - 500, NOW + EARLY_S_MAX):
        assert out(ANNA.revokes(PAUL), PAUL.revokes(CARL, at=at)) == "carl dora emma lars paul"
        theirs = PAUL.revokes(ANNA, at=at)
        assert out(ANNA.revokes(PAUL), theirs) == "carl dora emma lars paul"


@pytest.mark.parametrize("at", [2000, NOW, NOW + EARLY_S_MAX])
def test_two_admins_that_revoke_each_other_are_both_out_and_nobody_else(at: int) -> None:
    assert out(ANNA.revokes(BERT), BERT.revokes(ANNA, at=at)) == "anna bert"


def test_to_revoke_those_above_a_revoker_does_not_help() -> None:
    assert out(ANNA.revokes(BERT), BERT.revokes(FOUNDERS_ID)) == "bert rosa"
    assert out(BERT.revokes(FOUNDERS_ID)) == "anna bert carl dora emma lars paul rosa"


def test_three_in_a_circle_are_all_out() -> None:
    circle = [ANNA.revokes(BERT), BERT.revokes(ROSA), ROSA.revokes(ANNA)]
    assert out(*circle) == "anna bert rosa"


def test_a_chain_of_revocations_counts_from_the_one_that_nobody_voids() -> None:
    third = Person("third", Role.ADMIN)
    chain = [ANNA.revokes(BERT), BERT.revokes(third), third.revokes(PAUL)]
    assert out(*chain) == "bert carl dora emma lars paul rosa"


# --- what else ends with its signer --------------------------------------------------------------


def test_policies_and_invitations_end_with_their_signer_unless_kept() -> None:
    first, second = ANNA.lays_down(1, is_open=True), BERT.lays_down(2, is_open=False)
    invited = BERT.invites()
    assert Trust([first, second, invited]).policy == second.body
    assert isinstance(invited.body, Invitation)
    assert Trust([invited]).invitations == {invited.body.id: invited}
    revoked = ANNA.revokes(BERT)
    trust = Trust([first, second, invited, revoked])
    assert (trust.policy, trust.policy_statement) == (first.body, first)
    assert trust.invitations == {}
    kept = ANNA.revokes(BERT, keeps=[second.id])
    assert Trust([first, second, kept]).policy == second.body


@pytest.mark.parametrize(
    ("signer", "ends"), [(ANNA, True), (PAUL, True), (DORA, False)], ids=["admin", "own", "other"]
)
def test_an_invitation_is_revoked_by_an_admin_or_its_signer(signer: Person, *, ends: bool) -> None:
    invited = PAUL.invites()
    assert isinstance(invited.body, Invitation)
    assert bool(Trust([invited, signer.revokes(invited.body.id)]).invitations) != ends


@pytest.mark.parametrize(
    ("closed_at", "good"), [(NOW - 2000, False), (NOW - 1000, True), (NOW, True)]
)
def test_who_a_plain_member_lets_in_after_the_mesh_was_closed_is_no_member(
    closed_at: int, *, good: bool
) -> None:
    opened = ANNA.lays_down(1, is_open=True, at=2000)
    closed = ANNA.lays_down(2, is_open=False, at=closed_at)
    assert Trust([opened]).allows(LARS.own)
    assert Trust([closed]).allows(LARS.own) == good
    assert all(Trust([closed]).allows(one.own) for one in EVERYBODY if one is not LARS)


def test_the_policy_with_the_largest_number_stands_and_the_newest_of_two() -> None:
    old = ANNA.lays_down(POLICY_NUMBER_MAX, is_open=True, at=NOW)
    new = BERT.lays_down(POLICY_NUMBER_MAX, is_open=False, at=NOW + 1)
    low = ANNA.lays_down(3, is_open=True, at=NOW + 2)
    assert Trust([old, new, low]).policy == new.body


def test_the_best_grant_is_the_one_that_gives_most_and_is_good() -> None:
    better, longer = ANNA.grants(CARL, Role.INVITE, ttl_s=100), BERT.grants(CARL)
    trust = Trust([better, longer])

    def best(trust: Trust, now: float) -> Credential | None:
        return trust.best_grant(CARL.id, now)

    assert isinstance(better.body, Grant)
    assert isinstance(longer.body, Grant)
    assert best(trust, NOW) == better.body.credential
    assert best(trust, NOW + 100) == longer.body.credential
    assert best(Trust([better, longer, ANNA.revokes(BERT)]), NOW + 100) is None
    assert best(Trust([better, longer, ANNA.revokes(CARL)]), NOW) is None
    assert trust.best_grant(EMMA.id, NOW) is None


def test_those_that_matter_to_a_newcomer_are_admins_and_those_named() -> None:
    by_dora, by_anna = DORA.revokes(EMMA), ANNA.revokes(EMMA)
    assert list(Trust([by_dora]).revoking(EMMA.id)) == []
    assert list(Trust([by_dora]).revoking(EMMA.id, [DORA.id])) == [by_dora]
    assert list(Trust([by_anna]).revoking(EMMA.id)) == [by_anna]


def test_revocations_by_a_member_are_those_that_count() -> None:
    some = [ANNA.revokes(CARL), ANNA.revokes(EMMA)]
    assert Trust(some).revocations_by(ANNA.id) == sorted(some, key=lambda one: one.id)
    assert Trust([*some, BERT.revokes(ANNA)]).revocations_by(ANNA.id) == []


# --- bounds -------------------------------------------------------------------------------------


def test_a_newer_statement_takes_the_place_of_an_older_one() -> None:
    older, newer = ANNA.revokes(CARL, at=NOW), ANNA.revokes(CARL, at=NOW + 1)
    assert list(held([older, newer])) == list(held([newer, older])) == [newer]
    assert held([newer]).judge(older, NOW) is MergeOutcome.STALE
    assert held([newer]).judge(newer, NOW) is MergeOutcome.STALE


def node(number: int) -> bytes:
    return number.to_bytes(16, "big")


def test_of_a_branch_the_newest_stand() -> None:
    some = [ANNA.revokes(node(at), at=NOW + at) for at in range(bounds.REVOCATIONS_MAX + 2)]
    kept = held(some)
    assert list(kept) == some[2:]
    assert held(reversed(some)).judge(some[0], NOW) is MergeOutcome.REFUSED
    assert kept.find(some[2].id) is some[2]
    assert kept.find(some[0].id) is None


def test_however_many_a_member_lets_in_they_share_its_room() -> None:
    legion = [Person(f"legion {number}", Role.INVITE, PAUL) for number in range(8)]
    some = [
        one.invites(100 * at + number, at=NOW + number)
        for at, one in enumerate(legion)
        for number in range(20)
    ]
    mine = ANNA.revokes(PAUL, at=NOW - 100)
    kept = held([mine, DORA.invites(9999, at=NOW - 50), *some])
    assert len(kept) == bounds.INVITATIONS_MAX + 1
    assert mine in kept
    assert all(one.issued_at > NOW for one in kept if one is not mine)


def test_an_admin_is_heard_however_many_branches_there_are() -> None:
    with patch.multiple(bounds, BRANCHES_MAX=2, ADMINS_MAX=1):
        many = [Person(f"branch {number}", Role.INVITE).invites(number) for number in range(3)]
        kept = held(many)
        assert list(kept) == many[:2]
        assert kept.judge(ANNA.revokes(PAUL), NOW) is MergeOutcome.NEWS
        kept.add(ANNA.revokes(PAUL))
        assert kept.judge(BERT.revokes(PAUL), NOW) is MergeOutcome.REFUSED


def test_what_runs_out_makes_room() -> None:
    kept = held([ANNA.invites(1, until=NOW + 10), ANNA.revokes(CARL)])
    assert kept.ends_at == NOW + 10 + EXPIRY_GRACE_S
    before = kept.trust
    assert kept.expire(NOW + 10) == []
    assert kept.trust is before
    (gone,) = kept.expire(NOW + 10 + EXPIRY_GRACE_S)
    assert isinstance(gone.body, Invitation)
    assert len(kept) == 1
    assert kept.trust is not before
    assert kept.judge(gone, NOW + 10 + EXPIRY_GRACE_S) is MergeOutcome.VOID


def test_revocations_that_reach_nobody_cost_nothing() -> None:
    junk = [PAUL.revokes(node(number)) for number in range(50)]
    junk += [PAUL.revokes(FOUNDERS_ID), PAUL.revokes(ANNA), PAUL.revokes(BERT)]
    with patch.object(bounds, "_reaches", wraps=bounds._reaches) as reaches:
        trust = Trust(junk)
        assert all(trust.allows(one.own) for one in EVERYBODY)
        assert reaches.call_count == 0


# --- laws ---------------------------------------------------------------------------------------

POOL: list[Statement] = [
    ANNA.lays_down(1, is_open=True, at=NOW - 3000),
    BERT.lays_down(2, is_open=False, at=NOW - 2000),
    BERT.lays_down(2, is_open=False, at=NOW - 500),
    *(signer.invites(number, at=NOW + number) for number in range(4) for signer in (ANNA, PAUL)),
    *(DORA.invites(7, at=NOW + at) for at in range(3)),
    ANNA.revokes(BERT),
    BERT.revokes(ANNA),
    BERT.revokes(ROSA),
    ROSA.revokes(ANNA, at=NOW + 5),
    ROSA.revokes(FOUNDERS_ID),
    ANNA.revokes(PAUL, keeps=[CARL.link]),
    ANNA.revokes(PAUL, at=NOW + 1),
    BERT.revokes(PAUL, keeps=[DORA.link, CARL.link]),
    PAUL.revokes(CARL, at=NOW - 50),
    PAUL.revokes(DORA, at=NOW + 2),
    DORA.revokes(EMMA),
    ANNA.revokes(DORA, keeps=[DORA.revokes(EMMA).id]),
    ANNA.grants(CARL, Role.INVITE, at=NOW + 3),
    PAUL.grants(CARL, at=NOW + 4),
    PAUL.grants(EMMA, at=NOW - 4),
    DORA.grants(LARS, at=NOW + 6),
]
some = st.lists(st.sampled_from(POOL), max_size=24)
CREDENTIALS = [one.own for one in EVERYBODY] + [
    one.body.credential for one in POOL if isinstance(one.body, Grant)
]
SMALL = {Policy: 1, Invitation: 3, Revocation: 4, Grant: 2}


def answers(trust: Trust) -> list[Any]:
    said = [(trust.cut(one), trust.closed_before(one), trust.allows(one)) for one in CREDENTIALS]
    grants = [trust.best_grant(one.id, NOW) for one in EVERYBODY]
    return [said, grants, trust.policy_statement, trust.invitations]


def told(statements: Iterable[Statement]) -> Document:
    document = Document(MESH, authorised=members_only)
    for one in statements:
        document.merge(one, NOW)
    return document


@pytest.mark.parametrize("room", [{}, SMALL], ids=["much room", "little room"])
@given(some, st.randoms(use_true_random=False))
def test_the_order_of_arrival_does_not_matter(
    room: dict[type, int], statements: list[Statement], rng: Any
) -> None:
    shuffled = list(statements)
    rng.shuffle(shuffled)
    with patch.dict(bounds._KIND_MAX, room):
        one, other = told(statements), told(shuffled)
    assert one.statements == other.statements
    assert one.fingerprint == other.fingerprint
    assert one.ids() == other.ids() == [each.id for each in one.statements]
    assert answers(one.trust) == answers(other.trust)


@pytest.mark.parametrize("room", [{}, SMALL], ids=["much room", "little room"])
@given(some, some)
def test_parts_come_to_what_the_whole_comes_to(
    room: dict[type, int], left: list[Statement], right: list[Statement]
) -> None:
    with patch.dict(bounds._KIND_MAX, room):
        whole = told(left + right)
        parts = told([*told(right).statements, *told(left).statements])
        at_once = Document(MESH, authorised=members_only)
        at_once.declare(right + left, NOW)
    assert whole.ids() == parts.ids() == at_once.ids()
    assert whole.fingerprint == parts.fingerprint == at_once.fingerprint
    assert answers(whole.trust) == answers(parts.trust) == answers(at_once.trust)


@given(some, st.sampled_from([one for one in POOL if isinstance(one.body, Revocation)]))
def test_a_revocation_brings_nobody_back_unless_it_voids_another(
    statements: list[Statement], revocation: Statement
) -> None:
    before, after = Trust(statements), Trust([*statements, revocation])
    voided = set(before._revocations) - set(after._revocations)
    back = [one for one in CREDENTIALS if before.cut(one) and not after.cut(one)]
    assert voided or not back


# --- records ------------------------------------------------------------------------------------


def lease(own: Credential | bytes | None, key: Person = CARL, **changes: Any) -> Record:
    raw = own.raw if isinstance(own, Credential) else own
    arguments: dict[str, Any] = {
        "register": "member", "epoch": NOW, "seq": 1, "instance": 7, "issued_at": NOW,
        "ttl_s": 240, "body": {} if raw is None else {CREDENTIAL: raw},
    }  # fmt: skip
    return seal(key.key, mesh=MESH, **{**arguments, **changes})


ENDING = Person("carl", Role.SERVE, PAUL, ttl_s=NOW + 100 - int(FOUNDED_AT)).own
LATER = Person("carl", Role.SERVE, PAUL, at=NOW + EARLY_S_MAX + 1).own


@pytest.mark.parametrize(
    ("record", "counts"),
    [
        (lease(CARL.own), True),
        (lease(None), False),
        (lease(b"junk"), False),
        (lease(PAUL.own), False),
        (lease(CARL.own, EMMA), False),
        (lease(credential(CARL.key, Role.USE)), False),
        (lease(ENDING, ttl_s=100), True),
        (lease(ENDING, ttl_s=101), False),
        (lease(LATER), False),
        (lease(LATER, issued_at=NOW + 1), True),
        (lease(CARL.own, register="wants"), True),
        (lease(None, register="wants"), False),
        (lease(None, register="caps"), True),
    ],
)
def test_a_record_counts_with_the_credential_of_its_owner(record: Record, *, counts: bool) -> None:
    assert members_only(Trust(), record, NOW) == counts
    revoked = Trust([PAUL.revokes(CARL, at=NOW + 1000)])
    assert members_only(revoked, record, NOW) == (record.register == "caps")


def test_records_fall_with_the_credential_and_come_back_with_another() -> None:
    document = Document(MESH, authorised=members_only)
    records = [lease(CARL.own), lease(None, register="caps"), lease(CARL.own, register="wants")]
    for one in (*records, lease(EMMA.own, EMMA)):
        assert document.merge(one, NOW)
    result = document.merge(PAUL.revokes(CARL), NOW)
    assert result.owners == {CARL.id}
    assert document.owners == (EMMA.id,)
    assert document.judge(records[0], NOW) is MergeOutcome.VOID
    again = PAUL.grants(CARL, at=NOW + 1)
    assert document.merge(again, NOW).owners == frozenset()
    assert isinstance(again.body, Grant)
    assert document.merge(lease(again.body.credential, seq=2), NOW)
    assert CARL.id in document


def test_what_several_statements_come_to_is_worked_out_once() -> None:
    document = Document(MESH, authorised=members_only)
    document.merge(lease(EMMA.own, EMMA), NOW)
    with patch.object(bounds, "_counting", wraps=bounds._counting) as counting:
        document.declare([ANNA.revokes(node(number)) for number in range(50)], NOW)
        assert counting.call_count == 1
        document.declare([ANNA.invites(1), ROSA.grants(EMMA)], NOW)
        assert counting.call_count == 1, "neither can void a record"


def test_statements_of_another_mesh_or_from_the_future_do_not_count() -> None:
    document = Document(MESH, authorised=members_only)
    assert document.judge(ANNA.revokes(CARL, at=NOW + 60), NOW) is MergeOutcome.NEWS
    assert document.judge(ANNA.revokes(CARL, at=NOW + 61), NOW) is MergeOutcome.VOID
    elsewhere = Document(type(MESH)(b"n" * 16), authorised=members_only)
    assert elsewhere.judge(ANNA.revokes(CARL), NOW) is MergeOutcome.VOID
