from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.gossip.overlay import Overlay
from p2pmesh.gossip.shared import MemberInfo, Shared, read_accused, read_member
from p2pmesh.state.owner_records import OwnerRecords
from p2pmesh.wire.evidence import Accusation
from p2pmesh.wire.registers import ACCUSED, MEMBER
from tests.gossip.builders import HERE, STARTED, accusation, accused_by, member_of
from tests.state.builders import NODES, NOW, record

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.binary(max_size=20)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=12,
)


def test_a_member_record_is_read() -> None:
    known = read_member(member_of(1, 7, left=True))
    assert known == MemberInfo(STARTED, 7, NOW, (HERE,), left=True)
    assert known.version == (STARTED, 7)


def test_accusations_are_read() -> None:
    assert set(read_accused(accused_by(0, 1, (2, 9)))) == {accusation(1), accusation(2, 9)}
    assert read_accused(accused_by(0)) == ()


@given(st.dictionaries(st.sampled_from(["name", "addresses", "version", "left", "x"]), VALUES))
def test_signed_nonsense_is_nobody(body: dict[str, Any]) -> None:
    known = read_member(record(1, MEMBER, body=body))
    assert known is None or isinstance(known, MemberInfo)


@given(st.dictionaries(st.sampled_from(["s", "x"]), VALUES))
def test_signed_nonsense_accuses_nobody(body: dict[str, Any]) -> None:
    for row in read_accused(record(1, ACCUSED, body=body)):
        assert len(row.subject) == 16


@pytest.mark.parametrize(
    "rows",
    [
        [[NODES[0], 1]],
        [[NODES[0], 1, 1, 1]],
        [[NODES[0][:15], 1, 1]],
        [[NODES[0], -1, 1]],
        [[NODES[0], 1, True]],
        [NODES[0]],
    ],
)
def test_a_bad_row_spoils_no_other(rows: list[Any]) -> None:
    one = Accusation(NODES[1], 1, 1)
    assert read_accused(record(1, ACCUSED, body={"s": [*rows, list(one)]})) == (one,)


@pytest.mark.parametrize("rows", [None, 1, {}, b"rows"])
def test_nonsense_accuses_nobody(rows: object) -> None:
    assert read_accused(record(1, ACCUSED, body={"s": rows})) == ()


def test_a_node_calls_the_functions_as_they_are() -> None:
    shared = Shared()
    assert shared.member is read_member
    assert shared.accused is read_accused
    assert shared.overlay is Overlay
    assert shared.held is None
    assert shared.grown is OwnerRecords.with_record
