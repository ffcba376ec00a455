"""Several real gossip cores on one heap of events: time passes only as told."""

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
    Health,
    HealthChanged,
    LinkDown,
    LinkUp,
    Out,
    Publish,
    Received,
    Send,
    SetTimer,
    TimerFired,
)
from p2pmesh.gossip.membership import Gossip
from p2pmesh.identity.keys import NodeId, SigningKey
from tests.state.make import MESH, NOW, member

LATENCY_S = 0.01


class Cluster:
    """Nodes by number; node n listens at 10.0.0.n."""

    def __init__(self, size: int) -> None:
        self.now = float(NOW)
        self.cores: dict[int, Gossip] = {}
        self.down: set[int] = set()  # crashed: connections are refused
        self.frozen: set[int] = set()  # stopped: everything is swallowed
        self.told: dict[int, list[Out]] = {}
        self.messages = 0
        self._heap: list[tuple[float, int, int, Event]] = []
        self._order = itertools.count()
        self._links: set[frozenset[int]] = set()
        for number in range(1, size + 1):
            self.add(number, seeds=() if number == 1 else (address(1),))

    def add(self, number: int, **arguments: Any) -> None:
        defaults: dict[str, Any] = {"epoch": int(self.now), "instance": number}
        core = Gossip(key=key(number), mesh=MESH, **{**defaults, **arguments})
        self.cores[number] = core
        self.told.setdefault(number, [])
        self.down.discard(number)
        self._do(number, core.start(self.now))
        body = member(f"node-{number}", addresses=(address(number),)).to_wire()
        self.tell(number, Publish(register="member", body=body))

    def tell(self, number: int, event: Event) -> None:
        self._do(number, self.cores[number].handle(event, self.now))

    def crash(self, number: int) -> None:
        """kill -9: its connections break at once."""
        self.down.add(number)
        for link in [link for link in self._links if number in link]:
            self._cut(link)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self._heap and self._heap[0][0] <= end:
            self.now, _, number, event = heapq.heappop(self._heap)
            if number in self.frozen:
                # Its kernel keeps what comes, and the process sees it when it goes on.
                self._at(number, event, after_s=0.1)
            elif number not in self.down:
                self.tell(number, event)
        self.now = end

    def health(self, seen_by: int, of: int) -> Health:
        return self.cores[seen_by].prober.health(node(of))

    def agree(self) -> bool:
        alive = [core for n, core in self.cores.items() if n not in self.down | self.frozen]
        return len({core.document.fingerprint for core in alive}) == 1

    def health_changes(self, number: int) -> list[tuple[NodeId, Health]]:
        return [
            (out.node, out.health) for out in self.told[number] if isinstance(out, HealthChanged)
        ]

    def _do(self, number: int, outs: list[Out]) -> None:
        self.told[number] += outs
        for out in outs:
            match out:
                case Send(node=to, message=message):
                    other = by_node(to)
                    if frozenset({number, other}) in self._links:
                        self.messages += 1
                        event = Received(node=node(number), message=message)
                        self._at(other, event, after_s=LATENCY_S)
                case SetTimer(after_s=after_s, token=token):
                    self._at(number, TimerFired(token=token), after_s=after_s)
                case Dial(node=to, addresses=addresses):
                    self._dial(number, to, addresses[0])
                case Disconnect(node=to):
                    self._cut(frozenset({number, by_node(to)}))
                case _:
                    pass

    def _dial(self, number: int, to: NodeId | None, where: Address) -> None:
        other = int(where.host.rsplit(".", 1)[1])
        link = frozenset({number, other})
        if other in self.frozen:
            self._at(number, DialFailed(node=to, nobody_there=False), after_s=3)
        elif other in self.down or other not in self.cores or other == number:
            self._at(number, DialFailed(node=to, nobody_there=True), after_s=LATENCY_S)
        elif link not in self._links:
            self._links.add(link)
            self._at(number, LinkUp(node=node(other)), after_s=LATENCY_S)
            self._at(other, LinkUp(node=node(number)), after_s=LATENCY_S)

    def _cut(self, link: frozenset[int]) -> None:
        self._links.discard(link)
        for number in sorted(link):
            (other,) = link - {number}
            self._at(number, LinkDown(node=node(other)), after_s=LATENCY_S)

    def _at(self, number: int, event: Event, *, after_s: float) -> None:
        heapq.heappush(self._heap, (self.now + after_s, next(self._order), number, event))


def key(number: int) -> SigningKey:
    return SigningKey(number.to_bytes(32, "big"))


def node(number: int) -> NodeId:
    return NodeId(key(number).id)


def by_node(wanted: NodeId) -> int:
    return next(number for number in range(1, 100) if node(number) == wanted)


def address(number: int) -> Address:
    return Address(f"10.0.0.{number}", 9338)
