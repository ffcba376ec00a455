from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.errors import PeerError
from p2pmesh.identity.credentials import EARLY_S_MAX, FOUNDER_TTL_S, Credential, Role, found
from p2pmesh.identity.keys import NodeId, SigningKey
from p2pmesh.wire.codec import encode
from p2pmesh.wire.facts import FACT_KINDS, verify
from p2pmesh.wire.messages import Push, decode_message, encode_message, gather
from p2pmesh.wire.records import RecordCheck
from p2pmesh.wire.statements import (
    GRANT,
    INVITATION,
    KEEPS_MAX,
    MESH_NAME_CHARS_MAX,
    POLICY,
    POLICY_NUMBER_MAX,
    REVOCATION,
    STATEMENT_BYTES_MAX,
    STATEMENT_SIGNATURES_MAX,
    TAG,
    USES_MAX,
    Body,
    Grant,
    Invitation,
    Policy,
    Revocation,
    Statement,
    offer_proof,
    parse_statement,
    state,
    verify_statement,
)
from tests.identity.builders import FOUNDER, FOUNDERS, MESH, MESH_KEY, credential

NOW = 1_800_000_000
ANNA, BERT, CARL = (SigningKey(letter * 32) for letter in (b"a", b"b", b"c"))
INVITERS = credential(ANNA, Role.INVITE)
OFFER = SigningKey(b"k" * 32)
KEY = OFFER.public

POLICY_BODY = {"n": 1, "open": True, "name": "home", "at": NOW}
INVITATION_BODY = {
    "k": KEY,
    "role": "serve",
    "stage": False,
    "until": NOW + 60,
    "uses": 1,
    "s": b"",
}
REVOCATION_BODY: dict[str, Any] = {"t": bytes(16), "keep": [bytes(16)]}
GIVEN = credential(CARL, own=INVITERS, signer=ANNA, now=NOW, ttl_s=500)
GRANT_BODY = {"c": GIVEN.raw}


def forged(
    kind: str,
    body: object,
    *,
    signer: SigningKey = FOUNDER,
    own: Credential | bytes = FOUNDERS,
    **changes: Any,
) -> bytes:
    """A statement with fields as somebody likes them, rightly signed."""
    raw = own if isinstance(own, bytes) else own.raw
    fields = {"tag": TAG, "mesh": MESH, "kind": kind, "at": NOW, "body": body, "own": raw}
    signed = encode([*{**fields, **changes}.values()])
    return signer.sign(signed) + signer.public + signed


def inviters(kind: str, body: object, **changes: Any) -> bytes:
    return forged(kind, body, signer=ANNA, own=INVITERS, **changes)


def offered(signer: SigningKey, **fields: Any) -> Invitation:
    proof = offer_proof(OFFER, mesh=MESH, owner=NodeId(signer.id))
    return Invitation(key=KEY, proof=proof, **fields)


MADE: list[tuple[SigningKey, Credential | None, Body]] = [
    (MESH_KEY, None, Policy(number=0, open=True, name="home", founded_at=NOW)),
    (FOUNDER, FOUNDERS, Policy(number=POLICY_NUMBER_MAX, open=False, name="x", founded_at=0)),
    (ANNA, INVITERS, offered(ANNA, role=Role.INVITE, stage=False, until=NOW, uses=0)),
    (FOUNDER, FOUNDERS, offered(FOUNDER, role=Role.ADMIN, stage=True, until=0, uses=USES_MAX)),
    (ANNA, INVITERS, Revocation(target=bytes(16), keeps=frozenset())),
    (ANNA, INVITERS, Grant(credential=GIVEN)),
]


@pytest.mark.parametrize(("key", "own", "body"), MADE)
def test_a_statement_of_each_kind_survives_the_wire(
    key: SigningKey, own: Credential | None, body: Body
) -> None:
    made = state(key, own, body, mesh=MESH, now=NOW)
    kind = FACT_KINDS[Statement]
    message = decode_message(encode_message(gather([made])))
    assert isinstance(message, Push)
    (raw,) = message.of(kind)
    read = kind.parse(raw, RecordCheck())
    assert read == made
    assert isinstance(read, Statement)
    assert (read.owner, read.body, read.credential, read.issued_at) == (key.id, body, own, NOW)
    assert read.is_admins == (own is None or own is FOUNDERS)
    assert verify(read, RecordCheck())


