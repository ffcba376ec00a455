"""What is measured during a run. All times are simulated seconds unless a name says otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from p2pmesh.gossip.events import Health, HealthChanged, Publish, StateChanged
from p2pmesh.identity.keys import NodeId
from simulations.checkers import Gap, unsettled
from simulations.node import Handled, Node
from simulations.world import World

STEADY_S = 15.0  # after anything was done to a node or the network, nobody's judgement is false
POLL_S = 0.05


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that so many percent do not pass; 0 for none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else 0.0


@dataclass(slots=True, eq=False)
class _Update:
    owner: NodeId
    register: str
    version: tuple[int, int, bytes]
    at: float
    missing: set[int] = field(default_factory=set)


class Spread:
    """How long updates take to the last live node."""

    def __init__(self, world: World) -> None:
        self.latencies_s: list[float] = []
        self._world = world
        self._open: list[_Update] = []

    @property
    def lost(self) -> int:
        """Updates that some live node still lacks."""
        self._forget_the_dead()
        return len(self._open)

    def publish(self, node: Node, event: Publish) -> None:
        """Have a node say something and follow it."""
        assert node.core is not None
        before = node.core.document.get(node.id, event.register)
        node.tell(event)
        record = node.core.document.get(node.id, event.register)
        if record is before or record is None:
            return  # it said the same already
        missing = {n.number for n in self._world.honest if n.awake and n.id != node.id}
        now = self._world.schedule.now
        if missing:
            self._open.append(_Update(node.id, event.register, record.version, now, missing))

    def handled(self, step: Handled) -> None:
        """See `Watcher`."""
        if not self._open or not any(isinstance(out, StateChanged) for out in step.outs):
            return
        assert step.node.core is not None
        for update in list(self._open):
            held = step.node.core.document.get(update.owner, update.register)
            if held is not None and held.version >= update.version:
                update.missing.discard(step.node.number)
                if not update.missing:
                    self._open.remove(update)
                    self.latencies_s.append(self._world.schedule.now - update.at)

    def _forget_the_dead(self) -> None:
        """A node that went down later was not live: it is not waited for."""
        running = {node.number for node in self._world.honest}
        for update in list(self._open):
            update.missing &= running
            owner_runs = any(node.id == update.owner for node in self._world.honest)
            if not update.missing or not owner_runs:
                self._open.remove(update)


class Removals:
    """How long until every live node does without one that went down, and who was wronged."""

    def __init__(self, world: World) -> None:
        self.latencies_s: list[float] = []
        self.wronged: list[str] = []
        self._world = world
        self._waiting: dict[int, set[int]] = {}  # for whom, and who still counts on it

    @property
    def pending(self) -> int:
        """Nodes that are down and that somebody still counts on."""
        running = {node.number for node in self._world.honest}
        return sum(1 for waiting in self._waiting.values() if waiting & running)

    def handled(self, step: Handled) -> None:
        """See `Watcher`."""
        node, went_down = step.node, self._world.went_down
        for number in self._waiting.keys() - went_down.keys():
            del self._waiting[number]
        for number in went_down.keys() - self._waiting.keys():
            self._waiting[number] = {other.number for other in self._world.honest if other.awake}
        if node.hostile:
            return
        for out in step.outs:
            if isinstance(out, HealthChanged) and out.health is Health.DEAD:
                self._judge(node, out.node)
        if any(isinstance(out, HealthChanged | StateChanged) for out in step.outs):
            for number in sorted(self._waiting):
                self._look(node, number)

    def _look(self, node: Node, number: int) -> None:
        waiting = self._waiting[number]
        if node.number in waiting and node.sees_dead(self._world.nodes[number].id):
            waiting.discard(node.number)
            if not waiting & {other.number for other in self._world.honest if other.awake}:
                waiting.clear()
                at = self._world.went_down[number]
                self.latencies_s.append(self._world.schedule.now - at)

    def _judge(self, node: Node, subject: NodeId) -> None:
        """Was it right to take `subject` for dead?"""
        now = self._world.schedule.now
        passes = self._world.network.passes
        hosts = [
            n
            for n in self._world.honest
            if n.id == subject and n.awake and passes(n, node) and passes(node, n)
        ]
        since = [self._world.disturbed_at, node.steady_since, *(n.steady_since for n in hosts)]
        if hosts and now - max(since) > STEADY_S:
            self.wronged.append(f"at {now:.3f} s node {node.number} of node {hosts[0].number}")


class Settling:
    """How long until nothing differs any more from how things are.

    Args:
        world: Looked at every 50 ms.
        done: Called once with the time that it took.
        tolerated: What may go on differing.
    """

    def __init__(
        self, world: World, done: Callable[[float], None], tolerated: frozenset[Gap] = frozenset()
    ) -> None:
        self._world = world
        self._tolerated = tolerated
        self._done = done
        self._began = world.schedule.now
        self._poll()

    def _poll(self) -> None:
        gaps = (gap for gap, _ in unsettled(self._world) if gap not in self._tolerated)
        if next(gaps, None) is None:
            self._done(self._world.schedule.now - self._began)
        else:
            self._world.schedule.after(POLL_S, self._poll)


class Idle:
    """What nodes send while nothing happens: mean and largest, in kB per second.

    Args:
        world: Counted from now on.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._began = world.schedule.now
        self._before = {number: one.sent_bytes for number, one in world.network.traffic.items()}

    def kb_per_s(self) -> tuple[float, float]:
        """Mean over the honest nodes, and the largest."""
        seconds = self._world.schedule.now - self._began
        rates = [
            (self._world.network.traffic[n.number].sent_bytes - self._before.get(n.number, 0))
            / seconds
            / 1000
            for n in self._world.honest
        ]
        return sum(rates) / len(rates), max(rates)
