"""One core, to which anything is said in any order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmesh.gossip.events import (
    Dial,
    DialFailed,
    LinkDown,
    LinkUp,
    Out,
    Publish,
    Received,
    Rejected,
    Send,
    TimerFired,
)
from p2pmesh.gossip.membership import Gossip
from p2pmesh.identity.keys import NodeId
from p2pmesh.wire.messages import Unknown
from p2pmesh.wire.registers import CAPS, MEMBER, WANTS
from tests.gossip.builders import accused_by, certificate_by, fork_of, member_of
from tests.gossip.net import address
from tests.state.builders import KEYS, MESH, NODES, NOW, record
from tests.wire import strategies
from tests.wire.strategies import PAIRS, messages

NUMBERS = st.sampled_from([0, 1, 2, 77, NOW, 2**63, 2**64 - 1])
RAWS = st.lists(
    st.sampled_from(
        [
            *(member_of(number, seq).raw for number in range(4) for seq in (1, 9)),
            accused_by(1, 0, 2).raw,
            accused_by(2, 0, 1).raw,
            record(0, MEMBER, epoch=NOW + 5, instance=3).raw,
            record(2, CAPS, epoch=NOW + 1, body={"x": [[[]]]}).raw,
            fork_of(1).raw,
            certificate_by([1, 2], 0).raw,
            certificate_by([0, 1], 2).raw,
            b"junk",
        ]
    ),
    max_size=3,
).map(tuple)
MESSAGES = messages(
    numbers=NUMBERS, nodes=st.sampled_from(NODES) | strategies.NODES, pieces=RAWS, bounds=PAIRS
) | st.builds(Unknown, kind=st.text(max_size=5))
PEERS = st.sampled_from(NODES[:4])
EVENTS = st.one_of(
    st.builds(Received, node=PEERS, message=MESSAGES),
    st.builds(LinkUp, node=PEERS, version=st.just(1)),
    st.builds(LinkDown, node=PEERS),
    st.builds(DialFailed, node=st.none() | PEERS, nobody_there=st.booleans()),
    st.builds(
        TimerFired, token=st.sampled_from(["tick", "timeout", "review", "learned", "errand", "?"])
    ),
    st.builds(
        Publish,
        register=st.sampled_from([CAPS, MEMBER, WANTS]),
        body=st.none() | st.just({"value": 1}) | st.just(member_of(0).body),
    ),
)
OUTS_MAX = 400  # of one event in a mesh of four: bounded whatever is said
ABOUT: Callable[[Out], bool] = lambda out: not isinstance(out, Dial | Rejected)  # noqa: E731


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.05, 0.5, 1.0, 9.0, 4000.0]), EVENTS), max_size=30),
    st.booleans(),
)
def test_whatever_comes_in_whatever_order_is_survived(
    story: list[tuple[float, Any]],
    alone: bool,  # noqa: FBT001 - Hypothesis passes by position
) -> None:
    core = Gossip(
        key=KEYS[0], mesh=MESH, instance=9, epoch=NOW, seeds=() if alone else (address(1),)
    )
    now, linked = float(NOW), set[NodeId]()
    core.start(now)
    for after_s, event in story:
        now += after_s
        # A shell says these two in turn; messages may come late.
        if isinstance(event, LinkUp):
            if event.node == core.me or event.node in linked:
                continue
            linked.add(event.node)
        if isinstance(event, LinkDown) and event.node not in linked:
            continue
        if isinstance(event, LinkDown):
            linked.discard(event.node)
        outs = core.handle(event, now)
        assert sum(map(ABOUT, outs)) <= OUTS_MAX
        assert core.linked == linked
        assert core.me not in core.removed
        for out in outs:
            if isinstance(out, Send):
                assert out.node != core.me
