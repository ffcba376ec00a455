"""A few real gossip cores on one heap of events: time passes only as told."""

from __future__ import annotations

import heapq
import itertools
from typing import Any

from p2pmesh.config import Address
from p2pmesh.gossip.events import (
    Dial,
    DialFailed,
    Disconnect,
    Event,
    LinkDown,
    LinkUp,
    Out,
    PersistEpoch,
    Publish,
    Received,
    Send,
    SetTimer,
    TimerFired,
    TwinFound,
)
from p2pmesh.gossip.membership import Gossip
from p2pmesh.identity.keys import NodeId
from p2pmesh.wire.messages import decode_message, encode_message
from p2pmesh.wire.registers import MEMBER
from tests.state.builders import KEYS, MESH, NODES, NOW, member

LATENCY_S = 0.01
DIAL_TIMEOUT_S = 3.0
SETTLED_S = 8.0


class Net:
    """Nodes by number, those of `tests.state.builders`; each listens at an address of its own.

    Args:
        size: How many there are; all but the first know its address.
    """

    def __init__(self, size: int) -> None:
        self.now = float(NOW)
        self.cores: dict[int, Gossip] = {}
        self.told: dict[int, list[Out]] = {}
        self.epochs: dict[int, int] = {}  # on each disk
        self.asleep: set[int] = set()  # stopped: what comes waits
        self.cut: set[frozenset[int]] = set()  # pairs that cannot reach each other
        self.lost: set[frozenset[int]] = set()  # pairs whose connection swallows all; new ones work
        self._lives: dict[int, int] = {}
        self._links: set[frozenset[int]] = set()
        self._heap: list[tuple[float, int, int, int, Event]] = []
        self._order = itertools.count()
        for number in range(size):
            self.start(number, seeds=() if number == 0 else (address(0),))

    # --- what is done to them ---------------------------------------------------------------------

    def start(self, number: int, *, dialable: bool = True, **changes: Any) -> Gossip:
        """A new process; it says that it is here."""
        self.epochs[number] = max(self.epochs.get(number, 0) + 1, int(self.now))
        arguments: dict[str, Any] = {"epoch": self.epochs[number], "instance": number + 1}
        core = Gossip(key=KEYS[number], mesh=MESH, **{**arguments, **changes})
        self.cores[number] = core
        self.told[number] = []
        self._lives[number] = self._lives.get(number, 0) + 1
        self._do(number, core.start(self.now))
        addresses = (address(number),) if dialable else ()
        body = member(f"node-{number}", addresses=addresses).to_wire()
        self.tell(number, Publish(register=MEMBER, body=body))
        return core

    def kill(self, number: int) -> None:
        """End a process: its kernel tells the others."""
        for link in [link for link in self._links if number in link]:
            self._break(link)
        del self.cores[number]
        self._lives[number] += 1

    def part(self, *sides: set[int]) -> None:
        """Cut links between sides, and let nobody dial across."""
        self.cut = {
            frozenset({one, other})
            for left, right in itertools.combinations(sides, 2)
            for one in left
            for other in right
        }
        for link in self._links & self.cut:
            self._break(link)

    def tell(self, number: int, event: Event) -> list[Out]:
        """Give a core an event; returns what it wants done, which is done."""
        outs = self.cores[number].handle(event, self.now)
        self._do(number, outs)
        return outs

    def run(self, seconds: float) -> None:
        """Let time pass."""
        end = self.now + seconds
        while self._heap and self._heap[0][0] <= end:
            at, _, number, life, event = heapq.heappop(self._heap)
            self.now = at
            if number in self.asleep:
                self._at(number, event, 0.1)
            elif self._lives[number] == life:
                self.tell(number, event)
        self.now = end

    # --- what is seen of them ---------------------------------------------------------------------

    def agree(self, *numbers: int) -> bool:
        """Whether these, or all, know the same."""
        cores = [self.cores[number] for number in numbers or self.cores]
        return len({core.document.fingerprint for core in cores}) == 1

    def removed(self, by: int) -> set[int]:
        return {NODES.index(node) for node in self.cores[by].removed}

    # --- inside -----------------------------------------------------------------------------------

    def _do(self, number: int, outs: list[Out]) -> None:
        self.told[number] += outs
        for out in outs:
            match out:
                case Send(node=node, message=message):
                    other = NODES.index(node)
                    if frozenset({number, other}) in self._links - self.lost:
                        message = decode_message(encode_message(message))
                        event = Received(node=NODES[number], message=message)
                        self._at(other, event, LATENCY_S)
                case SetTimer(after_s=after_s, token=token):
                    self._at(number, TimerFired(token=token), after_s)
                case Dial(node=node, addresses=addresses):
                    self._dial(number, node, addresses[0])
                case Disconnect(node=node):
                    self._break(frozenset({number, NODES.index(node)}))
                case PersistEpoch(epoch=epoch):
                    self.epochs[number] = epoch
                case TwinFound():
                    self.kill(number)
                    return
                case _:
                    pass

    def _dial(self, number: int, node: NodeId | None, where: Address) -> None:
        other = int(where.host.rsplit(".", 1)[1])
        link = frozenset({number, other})
        if other == number or link in self._links - self.lost:
            return
        if link in self.cut or other in self.asleep:
            self._at(number, DialFailed(node=node, nobody_there=False), DIAL_TIMEOUT_S)
        elif other not in self.cores:
            self._at(number, DialFailed(node=node, nobody_there=True), LATENCY_S)
        else:
            self._links.add(link)
            self.lost.discard(link)
            for one, peer in ((number, other), (other, number)):
                self._at(one, LinkUp(node=NODES[peer], version=1), LATENCY_S)

    def _break(self, link: frozenset[int]) -> None:
        if link in self._links:
            self._links.remove(link)
            self.lost.discard(link)
            for number in sorted(link):
                (other,) = link - {number}
                self._at(number, LinkDown(node=NODES[other]), LATENCY_S)

    def _at(self, number: int, event: Event, after_s: float) -> None:
        if number in self._lives:
            entry = (self.now + after_s, next(self._order), number, self._lives[number], event)
            heapq.heappush(self._heap, entry)


def address(number: int) -> Address:
    return Address(f"10.0.0.{number}", 9338)


def settled(size: int) -> Net:
    """So many that have found each other."""
    net = Net(size)
    net.run(SETTLED_S)
    assert net.agree()
    return net
