from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.discovery.announcement import (
    DATAGRAM_BYTES_MAX,
    FOUNDED_AT_MAX,
    FOUNDED_AT_MIN,
    MAGIC,
    NAME_BYTES_MAX,
    Announcement,
    Query,
    read_datagram,
    read_properties,
    short_name,
)
from p2pmesh.errors import PeerError
from p2pmesh.identity.keys import MeshId, NodeId
from p2pmesh.wire.codec import decode, encode

IDS = st.binary(min_size=16, max_size=16)
NAMES = st.text(max_size=200).map(short_name)
PORTS = st.integers(1, 65535)
ANNOUNCEMENTS = st.builds(
    Announcement,
    node=IDS.map(NodeId),
    mesh=IDS.map(MeshId),
    mesh_name=NAMES,
    founded_at=st.integers(FOUNDED_AT_MIN, FOUNDED_AT_MAX),
    open=st.booleans(),
    port=PORTS,
    version=st.integers(1, 65535),
)
QUERIES = st.builds(
    Query,
    node=IDS.map(NodeId),
    name=NAMES,
    mesh=st.none() | IDS.map(MeshId),
    port=PORTS,
)
SOME = Announcement(
    NodeId(b"n" * 16), MeshId(b"m" * 16), "quiet-otter", 1_800_000_000, True, 9338, 2
)


def fields(said: Announcement | Query) -> dict[str, Any]:
    found = decode(said.to_datagram()[len(MAGIC) :], bytes_max=DATAGRAM_BYTES_MAX)
    assert isinstance(found, dict)
    return found


@given(ANNOUNCEMENTS | QUERIES)
def test_what_is_said_is_read_and_fits(said: Announcement | Query) -> None:
    data = said.to_datagram()
    assert len(data) <= DATAGRAM_BYTES_MAX
    assert read_datagram(data) == said


@given(ANNOUNCEMENTS)
def test_dns_sd_says_the_same(said: Announcement) -> None:
    properties = said.to_properties()
    assert read_properties(properties, said.port) == said
    assert all(len(key) + 1 + len(value or b"") <= 255 for key, value in properties.items())


@given(st.binary(max_size=600) | st.binary(max_size=600).map(lambda data: MAGIC + data))
def test_junk_is_refused_and_nothing_else_happens(data: bytes) -> None:
    with pytest.raises(PeerError):
        read_datagram(data)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.binary() | st.text("ab\x1b"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=3),
    max_leaves=5,
)


@given(ANNOUNCEMENTS | QUERIES, st.data())
def test_a_field_of_another_kind_is_refused_or_read(
    said: Announcement | Query, data: st.DataObject
) -> None:
    """Well-formed msgpack that is almost right gets furthest into the reader."""
    changed = fields(said)
    changed[data.draw(st.sampled_from(sorted(changed)))] = data.draw(VALUES)
    try:
        found = read_datagram(MAGIC + encode(changed))
    except PeerError:
        return
    assert read_datagram(found.to_datagram()) == found


@given(st.dictionaries(st.sampled_from([*SOME.to_properties(), b"x"]), st.none() | st.binary()))
def test_junk_properties_are_refused_and_nothing_else_happens(
    changes: dict[bytes, bytes | None],
) -> None:
    try:
        found = read_properties({**SOME.to_properties(), **changes}, 9338)
    except PeerError:
        return
    assert read_properties(found.to_properties(), 9338) == found


@pytest.mark.parametrize("missing", sorted(SOME.to_properties()))
def test_a_service_that_leaves_something_out_is_refused(missing: bytes) -> None:
    properties = {key: value for key, value in SOME.to_properties().items() if key != missing}
    with pytest.raises(PeerError, match=missing.decode()):
        read_properties(properties, 9338)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", 0),
        ("port", 65536),
        ("port", True),
        ("founded", FOUNDED_AT_MIN - 1),
        ("founded", FOUNDED_AT_MAX + 1),
        ("version", 0),
        ("version", 2**40),
        ("mesh", b""),
        ("mesh", b"m" * 17),
        ("node", b"n" * 15),
        ("open", 1),
        ("kind", "invitation"),
        ("name", None),
    ],
)
def test_what_cannot_be_is_refused(field: str, value: Any) -> None:
    with pytest.raises(PeerError):
        read_datagram(MAGIC + encode({**fields(SOME), field: value}))


def test_a_later_version_may_say_more() -> None:
    assert read_datagram(MAGIC + encode({**fields(SOME), "since": [1, 2]})) == SOME
    assert read_properties({**SOME.to_properties(), b"since": None}, SOME.port) == SOME


def test_names_are_shown_in_one_plain_line() -> None:
    nasty = "\x1b[2Jkitchen\r\n\u202epc\ud800"
    heard = read_datagram(replace(SOME, mesh_name=nasty).to_datagram())
    assert isinstance(heard, Announcement)
    assert heard.mesh_name == "[2Jkitchen pc"
    raw = MAGIC + encode({**fields(SOME), "name": "a\x1bb"})
    assert read_datagram(raw) == replace(SOME, mesh_name="a b")
    service = read_properties({**SOME.to_properties(), b"name": b"a\x1bb\xff"}, SOME.port)
    assert service.mesh_name == "a b"


def test_a_long_name_is_cut_between_letters() -> None:
    assert short_name("\N{SNOWMAN}" * 500) == "\N{SNOWMAN}" * (120 // 2 + 4)
    assert len(short_name("a" + "\N{SNOWMAN}" * 500).encode()) <= NAME_BYTES_MAX
    assert short_name("a" + "\N{SNOWMAN}" * 500) == "a" + "\N{SNOWMAN}" * 63
