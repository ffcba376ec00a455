"""The faults by name: a scenario asks for them, with their numbers.

A fault picks its victims with the run's own random numbers and undoes itself after `for_s`
seconds where that is given. `Stage.heal` undoes all that is left. One honest node always stays
awake, so that there is a mesh to come back to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from random import Random

from p2pmesh.config import Address
from simulations.hosts import Conditions, Cut, End
from simulations.node import Disk, Node
from simulations.schedule import branch
from simulations.world import World, start_if_off


class Stage:
    """The part of a simulation that faults act on.

    Args:
        world: Whose nodes and network they hit.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.rng: Random = branch(world.seed, "faults")
        self.over = False  # no more faults
        self._returning: list[Node] = []

    def pick(self, count: int = 1, share: float = 0.0) -> list[Node]:
        """Some of the honest nodes that are awake, but for one."""
        awake = [node for node in self.world.honest if node.awake]
        wanted = round(share * len(awake)) if share else count
        return self.rng.sample(awake, max(0, min(wanted, len(awake) - 1)))

    def later(self, after_s: float | None, undo: Callable[[], None]) -> None:
        """Undo something, if it is to be undone before the end."""
        if after_s is not None:
            self.world.schedule.after(after_s, undo)

    def bring_back(self, node: Node, disk: str = "kept") -> None:
        """Start a node again with the disk that it had, an old copy of it, or an empty one."""
        if node in self._returning:
            self._returning.remove(node)
            if disk == "old":
                node.disk = node.backup
            elif disk == "lost":
                node.disk = Disk()
            start_if_off(node)

    def make_room(self, node: Node) -> None:
        """Its disk can be written again; what ended for want of that is started again."""
        node.disk_full = False
        if node.gave_up:
            start_if_off(node)

    def take_down(self, node: Node, how: str, *, returns: bool) -> None:
        """End a node the hard way: `kill` its process, or cut its `power`."""
        if how == "power":
            node.cut_power()
        else:
            node.kill()
        if returns:
            self._returning.append(node)

    def heal(self) -> None:
        """The end of all faults; what went down for good stays down."""
        self.over = True
        self.world.network.conditions = Conditions()
        self.world.network.cuts.clear()
        self.world.disturbed()
        for node in list(self._returning):
            self.bring_back(node)
        for node in self.world.nodes:
            if node.core is not None and not node.awake:
                node.resume()
            if node.lag_s:
                node.slow_down(0.0)
            self.make_room(node)
            if node.core is not None and not node.links.ends:
                # Two who both moved while apart know no address; on their own network they do.
                self.world.roam(node, 0)
        for node in self.world.nodes:
            if node.core is not None and self._is_stranded(node):
                # All whom it ever met moved or died before others heard of it: its user asks anew.
                node.kill()
                node.seeds = self.invitation()
                node.start()

    def _is_stranded(self, node: Node) -> bool:
        """Whether neither a node knows where any other is, nor any other where it is."""
        assert node.core is not None
        known = {*node.seeds, *(each for where in node.core.book.values() for each in where)}
        return not any(
            one.address in known or node.id in one.core.book
            for one in self.world.nodes
            if one.core is not None and one is not node
        )

    def invitation(self) -> tuple[Address, ...]:
        """The addresses of two that answer, as `choose_mesh` asks for."""
        answering = [node.address for node in self.world.honest if node.awake]
        return tuple(self.rng.sample(answering, min(2, len(answering))))

    def cut_off(self, some: frozenset[int], *, one_way: bool) -> list[Cut]:
        """Cut these hosts off from all others: nothing of theirs gets out, or nothing in either."""
        others = frozenset(node.number for node in self.world.nodes) - some
        return self.cut(some, others, one_way=one_way)

    def cut(self, some: frozenset[int], others: frozenset[int], *, one_way: bool) -> list[Cut]:
        """Let nothing through from these hosts to those, or nothing back either."""
        cuts = [Cut(some, others)] if one_way else [Cut(some, others), Cut(others, some)]
        self.world.network.cuts += cuts
        self.world.disturbed()
        return cuts

    def mend(self, cuts: list[Cut]) -> None:
        """Undo `cut`."""
        network = self.world.network
        network.cuts = [cut for cut in network.cuts if cut not in cuts]
        self.world.disturbed()


# --- the network ----------------------------------------------------------------------------------


def knob(stage: Stage, *, name: str, value: float, for_s: float | None = None) -> None:
    """Turn one of `Conditions`."""
    conditions = stage.world.network.conditions
    setattr(conditions, name, value)
    stage.later(for_s, partial(setattr, conditions, name, 0.0))


def partition(
    stage: Stage, *, share: float = 0.5, one_way: bool = False, for_s: float | None = None
) -> None:
    """Cut a share of the nodes off from the others, in one direction or in both."""
    everybody = stage.world.nodes
    size = max(1, min(round(share * len(everybody)), len(everybody) - 1))
    some = frozenset(node.number for node in stage.rng.sample(everybody, size))
    stage.later(for_s, partial(stage.mend, stage.cut_off(some, one_way=one_way)))


def flip_flop(stage: Stage, *, share: float = 0.2, period_s: float = 20.0, times: int = 3) -> None:
    """Nothing that some nodes say gets out, for that long; then it does, for as long; and again."""
    everybody = stage.world.nodes
    size = max(1, min(round(share * len(everybody)), len(everybody) - 1))
    some = frozenset(node.number for node in stage.rng.sample(everybody, size))
    _flip(stage, some, period_s, times)


