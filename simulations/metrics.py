"""The measurements of a run. Times are simulated seconds unless a name says otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from p2pmesh.gossip.events import Publish
from p2pmesh.identity.keys import NodeId
from simulations.convergence import Gap, counts_on, unsettled
from simulations.node import Handled, Node
from simulations.world import World

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
            return  # it said the same already, or has said so much that this has to wait
        missing = {n.number for n in self._world.honest if n.awake and n.id != node.id}
        now = self._world.schedule.now
        if missing:
            self._open.append(_Update(node.id, event.register, record.version, now, missing))

    def handled(self, step: Handled) -> None:
        """See `Watcher`."""
        for update in [one for one in self._open if one.owner in step.changed]:
            assert step.node.core is not None
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
            if not update.missing or not self._world.running(update.owner):
                self._open.remove(update)


class Removals:
    """How long until every live node does without one that went down."""

    def __init__(self, world: World) -> None:
        self.latencies_s: list[float] = []
        self._world = world
        self._waiting: dict[int, set[int]] = {}  # for whom, and who still counts on it
        self._numbers: dict[NodeId, int] = {}

    @property
    def pending(self) -> int:
        """Nodes that are down and that somebody still counts on."""
        self._follow()
        running = {node.number for node in self._world.honest}
        return sum(1 for waiting in self._waiting.values() if waiting & running)

    def handled(self, step: Handled) -> None:
        """See `Watcher`."""
        self._follow()
        if not self._waiting or step.node.hostile:
            return
        for owner in step.changed:
            number = self._numbers.get(owner)
            if number is not None and number in self._waiting:
                self._look(step.node, owner, number)

    def _follow(self) -> None:
        went_down = self._world.went_down
        if self._waiting.keys() == went_down.keys():
            return
        for number in self._waiting.keys() - went_down.keys():
            del self._waiting[number]
        for waiting in self._waiting.values():
            waiting.difference_update(went_down)  # with its process went what it counted on
        counting = [n for n in self._world.honest if n.awake and n.core is not None]
        for number in sorted(went_down.keys() - self._waiting.keys()):
            owner = self._world.nodes[number].id
            self._numbers[owner] = number
            self._waiting[number] = {
                n.number for n in counting if n.core and counts_on(n.core, owner)
            }

    def _look(self, node: Node, owner: NodeId, number: int) -> None:
        waiting = self._waiting[number]
        if node.number in waiting and node.core and not counts_on(node.core, owner):
            waiting.discard(node.number)
            if not waiting & {other.number for other in self._world.honest if other.awake}:
                waiting.clear()
                at = self._world.went_down[number]
                self.latencies_s.append(self._world.schedule.now - at)


class CatchUp:
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
    """The traffic of idle nodes: mean and largest, in kB per second.

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
