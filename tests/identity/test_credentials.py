from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.errors import PeerError
from p2pmesh.identity.credentials import (
    CHAIN_MAX,
    CREDENTIAL_BYTES_MAX,
    DAY_S,
    FOUNDER_TTL_S,
    LAN_TTL_S,
    RIGHTS_MAX,
    TAG,
    Basis,
    Credential,
    CredentialError,
    Role,
    found,
    is_signed,
    issue,
    may_issue,
    read_credential,
)
from p2pmesh.identity.keys import SIGNATURE_BYTES, MeshId, SigningKey
from p2pmesh.wire.codec import encode
from tests.identity.builders import FOUNDED_AT, FOUNDER, FOUNDERS, MESH, MESH_KEY, credential

NOW = 2_000.0
KEYS = [SigningKey(bytes([number]) * 32) for number in range(1, 9)]
ANNA, BERT, CARL, DORA, EMMA, *_ = KEYS
INVITERS = credential(ANNA, Role.INVITE, stage=True)
SERVERS = credential(ANNA, Role.SERVE)


def chain(length: int) -> list[Credential]:
    """Credentials that rest on each other, the first of the founder."""
    made = [FOUNDERS]
    keys = [FOUNDER, *KEYS]
    for signer, key in pairwise(keys[:length]):
        made.append(credential(key, Role.INVITE, signer=signer, own=made[-1], now=NOW))
    return made


def forged(signer: SigningKey, own: Credential | None, **changes: Any) -> bytes:
    """A credential as `issue` makes it, with fields as somebody likes them."""
    fields: dict[str, Any] = {
        "tag": TAG, "mesh": MESH, "holder": BERT.public, "role": "serve", "rights": [],
        "issued_at": int(NOW), "expires_at": int(NOW) + DAY_S, "basis": "grant", "via": b"",
    }  # fmt: skip
    signed = encode([*{**fields, **changes}.values()])
    before = [one.raw for one in own.chain] if own else []
    return encode([MESH_KEY.public, [*before, signer.sign(signed) + signed]])


def test_a_founder_is_an_admin_by_the_key_of_the_mesh() -> None:
    founders = found(MESH_KEY, ANNA.public, NOW)
    assert (founders.role, founders.stage, founders.mesh) == (Role.ADMIN, True, MESH)
    assert (founders.node, founders.last.basis) == (ANNA.id, "founder")
    assert founders.last.issuer == MESH_KEY.id
    assert founders.expires_at == int(NOW) + FOUNDER_TTL_S
    assert is_signed(founders)


def test_the_key_of_the_mesh_makes_another_admin() -> None:
    recovered = found(MESH_KEY, BERT.public, NOW, "recovery")
    assert (recovered.role, recovered.stage, recovered.mesh) == (Role.ADMIN, True, MESH)
    assert (recovered.node, recovered.last.basis) == (BERT.id, "recovery")
    assert is_signed(recovered)


@pytest.mark.parametrize("length", range(1, CHAIN_MAX + 1))
def test_a_chain_survives_the_wire_and_names_everybody(length: int) -> None:
    made = chain(length)[-1]
    assert len(made.chain) == length
    assert len(made.raw) < CREDENTIAL_BYTES_MAX
    read = read_credential(made.raw)
    assert read == made
    assert is_signed(read)
    keys = [MESH_KEY, FOUNDER, *KEYS]
    assert [one.signer for one in read.chain] == [key.public for key in keys[:length]]
    assert [one.node for one in read.chain] == [key.id for key in keys[1 : length + 1]]


def test_a_chain_of_five_is_made_by_nobody_and_read_by_nobody() -> None:
    longest = chain(CHAIN_MAX)[-1]
    signer = KEYS[CHAIN_MAX - 2]
    assert not may_issue(longest, role=Role.USE, stage=False, basis="invite")
    with pytest.raises(CredentialError):
        credential(EMMA, own=longest, signer=signer)
    with pytest.raises(CredentialError, match="unknown form"):
        read_credential(forged(signer, longest, holder=EMMA.public))


