"""A simulated network: one heap of events, hosts, and connections that behave like TCP.

A connection delivers in order. A packet that is lost comes later: the first retransmission after
200 ms, the next after twice that, and what was sent behind it waits. Nothing else happens to what
is sent but by the knobs in `Conditions`, of which true drops and duplicates are things that TCP
never does. Two hosts are always as far from each other: drawn once per pair.

The seed decides everything; neither the wall clock nor the order of a set ever does.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from random import Random
from typing import Any, Protocol

from p2pmesh.identity.keys import NodeId
from p2pmesh.transport.base import DIAL_TIMEOUT_S
from p2pmesh.transport.links import SEND_QUEUE_MAX

ONE_WAY_S = (0.010, 0.050)
HANDLING_S = 0.001  # what a receiver takes to get to a message
RETRANSMIT_FIRST_S = 0.2
RETRANSMIT_MAX_S = 60.0
GIVE_UP_S = 924.0  # of silence, until a kernel calls a connection broken (Linux's default)
OVERHEAD_BYTES = 100  # of each message, in frames, TLS and packets


def branch(seed: int, name: str) -> Random:
    """One branch of the tree of random numbers; what is drawn from one moves no other."""
    return Random(f"{seed}/{name}")


class Schedule:
    """What happens next. Time is in seconds from the start of the run."""

    def __init__(self) -> None:
        self.now = 0.0
        self.steps = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = 0

    def after(self, seconds: float, what: Callable[..., None], *arguments: Any) -> None:
        """Have `what(*arguments)` called so much later; equal times keep their order."""
        self._order += 1
        heapq.heappush(self._heap, (self.now + seconds, self._order, what, arguments))

    def run(self, until_s: float) -> None:
        """Let everything happen up to and including that moment."""
        heap = self._heap
        while heap and heap[0][0] <= until_s:
            self.now, _, what, arguments = heapq.heappop(heap)
            self.steps += 1
            what(*arguments)
        self.now = until_s


class Host(Protocol):
    """A machine with, at times, a process that listens. Numbers tell hosts apart."""

    number: int
    id: NodeId  # what it proves in the hello
    instance: int  # of the process
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

    def received(self, end: End, message: bytes) -> None:
        """A message came."""
        ...

    def ended(self, end: End) -> None:
        """The other side closed the connection, or it broke."""
        ...


@dataclass(slots=True)
class Conditions:
    """What every packet goes through.

    Attributes:
        loss: Share of packets lost and sent again: a delay.
        jitter_s: Delay of each message, at most; messages of different links overtake each other.
        drop: Share of messages that are never seen again, on a connection that stays. Not TCP.
        duplicate: Share of messages that come twice. Not TCP.
    """

    loss: float = 0.0
    jitter_s: float = 0.0
    drop: float = 0.0
    duplicate: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """Nothing gets from any of `sources` to any of `targets`."""

    sources: frozenset[int]
    targets: frozenset[int]


@dataclass(slots=True, eq=False)
class End:
    """One side of a connection, with what is on its way to the other side.

    Attributes:
        outgoing: This side dialled.
        instance: Of the process on this side.
        open: False once this side closed it, lost it, or was told of its end.
        queue: What the far side has not taken yet, with when it is due; None ends the connection.
        waiting_since: When the head of the queue was first held up.
    """

    host: Host
    outgoing: bool
    instance: int
    far: End = field(init=False)
    open: bool = True
    closing: bool = False
    queue: deque[tuple[float, bytes | None]] = field(default_factory=deque)
    last_due: float = 0.0
    retransmit_s: float = RETRANSMIT_FIRST_S
    waiting_since: float | None = None
    parked: bool = False


@dataclass(slots=True)
class Traffic:
    """What one host sent, payload and overhead, and the longest that a queue of it ever was."""

    messages: int = 0
    sent_bytes: int = 0
    queue_max: int = 0
    overflows: int = 0


class Failure(Enum):
    """Why there is no connection."""

    REFUSED = "refused"  # the machine itself said that nobody listens
    SILENCE = "silence"


Answer = Callable[[End | Failure], None]


class Network:
    """All connections between hosts.

    Args:
        schedule: The heap.
        seed: Of the run.
    """

    def __init__(self, schedule: Schedule, seed: int) -> None:
        self.conditions = Conditions()
        self.cuts: list[Cut] = []
        self.traffic: dict[int, Traffic] = {}
        self._schedule = schedule
        self._seed = seed
        self._random = branch(seed, "network")
        self._one_way_s: dict[tuple[int, int], float] = {}
        self._parked: dict[int, list[End]] = {}

    def one_way_s(self, a: int, b: int) -> float:
        """Latency between two hosts, the same both ways."""
        pair = (a, b) if a < b else (b, a)
        if pair not in self._one_way_s:
            draw = branch(self._seed, f"latency/{pair[0]}/{pair[1]}")
            self._one_way_s[pair] = draw.uniform(*ONE_WAY_S)
        return self._one_way_s[pair]

    def passes(self, source: Host, target: Host) -> bool:
        """Whether packets get from one host to another just now."""
        if not (source.powered and target.powered):
            return False
        a, b = source.number, target.number
        return not any(a in cut.sources and b in cut.targets for cut in self.cuts)

    # --- connecting -----------------------------------------------------------------------------

    def dial(self, source: Host, target: Host | None, answer: Answer) -> None:
        """Connect: a round trip, a refusal after one, or a time-out. None: nobody's address."""
        if target is None:
            self._schedule.after(DIAL_TIMEOUT_S, answer, Failure.SILENCE)
            return
        dial = _Dial(answer)
        self._schedule.after(DIAL_TIMEOUT_S, dial.settle, Failure.SILENCE)
        self._schedule.after(self._delay_s(source, target), self._knock, source, target, dial)

    def _knock(self, source: Host, target: Host, dial: _Dial) -> None:
        if not self.passes(source, target):
            return
        back_s = self._delay_s(target, source)
        if not target.listening:
            self._schedule.after(back_s, self._refused, source, target, dial)
        elif target.awake:
            near = End(source, outgoing=True, instance=source.instance)
            far = End(target, outgoing=False, instance=target.instance)
            near.far, far.far = far, near
            target.accepted(far)
            self._schedule.after(back_s, self._reached, near, dial)

    def _refused(self, source: Host, target: Host, dial: _Dial) -> None:
        if self.passes(target, source):
            dial.settle(Failure.REFUSED)

    def _reached(self, near: End, dial: _Dial) -> None:
        if not self.passes(near.far.host, near.host) or dial.settled:
            near.open = False  # the far side hears it when it next says something
            return
        dial.settle(near)

    # --- sending --------------------------------------------------------------------------------

    def send(self, end: End, message: bytes) -> None:
        """Queue a message on a connection; when too many wait, the connection is given up."""
        if not end.open or end.closing:
            return
        traffic = self.traffic[end.host.number]
        traffic.messages += 1
        traffic.sent_bytes += len(message) + OVERHEAD_BYTES
        conditions = self.conditions
        if conditions.drop and self._random.random() < conditions.drop:
            return
        self._push(end, message)
        if conditions.duplicate and self._random.random() < conditions.duplicate:
            self._push(end, message)
        traffic.queue_max = max(traffic.queue_max, len(end.queue))
        if len(end.queue) > SEND_QUEUE_MAX:
            traffic.overflows += 1
            self.close(end)
            self._schedule.after(0, end.host.ended, end)

    def close(self, end: End) -> None:
        """Close a connection; the far side hears of it behind what was sent before."""
        if end.open and not end.closing:
            end.closing = True
            end.open = False
            self._push(end, None)

    def vanish(self, end: End) -> None:
        """This side is gone without a word: its machine lost power."""
        end.open = False
        end.queue.clear()

    def wake(self, host: Host) -> None:
        """The process of a host runs again: it is given what its kernel kept."""
        for end in self._parked.pop(host.number, []):
            end.parked = False
            self._schedule.after(0, self._pump, end)

    def _push(self, end: End, message: bytes | None) -> None:
        delay_s = self._delay_s(end.host, end.far.host)
        if self.conditions.jitter_s:
            delay_s += self._random.uniform(0, self.conditions.jitter_s)
        due = max(end.last_due, self._schedule.now + delay_s + HANDLING_S)
        end.last_due = due
        end.queue.append((due, message))
        if len(end.queue) == 1:
            self._schedule.after(due - self._schedule.now, self._pump, end)

    def _delay_s(self, source: Host, target: Host) -> float:
        delay_s, again_s = self.one_way_s(source.number, target.number), RETRANSMIT_FIRST_S
        loss = self.conditions.loss
        while loss and self._random.random() < loss and again_s < RETRANSMIT_MAX_S:
            delay_s += again_s
            again_s *= 2
        return delay_s

    def _pump(self, end: End) -> None:
        """The head of a queue is due."""
        far = end.far
        if end.parked or not end.queue:
            return
        if not self.passes(end.host, far.host):
            self._retransmit(end)
            return
        end.retransmit_s, end.waiting_since = RETRANSMIT_FIRST_S, None
        if far.open and not far.host.awake:
            end.parked = True
            self._parked.setdefault(far.host.number, []).append(end)
            return
        _, message = end.queue.popleft()
        if end.queue:
            wait_s = max(0.0, end.queue[0][0] - self._schedule.now)
            self._schedule.after(wait_s, self._pump, end)
        if not far.open:
            if not far.closing:  # nobody knows this connection there any more
                self._schedule.after(self.one_way_s(end.host.number, far.host.number), _end, end)
        elif message is None:
            _end(far)
        else:
            far.host.received(far, message)

    def _retransmit(self, end: End) -> None:
        now = self._schedule.now
        if end.waiting_since is None:
            end.waiting_since = now
        if now - end.waiting_since > GIVE_UP_S:
            end.closing = False  # nobody was told: the far side finds out when it says something
            end.queue.clear()
            _end(end)
            return
        self._schedule.after(end.retransmit_s, self._pump, end)
        end.retransmit_s = min(2 * end.retransmit_s, RETRANSMIT_MAX_S)


def _end(end: End) -> None:
    """A connection is over without this side's doing."""
    if end.open:
        end.open = False
        end.closing = True
        end.queue.clear()
        end.host.ended(end)


class _Dial:
    """One attempt: the first outcome counts."""

    def __init__(self, answer: Answer) -> None:
        self.settled = False
        self._answer = answer

    def settle(self, outcome: End | Failure) -> None:
        if not self.settled:
            self.settled = True
            self._answer(outcome)
