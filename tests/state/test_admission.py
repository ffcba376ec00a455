from __future__ import annotations

from collections.abc import Iterable

import pytest

from p2pmesh.errors import PeerError
from p2pmesh.identity.credentials import LAN_TTL_S, TTL_S, Credential, Role, is_signed
from p2pmesh.identity.hello import EXPIRED, REVOKED, STRANGER, RefusedError
from p2pmesh.identity.keys import NodeId, SigningKey
from p2pmesh.identity.tokens import Token, prove
from p2pmesh.state.admission import (
    Applicant,
    Issuer,
    admit,
    fault,
    invitation_of,
    may_redeem,
    redeem,
    renew,
)
from p2pmesh.state.trust import Trust
from p2pmesh.wire.statements import Invitation, Statement
from tests.identity.builders import FOUNDER, FOUNDERS, MESH, credential
from tests.state.statements import ANNA, BERT, CARL, DORA, EMMA, FOUNDERS_ID, NOW, PAUL, Person

TOKEN = Token(mesh=MESH, seed=bytes(16), addresses=())
NEWCOMER = SigningKey(b"n" * 32)
BINDING = b"b" * 32


def issuer(person: Person) -> Issuer:
    return Issuer(key=person.key, own=person.own)


def invited(
    by: Person = PAUL,
    *,
    role: Role = Role.SERVE,
    uses: int = 1,
    until: int = NOW + 60,
    at: int = NOW,
    stage: bool = False,
) -> Statement:
    body = Invitation(key=TOKEN.key.public, role=role, stage=stage, until=until, uses=uses)
    return by.says(body, at)


def applicant(key: SigningKey = NEWCOMER, token: Token = TOKEN) -> Applicant:
    proof = prove(token, node=key.public, binding=BINDING)
    return Applicant(key=key.public, invitation=TOKEN.key.public, proof=proof, binding=BINDING)


def asks(trust: Trust, one: Applicant | None = None, *, now: float = NOW) -> Statement:
    return invitation_of(trust, one or applicant(), mesh=MESH, now=now)


def refusal(*statements: Statement, now: float = NOW) -> RefusedError:
    with pytest.raises(RefusedError) as refused:
        asks(Trust(statements), now=now)
    return refused.value


# --- an invitation ------------------------------------------------------------------------------


def test_who_has_an_invitation_gets_what_it_says() -> None:
    statement = invited(stage=False)
    trust = Trust([statement])
    assert asks(trust) is statement
    given = redeem(issuer(PAUL), trust, statement, applicant(), now=NOW, used=())
    assert (given.node, given.role, given.stage) == (NEWCOMER.id, Role.SERVE, False)
    assert (given.last.basis, given.last.via) == ("invite", TOKEN.key.id)
    assert given.expires_at == NOW + TTL_S
    assert is_signed(given)
    assert trust.allows(given)


def test_who_does_not_have_its_key_gets_nothing() -> None:
    trust = Trust([invited()])
    other = Token(mesh=MESH, seed=b"x" * 16, addresses=())
    stolen = applicant(NEWCOMER)
    for one in (
        applicant(token=other),
        Applicant(
            key=EMMA.key.public, invitation=TOKEN.key.public, proof=stolen.proof, binding=BINDING
        ),
        Applicant(
            key=stolen.key, invitation=TOKEN.key.public, proof=stolen.proof, binding=b"c" * 32
        ),
        Applicant(key=stolen.key, invitation=TOKEN.key.public, proof=b"", binding=BINDING),
    ):
        with pytest.raises(PeerError, match="did not prove") as refused:
            asks(trust, one)
        assert not isinstance(refused.value, RefusedError)


def test_an_invitation_that_is_not_known_or_revoked_or_over_is_told_apart() -> None:
    assert refusal().why == STRANGER
    assert refusal(invited(), ANNA.revokes(TOKEN.key.id)).why == STRANGER
    assert refusal(invited(), ANNA.revokes(PAUL)).why == STRANGER
    assert refusal(invited(), now=NOW + 60).why == EXPIRED
    assert asks(Trust([invited()]), now=NOW + 59).owner == PAUL.id