GIVEN: list[tuple[Role, bool, Role, bool, Basis, bool]] = [
    (Role.ADMIN, True, Role.ADMIN, True, "grant", True),
    (Role.ADMIN, False, Role.ADMIN, False, "grant", True),
    (Role.ADMIN, False, Role.USE, True, "grant", False),
    (Role.INVITE, True, Role.INVITE, True, "grant", True),
    (Role.INVITE, True, Role.ADMIN, False, "grant", False),
    (Role.INVITE, False, Role.SERVE, True, "grant", False),
    (Role.INVITE, True, Role.SERVE, True, "lan", True),
    (Role.SERVE, True, Role.SERVE, False, "lan", True),
    (Role.SERVE, True, Role.SERVE, True, "lan", False),
    (Role.SERVE, False, Role.USE, False, "lan", True),
    (Role.SERVE, False, Role.INVITE, False, "lan", False),
    (Role.SERVE, True, Role.USE, False, "grant", False),
    (Role.USE, True, Role.USE, False, "lan", False),
    (Role.ADMIN, True, Role.SERVE, False, "founder", False),
    (Role.ADMIN, True, Role.ADMIN, True, "recovery", False),
]


@pytest.mark.parametrize(("role", "stage", "given", "given_stage", "basis", "may"), GIVEN)
def test_nobody_gives_more_than_it_has(
    role: Role, given: Role, basis: Basis, *, stage: bool, given_stage: bool, may: bool
) -> None:
    own = credential(ANNA, role, stage=stage)
    raw = forged(ANNA, own, role=given.word, rights=["stage"] if given_stage else [], basis=basis)
    assert may_issue(own, role=given, stage=given_stage, basis=basis) == may
    if may:
        read = read_credential(raw)
        assert (read.role, read.stage, read.last.basis) == (given, given_stage, basis)
        assert is_signed(read)
    else:
        with pytest.raises(CredentialError):
            read_credential(raw)
        with pytest.raises(CredentialError):
            issue(
                own, ANNA, BERT.public,
                role=given, stage=given_stage, basis=basis, now=NOW, ttl_s=DAY_S,
            )  # fmt: skip


def test_who_may_not_invite_lets_in_for_a_month_at_most() -> None:
    end = int(NOW) + LAN_TTL_S
    assert read_credential(forged(ANNA, SERVERS, basis="lan", expires_at=end)).expires_at == end
    with pytest.raises(CredentialError, match="lasts longer"):
        read_credential(forged(ANNA, SERVERS, basis="lan", expires_at=end + 1))
    inviters = read_credential(forged(ANNA, INVITERS, basis="lan", expires_at=end + 1))
    assert inviters.expires_at == end + 1


def test_none_lasts_longer_than_what_it_rests_on() -> None:
    own = credential(ANNA, Role.INVITE, now=NOW, ttl_s=100)
    assert credential(BERT, signer=ANNA, own=own, now=NOW, ttl_s=500).last.expires_at == 2100
    assert read_credential(forged(ANNA, own)).expires_at == 2100
    assert read_credential(forged(ANNA, own, issued_at=2050, expires_at=2060)).begins_at == 2050


def test_one_begins_with_the_last_delegation_and_is_renewed_at_half_its_life() -> None:
    own = credential(ANNA, Role.INVITE, now=NOW + 500)
    backdated = credential(BERT, signer=ANNA, own=own, now=NOW, ttl_s=1000)
    assert backdated.begins_at == NOW + 500
    assert backdated.renews_at() == NOW + 500


