"""What a member that floods its neighbour with forgeries costs it, in real time."""

from __future__ import annotations

import time

from p2pmesh.gossip.events import Disconnect, LinkUp, Received
from p2pmesh.gossip.membership import Gossip
from p2pmesh.identity.keys import NodeId
from p2pmesh.wire.messages import PIECES_MAX, Push
from p2pmesh.wire.records import seal
from simulations.bodies import caps
from simulations.machine import START_S
from simulations.world import MESH, key_of

FLOOD_PER_S = 10_000
SHARE = 0.1  # of a core, at most
FLOODER = NodeId(key_of(0, 1).id)


def forged(count: int) -> list[Push]:
    """Records that look new and that nobody signed, one in each message."""
    key = key_of(0, 1)
    raws = []
    for seq in range(1, count + 1):
        record = seal(
            key,
            mesh=MESH,
            register="caps",
            epoch=START_S,
            seq=seq,
            instance=1,
            issued_at=START_S,
            ttl_s=240,
            body=caps(1).body or {},
        )
        raws.append(bytes(64) + record.raw[64:])
    return [Push(records=(raw,)) for raw in raws]


def core() -> Gossip:
    node = Gossip(key=key_of(0, 0), mesh=MESH, instance=1, epoch=START_S)
    node.start(START_S)
    node.handle(LinkUp(node=FLOODER, version=1), START_S)
    return node


def test_the_first_forgery_ends_the_link() -> None:
    node = core()
    outs = node.handle(Received(node=FLOODER, message=forged(1)[0]), START_S)
    assert any(isinstance(out, Disconnect) and out.node == FLOODER for out in outs)
    assert FLOODER not in node.document


def test_a_second_of_forgeries_costs_less_than_a_tenth_of_a_core() -> None:
    """The shell closes the link at once; what was read together with the first is handled still."""
    flood, node, disconnected = forged(FLOOD_PER_S), core(), False
    began = time.process_time()
    for facts in flood:
        if not disconnected:
            outs = node.handle(Received(node=FLOODER, message=facts), START_S)
            disconnected = any(isinstance(out, Disconnect) for out in outs)
    took_s = time.process_time() - began
    assert disconnected
    assert took_s < SHARE


def test_the_rest_of_a_message_is_not_looked_at() -> None:
    raws = tuple(facts.records[0] for facts in forged(PIECES_MAX))
    node = core()
    began = time.process_time()
    outs = node.handle(Received(node=FLOODER, message=Push(records=raws)), START_S)
    took_s = time.process_time() - began
    assert any(isinstance(out, Disconnect) for out in outs)
    assert took_s < SHARE / 10
