from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.errors import PeerError
from p2pmesh.identity.keys import MeshId, NodeId, SigningKey
from p2pmesh.wire.codec import encode
from p2pmesh.wire.evidence import (
    ACCUSED_MAX,
    CERTIFICATE_BYTES_MAX,
    EVIDENCE_MAX,
    FORK_BYTES_MAX,
    Accusation,
    Certificate,
    Fork,
    accused_from_wire,
    accused_to_wire,
    make_certificate,
    make_fork,
    parse_certificate,
    parse_fork,
)
from p2pmesh.wire.facts import verify
from p2pmesh.wire.records import (
    RECORD_BYTES_MAX,
    Record,
    RecordCheck,
    seal,
)
from p2pmesh.wire.registers import ACCUSED

MESH = MeshId(b"m" * 16)
KEYS = [SigningKey(bytes([number]) * 32) for number in range(12)]
SUBJECT = NodeId(KEYS[0].id)
DOWN = Accusation(SUBJECT, 1000, 3)
CHECK = RecordCheck()


def sealed(key: SigningKey, body: dict[str, Any], **changes: Any) -> Record:
    arguments: dict[str, Any] = {
        "mesh": MESH,
        "register": ACCUSED,
        "epoch": 900,
        "seq": 1,
        "instance": 7,
        "issued_at": 2000,
        "ttl_s": 60,
    }
    return seal(key, **{**arguments, **changes}, body=body)


def accuse(number: int, *rows: Accusation, **changes: Any) -> Record:
    return sealed(KEYS[number], accused_to_wire(rows or (DOWN,)), **changes)


def weakly_removed(record: Record) -> bytes:
    return bytes(64) + record.raw[64:]


def on_the_wire(accusation: Iterable[Any], raws: Iterable[Any]) -> bytes:
    return encode(["cert", *accusation, list(raws)])


# Accusations


rows = st.builds(
    Accusation,
    st.binary(min_size=16, max_size=16).map(NodeId),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
)


@given(st.lists(rows, max_size=20))
def test_accusations_survive_and_are_in_order(accusations: list[Accusation]) -> None:
    body = accused_to_wire(accusations)
    assert accused_from_wire(body) == tuple(sorted(set(accusations)))


def test_a_full_register_fits_one_record() -> None:
    full = [Accusation(NodeId(bytes([n]) * 16), 2**32, 2**32) for n in range(ACCUSED_MAX)]
    assert len(accuse(1, *full).raw) < RECORD_BYTES_MAX
    with pytest.raises(ValueError, match="at most 256"):
        accused_to_wire([*full, DOWN])


@pytest.mark.parametrize("body", [{"s": b""}, {"s": {}}, {"s": None}])
def test_accusations_of_another_form_are_refused(body: dict[str, Any]) -> None:
    with pytest.raises(PeerError):
        accused_from_wire(body)


@pytest.mark.parametrize(
    "row",
    [
        1,
        [],
        [SUBJECT, 1],
        [SUBJECT, 1, 1, 1],
        [SUBJECT, True, 1],
        [SUBJECT, 1, -1],
        [b"short", 1, 1],
        ["text", 1, 1],
    ],
)
def test_an_accusation_that_does_not_read_costs_that_row(row: object) -> None:
    assert accused_from_wire({"s": [row, list(DOWN), row]}) == (DOWN,)


def test_accusations_beyond_the_bound_are_not_looked_at() -> None:
    assert accused_from_wire({}) == ()
    assert len(accused_from_wire({"s": [list(DOWN)] * (ACCUSED_MAX + 1)})) == ACCUSED_MAX


def test_unknown_fields_of_accusations_are_left_alone() -> None:
    assert accused_from_wire({**accused_to_wire([DOWN]), "later": 1}) == (DOWN,)


# Certificates


def certificate(*numbers: int) -> Certificate:
    return make_certificate(DOWN, [accuse(number) for number in numbers])


def test_a_certificate_survives_the_wire() -> None:
    made = certificate(1, 2, 3)
    read = parse_certificate(made.raw, CHECK)
    assert read == made
    assert read.accusation == DOWN
    assert read.accusers == {KEYS[1].id, KEYS[2].id, KEYS[3].id}
    assert read.mesh == MESH
    assert verify(read, CHECK)