def test_what_is_worth_more_comes_first() -> None:
    ranked = [
        credential(ANNA, Role.USE, stage=True),
        credential(ANNA, Role.SERVE, ttl_s=500),
        credential(ANNA, Role.SERVE, ttl_s=600),
        credential(ANNA, Role.SERVE, stage=True, ttl_s=400),
        credential(ANNA, Role.INVITE, ttl_s=100),
    ]
    assert all(one.rank < better.rank for one, better in pairwise(ranked))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        encode([]),
        encode([MESH_KEY.public, []]),
        encode([MESH_KEY.public[1:], [FOUNDERS.chain[0].raw]]),
        encode([MESH_KEY.public, [1]]),
        encode([MESH_KEY.public, FOUNDERS.chain[0].raw]),
        encode([MESH_KEY.public, [FOUNDERS.chain[0].raw[:SIGNATURE_BYTES]]]),
        encode([SigningKey(b"x" * 32).public, [FOUNDERS.chain[0].raw]]),
        forged(MESH_KEY, None, tag="p2pmesh record 1"),
        forged(MESH_KEY, None, mesh=b"n" * 16),
        forged(MESH_KEY, None, holder=b"short"),
        forged(MESH_KEY, None, role="king"),
        forged(MESH_KEY, None, role=4),
        forged(MESH_KEY, None, rights=["stage", 1]),
        forged(MESH_KEY, None, rights=["x"] * (RIGHTS_MAX + 1)),
        forged(MESH_KEY, None, issued_at=True),
        forged(MESH_KEY, None, issued_at=-1),
        forged(MESH_KEY, None, issued_at=int(NOW) + 1, expires_at=int(NOW)),
        forged(MESH_KEY, None, basis="bribe"),
        forged(MESH_KEY, None, via=b"v" * 16),
        forged(MESH_KEY, None, basis="invite"),
        forged(MESH_KEY, None, basis="invite", via=b"short"),
        forged(ANNA, INVITERS, holder=ANNA.public),
        forged(ANNA, INVITERS, holder=FOUNDER.public),
        forged(ANNA, INVITERS, holder=MESH_KEY.public),
        forged(ANNA, INVITERS, mesh=b"n" * 16),
        forged(MESH_KEY, None, rights=["x" * CREDENTIAL_BYTES_MAX]),
    ],
)
def test_another_form_is_refused(raw: bytes) -> None:
    with pytest.raises(PeerError):
        read_credential(raw)


def test_an_unknown_right_is_left_alone() -> None:
    read = read_credential(forged(MESH_KEY, None, rights=["fly"]))
    assert not read.stage
    assert is_signed(read)


@pytest.mark.parametrize(
    "raw",
    [
        forged(ANNA, FOUNDERS),
        forged(FOUNDER, INVITERS),
        forged(FOUNDER, None),
        forged(MESH_KEY, FOUNDERS),
    ],
    ids=["not its founder", "not its holder", "not the mesh", "the mesh again"],
)
def test_a_signature_of_anybody_else_is_noticed(raw: bytes) -> None:
    assert not is_signed(read_credential(raw))


def test_a_mesh_that_somebody_made_up_is_another_mesh() -> None:
    theirs = found(SigningKey(b"x" * 32), ANNA.public, FOUNDED_AT)
    assert theirs.mesh != MESH
    mixed = encode([MESH_KEY.public, [theirs.chain[0].raw]])
    with pytest.raises(CredentialError, match="another mesh"):
        read_credential(mixed)
    assert MeshId(SigningKey(b"x" * 32).id) == theirs.mesh


@given(st.binary(max_size=400))
def test_junk_is_a_peers_fault_and_nothing_else(junk: bytes) -> None:
    for raw in (junk, encode([MESH_KEY.public, [junk]])):
        with pytest.raises(PeerError):
            read_credential(raw)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_no_bit_can_be_changed(place: int, change: int) -> None:
    good = chain(3)[-1]
    raw = bytearray(good.raw)
    raw[place % len(raw)] ^= change
    try:
        read = read_credential(bytes(raw))
    except PeerError:
        return
    assert not is_signed(read)


values = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2**64 - 1) | st.binary(max_size=64) | st.text(),
    lambda inner: st.lists(inner, max_size=9),
    max_leaves=12,
)


@given(st.lists(values, max_size=10))
def test_signed_nonsense_is_refused(fields: list[Any]) -> None:
    signed = encode(fields)
    with pytest.raises(PeerError):
        read_credential(encode([MESH_KEY.public, [MESH_KEY.sign(signed) + signed]]))


@given(st.sampled_from(Role), st.booleans(), st.integers(0, 2**32), st.integers(0, 2**32))
def test_whatever_may_be_said_survives_the_wire(
    role: Role,
    stage: bool,  # noqa: FBT001  # Hypothesis passes it by position
    now: int,
    ttl_s: int,
) -> None:
    made = credential(BERT, role, stage=stage, now=min(now, FOUNDERS.expires_at), ttl_s=ttl_s)
    assert read_credential(made.raw) == made
    assert (made.role, made.stage, made.node) == (role, stage, BERT.id)
    assert is_signed(made)