@pytest.mark.parametrize(
    ("revoker", "at", "out"),
    [
        (ANNA, NOW, True),
        (ANNA, NOW + 5, True),
        (ANNA, NOW - 1, False),
        (PAUL, NOW + 5, True),
        (DORA, NOW + 5, False),
    ],
)
def test_a_revoked_node_needs_an_invitation_that_was_made_later(
    revoker: Person, at: int, *, out: bool
) -> None:
    statements = [invited(), revoker.revokes(NEWCOMER.id, at=at)]
    if out:
        assert refusal(*statements).why == REVOKED
    else:
        assert asks(Trust(statements)) is statements[0]


@pytest.mark.parametrize(
    ("uses", "used", "again", "good"),
    [
        (1, 0, False, True),
        (1, 1, False, False),
        (1, 1, True, True),
        (2, 1, False, True),
        (2, 2, False, False),
        (0, 900, False, True),
    ],
)
def test_it_lets_in_as_many_as_it_says(uses: int, used: int, *, again: bool, good: bool) -> None:
    statement = invited(uses=uses)
    known = [NodeId(bytes([n % 256, n // 256]) * 8) for n in range(used - again)]
    known += [NodeId(NEWCOMER.id)] * again

    def ask() -> Credential:
        return redeem(issuer(PAUL), Trust([statement]), statement, applicant(), now=NOW, used=known)

    if good:
        assert ask().node == NEWCOMER.id
    else:
        with pytest.raises(RefusedError, match="as often as it may be") as refused:
            ask()
        assert refused.value.why == STRANGER


def test_who_was_revoked_is_not_let_in_by_a_member_that_may_not_say_so() -> None:
    statement = invited(ANNA, uses=0)
    trust = Trust([ANNA.revokes(NEWCOMER.id, at=NOW - 1), statement])
    assert asks(trust) is statement
    given = redeem(issuer(ANNA), trust, statement, applicant(), now=NOW, used=())
    assert given.node == NEWCOMER.id
    with pytest.raises(RefusedError, match="only an admin") as refused:
        redeem(issuer(PAUL), trust, statement, applicant(), now=NOW, used=())
    assert refused.value.why == REVOKED


@pytest.mark.parametrize(
    ("redeemer", "statement", "may"),
    [
        (PAUL, invited(PAUL), True),
        (ANNA, invited(PAUL), False),
        (ANNA, invited(PAUL, uses=0), True),
        (DORA, invited(PAUL, uses=0), True),
        (CARL, invited(PAUL, uses=0), False),
        (DORA, invited(ANNA, uses=0, role=Role.ADMIN), False),
        (BERT, invited(ANNA, uses=0, role=Role.ADMIN), True),
    ],
)
def test_who_may_redeem_it(redeemer: Person, statement: Statement, *, may: bool) -> None:
    assert may_redeem(redeemer.own, statement) == may


# --- a network ----------------------------------------------------------------------------------

OPEN, CLOSED = ANNA.lays_down(1, is_open=True), ANNA.lays_down(1, is_open=False)


def admitted(
    person: Person, *statements: Statement, named: bool = False, key: SigningKey = NEWCOMER
) -> tuple[Role, bool, str, int]:
    given = admit(issuer(person), Trust(statements), key.public, now=NOW + 1, named=named)
    assert is_signed(given)
    assert given.node == key.id
    assert Trust(statements).allows(given)
    return given.role, given.stage, given.last.basis, given.expires_at - NOW - 1


@pytest.mark.parametrize("person", [ANNA, PAUL, CARL])
def test_an_open_mesh_lets_in_who_is_on_its_network_to_serve(person: Person) -> None:
    assert admitted(person, OPEN) == (Role.SERVE, False, "lan", LAN_TTL_S)


def test_a_private_one_lets_in_whom_a_person_named() -> None:
    for statements in ([CLOSED], []):
        with pytest.raises(RefusedError, match="p2pmesh admit") as refused:
            admitted(ANNA, *statements)
        assert refused.value.why == STRANGER
    assert admitted(PAUL, CLOSED, named=True) == (Role.SERVE, False, "grant", LAN_TTL_S)
    with pytest.raises(RefusedError, match="may let nobody in"):
        admitted(CARL, CLOSED, named=True)


def test_who_was_revoked_stays_out_of_an_open_mesh() -> None:
    for revoked in (ANNA.revokes(NEWCOMER.id, at=0), PAUL.revokes(NEWCOMER.id)):
        with pytest.raises(RefusedError, match="revoked") as refused:
            admitted(CARL, OPEN, revoked)
        assert refused.value.why == REVOKED
    assert admitted(CARL, OPEN, DORA.revokes(NEWCOMER.id))[0] is Role.SERVE, "not hers to revoke"


def test_a_member_that_may_let_nobody_in_says_so() -> None:
    guest = Person("guest", Role.USE)
    with pytest.raises(RefusedError, match="may let nobody in") as refused:
        admitted(guest, OPEN)
    assert refused.value.why == STRANGER


# --- renewal ------------------------------------------------------------------------------------


def renewed(
    person: Person, old: Person, *statements: Statement, now: float
) -> tuple[Role, str, int] | None:
    given = renew(issuer(person), Trust(statements), old.own, now=now)
    return None if given is None else (given.role, given.last.basis, given.expires_at - int(now))


OLD = Person("old", Role.SERVE, PAUL, at=NOW, ttl_s=TTL_S)
BY_LAN = Person("old", Role.SERVE, CARL, basis="lan", at=NOW, ttl_s=LAN_TTL_S)
HALF = NOW + TTL_S // 2


def test_a_credential_is_renewed_once_half_its_life_is_over() -> None:
    assert renewed(ANNA, OLD, now=HALF) == (Role.SERVE, "grant", TTL_S)
    assert renewed(ANNA, OLD, now=HALF - 1) is None, "else it could leave Paul's branch at once"
    assert renewed(CARL, BY_LAN, now=HALF) == (Role.SERVE, "lan", LAN_TTL_S)


def test_nobody_renews_what_it_may_not_give() -> None:
    assert renewed(CARL, OLD, now=HALF) is None
    admin = Person("admin", Role.ADMIN, at=NOW, ttl_s=TTL_S)
    assert renewed(PAUL, admin, now=HALF) is None
    assert renewed(PAUL, PAUL, now=NOW * 2) is None
    assert renewed(DORA, PAUL, now=NOW * 2) is None, "it stands above her"


def test_what_is_not_good_is_not_renewed() -> None:
    assert renewed(DORA, OLD, ANNA.revokes(OLD), now=HALF) is None
    assert renewed(ANNA, OLD, BERT.revokes(ANNA), now=HALF) is None
    assert renewed(CARL, BY_LAN, CLOSED, now=HALF) is None, "Carl lets nobody into a private mesh"
    assert renewed(ANNA, BY_LAN, CLOSED, now=HALF) == (Role.SERVE, "lan", LAN_TTL_S)


# --- the words ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statements", "sentence"),
    [
        ([], ""),
        ([OPEN, CLOSED], ""),
        ([ANNA.revokes(CARL)], "revoked by kitchen; ask for a new invitation"),
        ([PAUL.revokes(CARL)], "revoked by a member that is not here"),
        ([ANNA.revokes(DORA)], ""),
    ],
)
def test_a_member_is_told_who_revoked_it(statements: Iterable[Statement], sentence: str) -> None:
    said = fault(Trust(statements), CARL.own, {ANNA.id: "kitchen"})
    assert sentence in said
    assert bool(said) == bool(sentence)


def test_who_came_in_after_the_mesh_was_closed_is_told_that() -> None:
    late = Person("late", Role.SERVE, CARL, basis="lan", at=NOW + 1, ttl_s=60)
    assert "after the mesh was made private" in fault(Trust([CLOSED]), late.own, {})
    assert fault(Trust([OPEN]), late.own, {}) == ""


def test_the_founder_is_an_admin_like_any_other() -> None:
    keeps = [ANNA.link]
    revoked = Trust([ANNA.revokes(FOUNDERS_ID, keeps=keeps)])
    assert fault(revoked, FOUNDERS, {})
    assert fault(revoked, ANNA.own, {}) == ""
    assert not revoked.allows(credential(NEWCOMER, own=FOUNDERS, signer=FOUNDER, now=NOW - 5))