def test_it_is_as_new_as_its_newest_evidence() -> None:
    evidence = [accuse(1, issued_at=2000), accuse(2, issued_at=2007), accuse(3, issued_at=1990)]
    assert make_certificate(DOWN, evidence).issued_at == 2007


def test_the_order_of_the_evidence_does_not_matter() -> None:
    assert certificate(1, 2, 3).raw == certificate(3, 1, 2).raw


def test_its_id_is_that_of_the_accusation() -> None:
    assert certificate(1, 2).id == certificate(3, 4, 5).id
    later = DOWN._replace(seq=4)
    assert make_certificate(later, [accuse(1, later)]).id != certificate(1).id


def test_an_accuser_may_accuse_others_too() -> None:
    others = [DOWN, DOWN._replace(seq=4), Accusation(NodeId(b"x" * 16), 1, 1)]
    made = make_certificate(DOWN, [accuse(1, *others), accuse(2)])
    assert parse_certificate(made.raw, CHECK) == made


def test_of_too_many_accusers_a_fixed_choice_is_shown() -> None:
    made = certificate(*range(1, 12))
    assert len(made.evidence) == EVIDENCE_MAX
    assert made.accusers == set(sorted(key.id for key in KEYS[1:])[:EVIDENCE_MAX])


def test_the_largest_certificate_has_room() -> None:
    body = {"later": bytes(RECORD_BYTES_MAX - 400), **accused_to_wire([DOWN])}
    made = make_certificate(DOWN, [sealed(KEYS[n], body) for n in range(1, 9)])
    assert len(made.raw) < CERTIFICATE_BYTES_MAX
    assert parse_certificate(made.raw, CHECK) == made


def test_one_false_signature_spoils_it() -> None:
    evidence = sorted((accuse(1), accuse(2)), key=lambda record: record.owner)
    raw = on_the_wire(DOWN, [evidence[0].raw, weakly_removed(evidence[1])])
    assert not verify(parse_certificate(raw, CHECK), CHECK)


@pytest.mark.parametrize(
    ("evidence", "sentence"),
    [
        ([], "without evidence"),
        ([accuse(1), accuse(1, seq=2)], "speaks twice"),
        ([accuse(0)], "accuses itself"),
        ([accuse(1, DOWN._replace(seq=2))], "somebody else"),
        ([accuse(1, DOWN._replace(epoch=999))], "somebody else"),
        ([accuse(1, register="caps")], "accuses nobody"),
        ([accuse(1), accuse(2, mesh=MeshId(b"n" * 16))], "accuses nobody"),
        ([sealed(KEYS[1], {})], "accuses somebody else"),
    ],
)
def test_what_does_not_prove_it_makes_no_certificate(evidence: list[Record], sentence: str) -> None:
    raws = [record.raw for record in sorted(evidence, key=lambda record: record.owner)]
    with pytest.raises(PeerError, match=sentence):
        make_certificate(DOWN, evidence)
    with pytest.raises(PeerError, match=sentence):
        parse_certificate(on_the_wire(DOWN, raws), CHECK)


@pytest.mark.parametrize(
    "value",
    [
        [],
        ["cert", SUBJECT, 1000, 3],
        ["fork", *DOWN, []],
        ["cert", b"short", 1000, 3, []],
        ["cert", SUBJECT, True, 3, []],
        ["cert", SUBJECT, 1000, -3, []],
        ["cert", *DOWN, [1]],
        ["cert", *DOWN, [b"junk"]],
        ["cert", *DOWN, [b""] * (EVIDENCE_MAX + 1)],
        ["cert", *DOWN, sorted((accuse(1).raw, accuse(2).raw), key=lambda raw: raw[134:])[::-1]],
        {"cert": 1},
    ],
)
def test_a_certificate_of_another_form_is_refused(value: Any) -> None:
    with pytest.raises(PeerError):
        parse_certificate(encode(value), CHECK)


# Forks


ONE, OTHER = sealed(KEYS[1], {"n": 1}, register="caps"), sealed(KEYS[1], {"n": 2}, register="caps")