def test_the_largest_statements_fit() -> None:
    chain, key = FOUNDERS, FOUNDER
    for letter in (b"1", b"2"):
        child = SigningKey(letter * 32)
        chain, key = credential(child, Role.ADMIN, stage=True, signer=key, own=chain), child
    keeps = frozenset(bytes([number]) * 16 for number in range(KEEPS_MAX))
    given = credential(CARL, own=chain, signer=key, now=NOW, ttl_s=500)
    for body in (Revocation(target=bytes(16), keeps=keeps), Grant(credential=given)):
        made = state(key, chain, body, mesh=MESH, now=NOW)
        assert len(made.raw) <= STATEMENT_BYTES_MAX / 1.5
    signatures = 1 + len(chain.chain) + len(given.chain)
    assert signatures <= STATEMENT_SIGNATURES_MAX


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        bytes(96),
        forged("decree", {}),
        forged(POLICY, POLICY_BODY, tag="p2pmesh record 1"),
        forged(POLICY, POLICY_BODY, mesh=b"short"),
        forged(POLICY, POLICY_BODY, mesh=b"n" * 16),
        forged(POLICY, POLICY_BODY, at=-1),
        forged(POLICY, POLICY_BODY, at=True),
        forged(POLICY, []),
        forged(POLICY, {**POLICY_BODY, "n": POLICY_NUMBER_MAX + 1}),
        forged(POLICY, {**POLICY_BODY, "open": 1}),
        forged(POLICY, {**POLICY_BODY, "name": b"home"}),
        forged(POLICY, {**POLICY_BODY, "at": NOW + EARLY_S_MAX + 1}),
        forged(INVITATION, {**INVITATION_BODY, "k": KEY[1:]}),
        forged(INVITATION, {**INVITATION_BODY, "role": "king"}),
        forged(INVITATION, {**INVITATION_BODY, "uses": USES_MAX + 1}),
        forged(INVITATION, {**INVITATION_BODY, "until": FOUNDERS.expires_at + 1}),
        forged(REVOCATION, {**REVOCATION_BODY, "t": b"x"}),
        forged(REVOCATION, {**REVOCATION_BODY, "keep": [b"x"]}),
        forged(REVOCATION, {**REVOCATION_BODY, "keep": [bytes(16)] * (KEEPS_MAX + 1)}),
        forged(GRANT, {"c": b"junk"}),
        forged(POLICY, POLICY_BODY, own=b"junk"),
    ],
)
def test_another_form_is_refused(raw: bytes) -> None:
    with pytest.raises(PeerError):
        parse_statement(raw)


ELSEWHERE = SigningKey(b"x" * 32)


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (forged(POLICY, POLICY_BODY, own=b""), "without the credential"),
        (forged(INVITATION, INVITATION_BODY, signer=MESH_KEY, own=b""), "without the credential"),
        (forged(REVOCATION, REVOCATION_BODY, signer=MESH_KEY, own=b""), "without the credential"),
        (forged(POLICY, POLICY_BODY, signer=ANNA, own=b""), "without the credential"),
        (forged(POLICY, POLICY_BODY, signer=ANNA), "of somebody else"),
        (forged(POLICY, POLICY_BODY, own=found(ELSEWHERE, FOUNDER.public, 0)), "of somebody else"),
        (forged(POLICY, POLICY_BODY, at=FOUNDERS.expires_at), "had run out"),
        (inviters(POLICY, POLICY_BODY), "no admin"),
        (inviters(INVITATION, {**INVITATION_BODY, "role": "admin"}), "more than its signer"),
        (inviters(INVITATION, {**INVITATION_BODY, "stage": True}), "more than its signer"),
        (inviters(INVITATION, {**INVITATION_BODY, "until": 2**40}), "lasts longer"),
        (forged(GRANT, GRANT_BODY), "does not rest on"),
        (inviters(GRANT, {"c": credential(CARL).raw}), "does not rest on"),
        (inviters(GRANT, {"c": INVITERS.raw}), "does not rest on"),
        (inviters(GRANT, GRANT_BODY, at=NOW - EARLY_S_MAX - 1), "from the future"),
    ],
)
def test_who_has_no_right_to_it_makes_no_statement(raw: bytes, sentence: str) -> None:
    with pytest.raises(PeerError, match=sentence):
        parse_statement(raw)


@pytest.mark.parametrize("role", [Role.USE, Role.SERVE])
@pytest.mark.parametrize(
    ("kind", "body"),
    [(POLICY, POLICY_BODY), (INVITATION, INVITATION_BODY), (REVOCATION, REVOCATION_BODY)],
)
def test_a_plain_member_makes_none(role: Role, kind: str, body: dict[str, Any]) -> None:
    own = credential(ANNA, role)
    with pytest.raises(PeerError, match="may not make any"):
        parse_statement(forged(kind, body, signer=ANNA, own=own))