def _flip(stage: Stage, some: frozenset[int], period_s: float, times: int) -> None:
    if times and not stage.over:
        stage.later(period_s, partial(stage.mend, stage.cut_off(some, one_way=True)))
        stage.later(2 * period_s, partial(_flip, stage, some, period_s, times - 1))


def clog(stage: Stage, *, count: int = 1, for_s: float) -> None:
    """Nothing gets from one node to another that it is linked with, nor back; TCP tries again."""
    for node, end in _some_links(stage, count):
        near, far = frozenset([node.number]), frozenset([end.far.host.number])
        stage.later(for_s, partial(stage.mend, stage.cut(near, far, one_way=False)))


def lose(stage: Stage, *, count: int = 1) -> None:
    """A router forgets single connections: they fall silent for good, and others can be made."""
    for _, end in _some_links(stage, count):
        stage.world.network.lose(end)


def reset(stage: Stage, *, count: int = 1) -> None:
    """Something on the way ends single connections."""
    for _, end in _some_links(stage, count):
        stage.world.network.reset(end)


def _some_links(stage: Stage, count: int) -> list[tuple[Node, End]]:
    linked = [node for node in stage.pick(count) if node.links.ends]
    return [(node, stage.rng.choice(list(node.links.ends.values()))) for node in linked]


# --- machines -------------------------------------------------------------------------------------


def crash(
    stage: Stage,
    *,
    count: int = 1,
    share: float = 0.0,
    how: str = "kill",
    for_s: float | None = None,
    disk: str = "kept",
) -> None:
    """Take nodes down; with `for_s` they come back, with that disk."""
    for node in stage.pick(count, share):
        stage.take_down(node, how, returns=for_s is not None)
        stage.later(for_s, partial(stage.bring_back, node, disk))


def restart_all(stage: Stage, *, down_s: float = 1.0, within_s: float = 1.0) -> None:
    """Everybody goes down at once and comes back within that time."""
    for node in stage.world.honest:
        stage.take_down(node, "kill", returns=True)
        after_s = down_s + stage.rng.uniform(0, within_s)
        stage.later(after_s, partial(stage.bring_back, node))


def join(stage: Stage, *, count: int = 1, share: float = 0.0, within_s: float = 1.0) -> None:
    """New nodes come; each is told the addresses of two that answer."""
    for _ in range(round(share * len(stage.world.nodes)) if share else count):
        node = stage.world.add()
        node.seeds = stage.invitation()
        stage.later(stage.rng.uniform(0, within_s), partial(start_if_off, node))


def freeze(stage: Stage, *, count: int = 1, share: float = 0.0, for_s: float) -> None:
    """Stop processes; their kernels go on."""
    for node in stage.pick(count, share):
        node.freeze()
        stage.later(for_s, partial(_resume, node, node.instance))


def suspend(stage: Stage, *, count: int = 1, share: float = 0.0, for_s: float) -> None:
    """Close lids."""
    for node in stage.pick(count, share):
        node.suspend()
        stage.later(for_s, partial(_resume, node, node.instance))


def _resume(node: Node, instance: int) -> None:
    if node.core is not None and node.instance == instance and not node.awake:
        node.resume()


def slow(stage: Stage, *, count: int = 1, lag_s: float, for_s: float | None = None) -> None:
    """Nodes get to everything so much later."""
    for node in stage.pick(count):
        node.slow_down(lag_s)
        stage.later(for_s, partial(node.slow_down, 0.0))


def disk_full(stage: Stage, *, count: int = 1, for_s: float) -> None:
    """Nothing can be written: a node that has to write, to start too, gives up until it can."""
    for node in stage.pick(count):
        node.disk_full = True
        stage.later(for_s, partial(stage.make_room, node))


def clock(stage: Stage, *, count: int = 1, seconds: float, restart: bool = False) -> None:
    """Set clocks so far ahead of the true time, or behind it; 60 s apart is what meshes take.

    A process reads its clock when it starts: the others notice with the next start.
    """
    for node in stage.pick(count):
        node.jump_clock(seconds)
        if restart:
            stage.take_down(node, "kill", returns=True)
            stage.later(1.0, partial(stage.bring_back, node))


def roam(stage: Stage, *, count: int = 1, share: float = 0.0) -> None:
    """Nodes come to another network and have other addresses."""
    for node in stage.pick(count, share):
        stage.world.roam(node, stage.rng.randrange(1, 200))


def twin(stage: Stage, *, same_second: bool = False, for_s: float | None = None) -> None:
    """Somebody starts a copy of a node's disk beside it, or restarts it at the same moment."""
    for node in stage.pick():
        node.save_book()
        copy = stage.world.add(twin_of=node)
        copy.disk, copy.seeds = node.disk, node.seeds
        if same_second:
            stage.take_down(node, "kill", returns=True)
            stage.bring_back(node)
        copy.start()
        stage.later(for_s, partial(_stop, copy))


def _stop(node: Node) -> None:
    if node.core is not None:
        node.kill()


FAULTS: Mapping[str, Callable[..., None]] = {
    fault.__name__: fault
    for fault in (
        knob,
        partition,
        flip_flop,
        clog,
        lose,
        reset,
        crash,
        restart_all,
        join,
        freeze,
        suspend,
        slow,
        disk_full,
        clock,
        roam,
        twin,
    )
}