def test_a_fork_survives_the_wire() -> None:
    made = make_fork(ONE, OTHER)
    assert made == make_fork(OTHER, ONE)
    read = parse_fork(made.raw, CHECK)
    assert read == made
    assert (read.owner, read.register, read.epoch, read.seq) == (KEYS[1].id, "caps", 900, 1)
    assert read.mesh == MESH
    assert verify(read, CHECK)


def test_a_fork_is_as_new_as_its_newer_side() -> None:
    later = sealed(KEYS[1], {"n": 2}, register="caps", issued_at=2009)
    assert make_fork(ONE, later).issued_at == 2009


def test_each_pair_has_its_own_id() -> None:
    third = sealed(KEYS[1], {"n": 3}, register="caps")
    pairs = [make_fork(ONE, OTHER), make_fork(ONE, third), make_fork(OTHER, third)]
    assert len({fork.id for fork in pairs}) == 3


def test_the_largest_fork_has_room() -> None:
    large = bytes(RECORD_BYTES_MAX - 400)
    made = make_fork(sealed(KEYS[1], {"n": large}), sealed(KEYS[1], {"n": large + b"x"}))
    assert len(made.raw) < FORK_BYTES_MAX
    assert parse_fork(made.raw, CHECK) == made


@pytest.mark.parametrize("number", [0, 1])
def test_both_sides_must_be_signed(number: int) -> None:
    made = make_fork(ONE, OTHER)
    raws = [made.first.raw, made.second.raw]
    raws[number] = bytes(64) + raws[number][64:]
    assert not verify(parse_fork(encode(["fork", *raws]), CHECK), CHECK)


@pytest.mark.parametrize(
    "other",
    [
        ONE,
        sealed(KEYS[2], {"n": 2}, register="caps"),
        sealed(KEYS[1], {"n": 2}, register="load"),
        sealed(KEYS[1], {"n": 2}, register="caps", epoch=901),
        sealed(KEYS[1], {"n": 2}, register="caps", seq=2),
        sealed(KEYS[1], {"n": 2}, register="caps", mesh=MeshId(b"n" * 16)),
    ],
)
def test_records_that_may_stand_side_by_side_are_no_fork(other: Record) -> None:
    with pytest.raises(PeerError, match="a fork of"):
        make_fork(ONE, other)
    with pytest.raises(PeerError, match="a fork of"):
        parse_fork(encode(["fork", ONE.raw, other.raw]), CHECK)


FORK = make_fork(ONE, OTHER)


@pytest.mark.parametrize(
    "value",
    [
        [],
        ["fork", ONE.raw],
        ["fork", FORK.second.raw, FORK.first.raw],
        ["fork", FORK.first.raw, 1],
        ["fork", b"", b""],
        ["cert", FORK.first.raw, FORK.second.raw],
        "fork",
    ],
)
def test_a_fork_of_another_form_is_refused(value: Any) -> None:
    with pytest.raises(PeerError):
        parse_fork(encode(value), CHECK)


# Both


@given(st.binary(max_size=300))
def test_junk_is_a_peers_fault_and_nothing_else(junk: bytes) -> None:
    for parse in (parse_certificate, parse_fork):
        with pytest.raises(PeerError):
            parse(junk, CHECK)


@given(
    st.sampled_from([certificate(1, 2), FORK]),
    st.integers(0, 10_000),
    st.none() | st.integers(1, 255),
)
def test_damage_is_refused_or_shows_in_the_signatures(
    made: Certificate | Fork, place: int, change: int | None
) -> None:
    raw = bytearray(made.raw)
    place %= len(raw)
    if change is None:
        del raw[place:]
    else:
        raw[place] ^= change
    try:
        if isinstance(made, Certificate):
            assert not verify(parse_certificate(bytes(raw), CHECK), CHECK)
        else:
            assert not verify(parse_fork(bytes(raw), CHECK), CHECK)
    except PeerError:
        return


def test_reading_asks_the_injected_check() -> None:
    asked: list[bytes] = []

    def parse(raw: bytes) -> Record:
        asked.append(raw)
        return CHECK.parse(raw)

    check = dataclasses.replace(CHECK, parse=parse, verify=lambda record: record.owner != ONE.owner)
    made = parse_certificate(certificate(1, 2).raw, check)
    assert asked == [record.raw for record in made.evidence]
    assert not verify(made, check)
    assert verify(certificate(2, 3), check)
