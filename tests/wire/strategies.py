"""Any message of the protocol, for Hypothesis."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from p2pmesh.identity.keys import NodeId
from p2pmesh.wire.messages import (
    IDS_MAX,
    RANGES_MAX,
    RECENT_MAX,
    WANT_MAX,
    Ack,
    FetchRequest,
    Items,
    Message,
    Own,
    Ping,
    ProbeReport,
    ProbeRequest,
    Push,
    Range,
    Ranges,
)

NUMBERS = st.integers(0, 2**64 - 1)
IDS = st.binary(min_size=16, max_size=16)
NODES = IDS.map(NodeId)
PAIRS = st.tuples(st.binary(max_size=16), st.binary(max_size=16))
BOUNDS = (
    PAIRS.filter(lambda pair: pair[0] != pair[1])
    .map(sorted)
    .flatmap(lambda pair: st.sampled_from([(pair[0], pair[1]), (pair[1], b"")]))
)

Pairs = st.SearchStrategy[tuple[bytes, bytes]]


def many(of: st.SearchStrategy[Any], at_most: int) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(of, max_size=at_most).map(tuple)


PIECES = many(st.binary(max_size=64), 5)


def messages(
    *,
    numbers: st.SearchStrategy[int] = NUMBERS,
    nodes: st.SearchStrategy[NodeId] = NODES,
    pieces: st.SearchStrategy[tuple[bytes, ...]] = PIECES,
    bounds: Pairs = BOUNDS,
) -> st.SearchStrategy[Message]:
    """Messages of every kind that is sent.

    Args:
        numbers: Tokens, times and counts.
        nodes: Whom they ask about.
        pieces: Statements, records, certificates and forks, as bytes.
        bounds: Of ranges; only with those that are in order can a message be read.
    """

    def range_of(bound: tuple[bytes, bytes], count: int, fingerprint: bytes) -> Range:
        return Range(lower=bound[0], upper=bound[1], count=count, fingerprint=fingerprint)

    def items_of(bound: tuple[bytes, bytes], held: tuple[bytes, ...], *, answer: bool) -> Items:
        return Items(lower=bound[0], upper=bound[1], ids=held, answer=answer)

    signs: dict[str, Any] = {
        "token": numbers,
        "at_ms": numbers,
        "cutoff": numbers,
        "fingerprint": IDS,
        "plan": IDS,
        "keep": st.booleans(),
        "recent": many(IDS, RECENT_MAX),
    }
    return st.one_of(
        st.builds(
            Push,
            statements=pieces,
            records=pieces,
            certificates=pieces,
            forks=pieces,
            asked=st.booleans(),
        ),
        st.builds(Ping, **signs),
        st.builds(Ack, **signs),
        st.builds(ProbeRequest, subject=nodes, token=numbers),
        st.builds(ProbeReport, subject=nodes, token=numbers, alive=st.booleans()),
        st.builds(Ranges, ranges=many(st.builds(range_of, bounds, numbers, IDS), RANGES_MAX)),
        st.builds(items_of, bounds, many(IDS, IDS_MAX), answer=st.booleans()),
        st.builds(FetchRequest, ids=many(IDS, WANT_MAX)),
        st.just(Own()),
    )
