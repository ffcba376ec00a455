"""The parts of a simulated network: hosts, conditions, cuts, connections.

Values and bookkeeping only; what happens with them is the matter of `network`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from p2pmesh.identity.keys import NodeId
from p2pmesh.wire.messages import Message

RETRANSMIT_FIRST_S = 0.2

Payload = Message | bytes  # bytes: what no core would say


class Host(Protocol):
    """A machine with, at times, a process that listens. Numbers tell hosts apart."""

    number: int
    id: NodeId  # what it proves in the hello
    instance: int  # of the process
    versions: tuple[int, ...]  # of the protocol that it speaks
    powered: bool  # its kernel sends and receives; otherwise there is silence

    @property
    def listening(self) -> bool:
        """Whether a process is there to connect to; otherwise its kernel refuses."""
        ...

    @property
    def awake(self) -> bool:
        """Whether that process runs; otherwise its kernel keeps what comes."""
        ...

    def accepted(self, end: End) -> None:
        """Somebody connected."""
        ...

    def received(self, end: End, payload: Payload) -> None:
        """A message came."""
        ...

    def ended(self, end: End) -> None:
        """The other side closed the connection, or it broke."""
        ...


@dataclass(slots=True)
class Conditions:
    """The conditions that every packet meets.

    Attributes:
        loss: Share of packets lost and sent again: a delay.
        jitter_s: Delay of each message, at most; messages of different links overtake each other.
        drop: Share of messages that are never seen again, on a connection that stays. Not TCP.
        duplicate: Share of messages that come twice. Not TCP.
        bytes_per_s: What the uplink of each host takes; 0: any number.
    """

    loss: float = 0.0
    jitter_s: float = 0.0
    drop: float = 0.0
    duplicate: float = 0.0
    bytes_per_s: float = 0.0

    @property
    def calm(self) -> bool:
        """Whether nothing happens to packets."""
        return self == Conditions()


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """Nothing gets from any of `sources` to any of `targets`."""

    sources: frozenset[int]
    targets: frozenset[int]


class End:
    """One side of a connection, with what is on its way to the other side.

    Attributes:
        outgoing: This side dialled.
        instance: Of the process on this side.
        open: False once this side closed it, lost it, or was told of its end.
        since: When this side took it as its link.
        lost: Nothing gets through any more, either way, as when a router forgot the connection.
        queue: What the far side has not taken yet, with when it is due and its size; None ends
            the connection.
        waiting_since: When the head of the queue was first held up.
    """

    __slots__ = (
        "closing",
        "far",
        "host",
        "instance",
        "last_due",
        "lost",
        "one_way_s",
        "open",
        "outgoing",
        "parked",
        "queue",
        "queued_bytes",
        "retransmit_s",
        "since",
        "waiting_since",
    )
    far: End

    def __init__(self, host: Host, one_way_s: float, *, outgoing: bool) -> None:
        self.host, self.one_way_s, self.outgoing = host, one_way_s, outgoing
        self.instance = host.instance
        self.open, self.closing, self.parked, self.lost = True, False, False, False
        self.queue: deque[tuple[float, int, Payload | None]] = deque()
        self.queued_bytes = 0
        self.last_due = self.since = 0.0
        self.retransmit_s = RETRANSMIT_FIRST_S
        self.waiting_since: float | None = None

    @property
    def version(self) -> int:
        """The protocol that both ends speak: the newest that they have in common."""
        return max(set(self.host.versions) & set(self.far.host.versions))

    def drop_all(self) -> None:
        """Forget what is on its way."""
        self.queue.clear()
        self.queued_bytes = 0


@dataclass(slots=True)
class Traffic:
    """The traffic of one host, payload and overhead, and its longest queue so far."""

    messages: int = 0
    sent_bytes: int = 0
    queue_max: int = 0
    queue_bytes_max: int = 0
    overflows: int = 0


class Failure(Enum):
    """Why there is no connection."""

    REFUSED = "refused"  # the machine itself said that nobody listens
    SILENCE = "silence"