def test_an_author_cannot_say_what_it_may_not() -> None:
    with pytest.raises(PeerError, match="no admin"):
        state(ANNA, INVITERS, MADE[0][2], mesh=MESH, now=NOW)


def test_nobody_lays_down_an_invitation_of_which_it_has_no_more_than_the_public_key() -> None:
    invited = offered(FOUNDER, role=Role.SERVE, stage=False, until=NOW + 60, uses=1)
    assert verify_statement(state(FOUNDER, FOUNDERS, invited, mesh=MESH, now=NOW))
    assert not verify_statement(state(ANNA, INVITERS, invited, mesh=MESH, now=NOW))


def test_the_name_of_a_mesh_steers_no_terminal() -> None:
    read = parse_statement(forged(POLICY, {**POLICY_BODY, "name": "\x1b[2J" + "x" * 100}))
    assert isinstance(read.body, Policy)
    assert read.body.name.startswith("[2Jx")
    assert len(read.body.name) <= MESH_NAME_CHARS_MAX


def test_unknown_fields_are_left_alone() -> None:
    read = parse_statement(forged(POLICY, {**POLICY_BODY, "later": 1}))
    assert read.body == Policy(number=1, open=True, name="home", founded_at=NOW)
    assert verify_statement(read)


def test_a_wrong_signature_anywhere_is_noticed() -> None:
    fakes = credential(ANNA, Role.INVITE, signer=BERT)  # Bert signed in the founder's place
    given = credential(CARL, own=INVITERS, signer=BERT, now=NOW, ttl_s=500)
    for raw in (
        forged(REVOCATION, REVOCATION_BODY, signer=ANNA, own=fakes),
        inviters(GRANT, {"c": given.raw}),
    ):
        assert not verify_statement(parse_statement(raw))
    good = inviters(GRANT, GRANT_BODY)
    assert verify_statement(parse_statement(good))
    assert not verify_statement(parse_statement(bytes([good[0] ^ 1]) + good[1:]))


ALL = [state(key, own, body, mesh=MESH, now=NOW).raw for key, own, body in MADE]


@given(st.sampled_from(ALL), st.integers(0, 10_000), st.integers(1, 255))
def test_no_bit_can_be_changed(raw: bytes, place: int, change: int) -> None:
    damaged = bytearray(raw)
    damaged[place % len(raw)] ^= change
    try:
        read = parse_statement(bytes(damaged))
    except PeerError:
        return
    assert not verify_statement(read)


@given(st.binary(max_size=600))
def test_junk_is_a_peers_fault_and_nothing_else(junk: bytes) -> None:
    for raw in (junk, ALL[0][:96] + junk):
        with pytest.raises(PeerError):
            parse_statement(raw)


bodies = st.dictionaries(
    st.sampled_from(["n", "open", "name", "at", "k", "role", "stage", "until", "uses", "t", "c"]),
    st.none() | st.booleans() | st.integers(0, 2**64 - 1) | st.binary(max_size=40) | st.text(),
)


@given(st.sampled_from([POLICY, INVITATION, REVOCATION, GRANT]), bodies)
def test_signed_nonsense_is_a_peers_fault_or_comes_back_as_it_was(
    kind: str, body: dict[str, Any]
) -> None:
    try:
        read = parse_statement(forged(kind, body))
    except PeerError:
        return
    again = state(FOUNDER, FOUNDERS, read.body, mesh=MESH, now=NOW)
    assert again.body == read.body


policies = st.builds(
    Policy,
    number=st.integers(0, POLICY_NUMBER_MAX),
    open=st.booleans(),
    name=st.from_regex(r"[a-z]{1,20}( [a-z]{1,20})?", fullmatch=True),
    founded_at=st.integers(0, NOW),
)
invitations = st.builds(
    Invitation,
    key=st.just(KEY),
    proof=st.just(offer_proof(OFFER, mesh=MESH, owner=NodeId(FOUNDER.id))),
    role=st.sampled_from(Role),
    stage=st.booleans(),
    until=st.integers(0, FOUNDER_TTL_S),
    uses=st.integers(0, USES_MAX),
)
revocations = st.builds(
    Revocation,
    target=st.binary(min_size=16, max_size=16),
    keeps=st.frozensets(st.binary(min_size=16, max_size=16), max_size=KEEPS_MAX),
)


@given(policies | invitations | revocations, st.integers(NOW, FOUNDER_TTL_S))
def test_whatever_may_be_said_survives_the_wire(body: Body, at: int) -> None:
    made = state(FOUNDER, FOUNDERS, body, mesh=MESH, now=at)
    assert parse_statement(made.raw) == made
    assert (made.body, made.owner, made.epoch) == (body, NodeId(FOUNDER.id), 0)
    assert verify_statement(made)
