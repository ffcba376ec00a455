"""A simulated network, with connections that behave like TCP.

A connection delivers in order. A packet that is lost comes later: the first retransmission after
200 ms, the next after twice that, and what was sent behind it waits. Nothing else happens to what
is sent but by the knobs in `Conditions`, of which true drops and duplicates are things that TCP
never does; and single connections may break (`reset`) or fall silent for good (`lose`). Two hosts
are always as far from each other: it follows from the seed and the pair.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b

from p2pmesh.transport.base import DIAL_TIMEOUT_S
from p2pmesh.transport.outbox import BYTES_MAX, MESSAGES_MAX
from simulations.hosts import (
    RETRANSMIT_FIRST_S,
    Conditions,
    Cut,
    End,
    Failure,
    Host,
    Payload,
    Traffic,
)
from simulations.schedule import Schedule, branch
from simulations.sizes import Scale

ONE_WAY_S = (0.010, 0.050)
HANDLING_S = 0.001  # what a receiver takes to get to a message
RETRANSMIT_MAX_S = 60.0
GIVE_UP_S = 924.0  # of silence, until a kernel calls a connection broken (Linux's default)
OVERHEAD_BYTES = 100  # of each message, in frames, TLS and packets

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
        self._scale = Scale(branch(seed, "codec"))
        self._parked: dict[int, list[End]] = {}
        self._uplink_free_at: dict[int, float] = {}

    def one_way_s(self, a: int, b: int) -> float:
        """Latency between two hosts, the same both ways."""
        near, far = (a, b) if a < b else (b, a)
        place = f"{self._seed}/latency/{near}/{far}".encode()
        share = int.from_bytes(blake2b(place, digest_size=4).digest(), "big") / 2**32
        return ONE_WAY_S[0] + share * (ONE_WAY_S[1] - ONE_WAY_S[0])

    def passes(self, source: Host, target: Host) -> bool:
        """Whether packets get from one host to another just now."""
        if not (source.powered and target.powered):
            return False
        if not self.cuts:
            return True
        a, b = source.number, target.number
        return not any(a in cut.sources and b in cut.targets for cut in self.cuts)

    # --- connecting -----------------------------------------------------------------------------

    def dial(self, source: Host, target: Host | None, answer: Answer) -> None:
        """Connect: a round trip, a refusal after one, or a time-out. None: nobody's address."""
        if target is None:
            self._schedule.after(DIAL_TIMEOUT_S, answer, Failure.SILENCE)
            return
        dial = _Dial(answer, self.one_way_s(source.number, target.number))
        self._schedule.after(DIAL_TIMEOUT_S, dial.settle, Failure.SILENCE)
        self._schedule.after(self._delay_s(dial.one_way_s), self._knock, source, target, dial)

    def _knock(self, source: Host, target: Host, dial: _Dial) -> None:
        if not self.passes(source, target):
            return
        back_s = self._delay_s(dial.one_way_s)
        if not target.listening:
            self._schedule.after(back_s, self._refused, source, target, dial)
        elif target.awake:
            near = End(source, dial.one_way_s, outgoing=True)
            far = End(target, dial.one_way_s, outgoing=False)
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

    def send(self, end: End, payload: Payload) -> None:
        """Queue a message on a connection; when too many wait, the connection is given up."""
        if not end.open or end.closing:
            return
        traffic = self.traffic[end.host.number]
        size_bytes = self._scale.size(payload)
        traffic.messages += 1
        traffic.sent_bytes += size_bytes + OVERHEAD_BYTES
        conditions = self.conditions
        if conditions.drop and self._random.random() < conditions.drop:
            return
        self._push(end, payload, size_bytes)
        if conditions.duplicate and self._random.random() < conditions.duplicate:
            self._push(end, payload, size_bytes)
        waiting = len(end.queue)
        traffic.queue_max = max(traffic.queue_max, waiting)
        traffic.queue_bytes_max = max(traffic.queue_bytes_max, end.queued_bytes)
        if waiting > MESSAGES_MAX or end.queued_bytes > BYTES_MAX:
            traffic.overflows += 1
            self.close(end)
            self._schedule.after(0, end.host.ended, end)

    def close(self, end: End) -> None:
        """Close a connection; the far side hears of it behind what was sent before."""
        if end.open and not end.closing:
            end.closing = True
            end.open = False
            self._push(end, None, 0)

    def vanish(self, end: End) -> None:
        """This side is gone without a word: its machine lost power."""
        end.open = False
        end.drop_all()

    def lose(self, end: End) -> None:
        """Nothing gets through this connection any more, and nobody is told."""
        end.lost = end.far.lost = True

    def reset(self, end: End) -> None:
        """Something on the way ends this connection, for both sides at once."""
        for side in (end, end.far):
            side.drop_all()
            self._schedule.after(0, _end, side)

    def wake(self, number: int) -> None:
        """The process of host `number` runs again: it is given what its kernel kept."""
        for end in self._parked.pop(number, []):
            end.parked = False
            self._schedule.after(0, self._pump, end)

    def _push(self, end: End, payload: Payload | None, size_bytes: int) -> None:
        delay_s = self._delay_s(end.one_way_s)
        if self.conditions.jitter_s:
            delay_s += self._random.uniform(0, self.conditions.jitter_s)
        if self.conditions.bytes_per_s:
            delay_s += self._uplink_s(end.host.number, size_bytes + OVERHEAD_BYTES)
        due = self._schedule.now + delay_s + HANDLING_S
        due = max(due, end.last_due)
        end.last_due = due
        end.queue.append((due, size_bytes, payload))
        end.queued_bytes += size_bytes
        if len(end.queue) == 1:
            self._schedule.after(due - self._schedule.now, self._pump, end)

    def _uplink_s(self, number: int, size_bytes: int) -> float:
        """Until so much has left a host, behind all that it sent before."""
        now = self._schedule.now
        begun = max(now, self._uplink_free_at.get(number, now))
        self._uplink_free_at[number] = begun + size_bytes / self.conditions.bytes_per_s
        return self._uplink_free_at[number] - now

    def _delay_s(self, one_way_s: float) -> float:
        delay_s, again_s, loss = one_way_s, RETRANSMIT_FIRST_S, self.conditions.loss
        while loss and self._random.random() < loss and again_s < RETRANSMIT_MAX_S:
            delay_s += again_s
            again_s *= 2
        return delay_s

    def _pump(self, end: End) -> None:
        """The head of a queue is due."""
        far = end.far
        if end.parked or not end.queue:
            return
        if end.lost or not self.passes(end.host, far.host):
            self._retransmit(end)
            return
        end.retransmit_s, end.waiting_since = RETRANSMIT_FIRST_S, None
        if far.open and not far.host.awake:
            end.parked = True
            self._parked.setdefault(far.host.number, []).append(end)
            return
        _, size_bytes, payload = end.queue.popleft()
        end.queued_bytes -= size_bytes
        if end.queue:
            wait_s = max(0.0, end.queue[0][0] - self._schedule.now)
            self._schedule.after(wait_s, self._pump, end)
        if not far.open:
            if not far.closing:  # nobody knows this connection there any more
                self._schedule.after(end.one_way_s, _end, end)
        elif payload is None:
            _end(far)
        else:
            far.host.received(far, payload)

    def _retransmit(self, end: End) -> None:
        now = self._schedule.now
        if end.waiting_since is None:
            end.waiting_since = now
        if now - end.waiting_since > GIVE_UP_S:
            end.closing = False  # nobody was told: the far side finds out when it says something
            end.drop_all()
            _end(end)
            return
        self._schedule.after(end.retransmit_s, self._pump, end)
        end.retransmit_s = min(2 * end.retransmit_s, RETRANSMIT_MAX_S)


def _end(end: End) -> None:
    """A connection is over without this side's doing."""
    if end.open:
        end.open = False
        end.closing = True
        end.drop_all()
        end.host.ended(end)


class _Dial:
    """One attempt: the first outcome counts."""

    __slots__ = ("_answer", "one_way_s", "settled")

    def __init__(self, answer: Answer, one_way_s: float) -> None:
        self.settled = False
        self.one_way_s = one_way_s
        self._answer = answer

    def settle(self, outcome: End | Failure) -> None:
        if not self.settled:
            self.settled = True
            self._answer(outcome)
