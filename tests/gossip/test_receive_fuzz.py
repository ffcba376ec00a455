"""A receiver takes anything at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.gossip.events import Disconnect, Rejected
from p2pmesh.state.trust import members_only
from p2pmesh.wire.codec import encode
from p2pmesh.wire.evidence import EVIDENCE_MAX
from p2pmesh.wire.messages import Push
from p2pmesh.wire.records import CREDENTIAL, verify_record
from p2pmesh.wire.registers import MEMBER
from tests.gossip.builders import (
    STARTED,
    View,
    accused_by,
    certificate_by,
    fork_of,
    member_of,
    mesh_of,
)
from tests.gossip.receiver import ME, PEER, Inlet, caps
from tests.state.builders import MESH, NOW, record, sealed
from tests.state.statements import ANNA, BERT, CARL, EMMA, PAUL

GOOD: list[bytes] = [
    *(member_of(number, seq).raw for number in range(4) for seq in (1, 2)),
    *(caps(number, body={"value": value}).raw for number in range(3) for value in (1, 2)),
    *(accused_by(number, 3).raw for number in range(3)),
    caps(0, instance=3).raw,
    fork_of(1).raw,
    certificate_by([0, 1, 2], 3).raw,
    certificate_by([1, 2], 0).raw,
]
NONSENSE: list[bytes] = [
    record(1, name, epoch=STARTED, seq=5, body=body).raw
    for name in ("member", "accused", "caps", "wants", "serving", "z/99")
    for body in ({}, {"s": 1}, {"s": [[b"x", 1, 1]]}, {"addresses": [["deep"]]}, {"name": None})
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=5),
    max_leaves=10,
)


def flipped(raw: bytes, at: int, bit: int) -> bytes:
    at %= len(raw)
    return raw[:at] + bytes([raw[at] ^ (1 << bit)]) + raw[at + 1 :]


PIECES = st.one_of(
    st.sampled_from(GOOD),
    st.sampled_from(NONSENSE),
    st.binary(max_size=300),
    st.builds(lambda raw, end: raw[:end], st.sampled_from(GOOD), st.integers(0, 400)),
    st.builds(flipped, st.sampled_from(GOOD), st.integers(0, 2000), st.integers(0, 7)),
    st.builds(
        lambda tag, rest: encode([tag, *rest]),
        st.sampled_from(["cert", "fork"]),
        st.lists(VALUES | st.sampled_from(GOOD), max_size=5),
    ),
    st.builds(lambda depth: b"\x91" * depth + b"\xc0", st.integers(1, 2000)),
    st.sampled_from([b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdd\x00\x10\x00\x00"]),
)
Pieces = list[bytes]
LISTS = st.lists(PIECES, max_size=4).map(tuple)


@given(
    st.lists(
        st.builds(
            Push,
            statements=LISTS,
            records=LISTS,
            forks=LISTS,
            certificates=LISTS,
            asked=st.booleans(),
        ),
        max_size=6,
    )
)
def test_whatever_comes_is_merged_ignored_or_ends_the_link(said: list[Push]) -> None:
    inlet = Inlet(mesh_of(4))
    for number, facts in enumerate(said):
        inlet.verified.clear()
        taken = inlet.receiver.take(PEER, facts, NOW + number, NOW + number)
        inlet.view.refresh(taken.owners)
        assert {type(out) for out in taken.out} <= {Disconnect, Rejected}
        assert len(inlet.verified) <= 2 * len(facts.records) + 2 * len(facts.forks) + (
            EVIDENCE_MAX * len(facts.certificates)
        )
        assert all(verify_record(one) for one in taken.own)
        inlet.receiver.reconsider(NOW + number)
    for standing in inlet.view.document.records():
        assert verify_record(standing)
        assert standing.mesh == MESH
    assert ME not in inlet.view.document.removed


STATEMENTS = [ANNA.revokes(CARL), ANNA.invites(), PAUL.revokes(EMMA), BERT.revokes(ANNA)]
LEASES = [sealed(one.key, MEMBER, body={CREDENTIAL: one.own.raw}).raw for one in (CARL, EMMA, PAUL)]


def damaged(some: list[bytes]) -> st.SearchStrategy[tuple[bytes, ...]]:
    good = st.sampled_from(some)
    bad = st.builds(flipped, good, st.integers(0, 2000), st.integers(0, 7))
    return st.lists(
        good | bad | st.builds(lambda raw, end: raw[:end], good, st.integers(0, 400)), max_size=4
    ).map(tuple)


@given(
    st.lists(
        st.builds(
            Push,
            statements=damaged([one.raw for one in STATEMENTS]),
            records=damaged(LEASES),
            asked=st.booleans(),
        ),
        max_size=6,
    )
)
def test_no_damaged_statement_or_credential_comes_to_stand(said: list[Push]) -> None:
    inlet = Inlet(View(authorised=members_only))
    for number, facts in enumerate(said):
        taken = inlet.receiver.take(PEER, facts, NOW + number, NOW + number)
        inlet.view.refresh(taken.owners)
        assert {type(out) for out in taken.out} <= {Disconnect}
    document = inlet.view.document
    assert set(document.statements) <= set(STATEMENTS)
    assert {one.raw for one in document.records()} <= set(LEASES)
    assert all(members_only(document.trust, one, NOW) for one in document.records())


@given(st.permutations(GOOD[:-2]))
def test_any_order_of_arrival_leads_to_the_same_document(raws: list[bytes]) -> None:
    def after(order: Sequence[bytes]) -> Inlet:
        inlet = Inlet(View(PEER))
        is_fork: Callable[[bytes], bool] = fork_of(1).raw.__eq__
        for raw in order:
            fork = [raw] if is_fork(raw) else []
            inlet.take(*([] if fork else [raw]), forks=fork, asked=True)
        return inlet

    one, other = after(raws), after(GOOD[:-2])
    records = list(one.view.document.records())
    assert records == list(other.view.document.records())
    assert one.view.members.live == other.view.members.live
