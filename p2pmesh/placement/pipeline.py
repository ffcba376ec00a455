"""Pipelines: one model over several nodes, each with some of its layers in a row.

Pure, integers only. The head, which must have the file, keeps the first layers, the embedding and
the output; the other nodes run one stage each, and only nodes whose engines have the same RPC build
go together. A pipeline is a star: every stage talks to the head only, so a token costs

    Σ over all nodes of (bytes that it reads / its memory bandwidth)
    + Σ over the stages behind the head of (2 x one way + bytes of hidden state / link bandwidth)

and which stage comes after which costs nothing. One way is taken from the class of the link
(`distance.py`). Of all pipelines that fit, those whose stages are all near their head come before
those with stages further away; then those with the fewest nodes; then the cheapest; then those with
the most nodes that have the file; then those that fill their nodes most evenly, by their budgets.
What is left decides by the order of `_Pool.rank`, so that equal facts give equal pipelines.

The search is exact for up to `CANDIDATES_MAX` nodes: dynamic programming from the last layer to the
first over (nodes used, next layer). A node is left out before where so many others are better in
every respect that one of them would be free to stand in for it; that changes no result. A model of
more than `CUTS_MAX` layers is cut only behind every second of them, or every third and so on: the
time of a search grows with the square of the places, and any member may describe a model.

How much memory is left on a node decides only whether a stage fits, never which pipeline is better:
when less is left, a pipeline that still fits stays the best of those that do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.parts import STAGES_MAX, StageRange
from p2pmesh.placement.distance import FARTHEST, NEAR, ONE_WAY_NS, Distances
from p2pmesh.placement.shape import Shape

MIB = 2**20
MEMORY_MIB_PER_S = 20_000  # of a node that does not say: a desktop with two channels
LINK_MIB_PER_S = 110  # gigabit Ethernet, less its frames
NS_PER_S = 10**9
# Nodes considered for pipelines of so many stages; more of them cost more than they bring.
CANDIDATES_MAX: Mapping[int, int] = {2: 32, 3: 16, 4: 10}
CANDIDATES_OF_MANY_MAX = 8
# Places at which a model may be cut, for pipelines of so many stages: a search takes 0.1 s, or 1 s
# for the most stages. The deepest models have about 130 layers.
CUTS_MAX: Mapping[int, int] = {2: 256, 3: 128, 4: 96}
CUTS_OF_MANY_MAX = 64


class Stage(NamedTuple):
    """One stage of a pipeline.

    Attributes:
        node: Who runs it.
        first_layer: Counted from 0.
        last_layer: Is one of them.
        need_bytes: Memory that it takes: weights, cache and buffers; for the head also the
            embedding, the output and the server.
    """

    node: NodeId
    first_layer: int
    last_layer: int
    need_bytes: int

    @property
    def range(self) -> StageRange:
        """Return what the id of the unit covers."""
        return StageRange(self.node, self.first_layer, self.last_layer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A node that may run a stage.

    Attributes:
        budget_bytes: All memory that it gives to models.
        room_bytes: What is left of it.
        rpc: The build of its engine's RPC; "" for none.
        memory_mib_per_s: How fast it reads memory; 0 when it does not say.
        holds: Whether it has the file.
        heads: The model by its own card, if it may be the head.
        may_head: Whether it may be the head of any node, or only of those that are confined.
        confined: Whether stages reach nothing on it.
        far: Nodes that are not near it, with the class of the link as it measured it.
    """

    node: NodeId
    budget_bytes: int
    room_bytes: int
    rpc: str
    memory_mib_per_s: int = 0
    holds: bool = False
    heads: Shape | None = None
    may_head: bool = True
    confined: bool = False
    far: tuple[tuple[NodeId, int], ...] = ()

    def may_use(self, other: Candidate) -> bool:
        """Whether another node may run a stage of which this one is the head."""
        allowed = self.may_head or other.confined
        return allowed and other.rpc == self.rpc and other.node != self.node

    @property
    def speed_mib_per_s(self) -> int:
        """How fast it is taken to read memory."""
        return self.memory_mib_per_s or MEMORY_MIB_PER_S

    def read_ns(self, size_bytes: int) -> int:
        """How long it takes to read so much."""
        return size_bytes * NS_PER_S // (self.speed_mib_per_s * MIB)


def token_us(
    shape: Shape, stages: Sequence[tuple[Candidate, int, int]], links: Sequence[int] = ()
) -> int:
    """The cost of a token in µs.

    Args:
        shape: Of the model.
        stages: With their first and last layers, the head first.
        links: Of the stages behind the head, the class of their link to it; near by default.
    """
    reads = (
        one.read_ns(read)
        for one, first, last in stages
        for read in shape.layer_reads[first : last + 1]
    )
    hops = (_hop_ns(shape, link) for link in links or (NEAR,) * (len(stages) - 1))
    return (sum(reads) + sum(hops)) // 1000


def _hop_ns(shape: Shape, link: int) -> int:
    return 2 * ONE_WAY_NS[link] + shape.hop_bytes * NS_PER_S // (LINK_MIB_PER_S * MIB)


def choose(candidates: Iterable[Candidate], *, split: int = 0) -> tuple[Stage, ...] | None:
    """The best pipeline that fits, the head first; None when there is none.

    Args:
        candidates: Each node once, in any order.
        split: How many nodes; 0 for as few as it takes.
    """
    return _choose(tuple(sorted(candidates, key=lambda one: one.node)), split)


@lru_cache(maxsize=64)  # the facts of a plan change more often than what a pipeline hangs on
def _choose(candidates: tuple[Candidate, ...], split: int) -> tuple[Stage, ...] | None:
    distances = Distances((one.node, one.far) for one in candidates)
    searched: set[_Access] = set()
    for link in range(NEAR, FARTHEST + 1):
        accesses = set(_accesses(candidates, distances, link)) - searched
        searched |= accesses
        pools = [_Pool(candidates, access, link) for access in accesses]
        for count in (split,) if split else range(2, STAGES_MAX + 1):
            found = [best for pool in pools if (best := pool.best(count)) is not None]
            if found:
                return min(found)[-1]
    return None


class _Access(NamedTuple):
    """The nodes that some heads may use: the same for each of them.

    Attributes:
        heads: Of one RPC build.
        others: May have heads among them.
    """

    heads: frozenset[NodeId]
    others: frozenset[NodeId]


def _accesses(
    candidates: Sequence[Candidate], distances: Distances, link: int
) -> Iterable[_Access]:
    """Return who may use whom over links of a class, or nearer ones."""
    heads: dict[tuple[str, frozenset[NodeId]], set[NodeId]] = {}
    for head in candidates:
        if head.heads is not None and head.rpc:
            others = frozenset(
                one.node
                for one in candidates
                if one.rpc == head.rpc
                and (head.may_head or one.confined)
                and distances.between(head.node, one.node) <= link
            )
            heads.setdefault((head.rpc, others), set()).add(head.node)
    return (_Access(frozenset(of), others) for (_, others), of in heads.items())


def lacking(
    heads: Sequence[Candidate], candidates: Sequence[Candidate], split: int
) -> tuple[NodeId, int, int]:
    """The node on which a pipeline fails that fits nowhere, what its stage needs, and its room.

    The roomiest nodes are filled one after the other, each leaving a layer to those after it.

    Args:
        heads: Some of the candidates, which may head.
        candidates: All, in any order.
        split: How many nodes, of which there are enough.
    """
    head = min(heads, key=lambda one: (-one.room_bytes, one.node))
    shape = head.heads
    assert shape is not None, "a head knows the model"
    others = [one for one in candidates if head.may_use(one)]
    others.sort(key=lambda one: (-one.room_bytes, one.node))
    layers, first = len(shape.layer_bytes), 0
    for after, one in zip(range(split - 1, -1, -1), [head, *others], strict=False):
        runner = _Runner(one, shape, shape.stage_bytes if first else shape.head_bytes)
        end = min(runner.reach[first], layers - after)
        if end == first or (not after and end < layers):
            need_bytes = runner.need(first, layers if not after else first + 1)
            return one.node, need_bytes, one.room_bytes
        first = end
    return one.node, runner.need(first, layers), one.room_bytes


def lacking_together(
    heads: Sequence[Candidate], candidates: Sequence[Candidate]
) -> tuple[int, int]:
    """What a pipeline that fits nowhere would need over as many nodes as help, and their room.

    Of the heads and the builds the one with the most room is meant. The figures are lower and upper
    bounds: layers are not cut, so what is needed may be there in pieces that are too small.

    Args:
        heads: Some of the candidates, which may head.
        candidates: All, in any order.
    """
    found = []
    for head in heads:
        assert head.heads is not None, "a head knows the model"
        shape = head.heads
        others = (one for one in candidates if head.may_use(one))
        rooms = sorted((max(one.room_bytes - shape.stage_bytes, 0) for one in others), reverse=True)
        count = min(STAGES_MAX, len(shape.layer_bytes)) - 1
        room_bytes = max(head.room_bytes - shape.head_bytes, 0) + sum(rooms[:count])
        found.append((sum(shape.layer_bytes), room_bytes))
    return min(found, key=lambda one: (one[0] - one[1], one))


def odd_one(holders: Sequence[Candidate], candidates: Sequence[Candidate]) -> NodeId | None:
    """The node whose engine should become like the others': one without RPC, else of another build.

    None when every node is alike, and there are too few of them.
    """
    head = max(holders, key=lambda one: one.rpc != "")  # the first of the best
    others = [one for one in candidates if one.rpc != head.rpc]
    return head.node if not head.rpc else others[0].node if others else None


class _Tail(NamedTuple):
    """The last stages of a pipeline; the smaller one is better.

    Attributes:
        cost_ns: Of a token.
        missing: How many of their nodes lack the file.
        strain: The sum of need² / budget, which is least when all are filled alike.
        order: The ranks of their nodes.
        ends: The layer after the last one of each.
    """

    cost_ns: int
    missing: int
    strain: int
    order: tuple[int, ...]
    ends: tuple[int, ...]


# Of an equal tail the first node decides; `stages` is what is wanted.
_Choice = tuple[int, int, int, tuple[NodeId, ...], tuple[int, ...], tuple[Stage, ...]]


class _Pool:
    """Nodes that may be in one pipeline, best first.

    Args:
        candidates: All there are.
        access: Who may use whom.
        link: The class of the links between them, at most.
    """

    def __init__(self, candidates: Iterable[Candidate], access: _Access, link: int) -> None:
        self._link = link
        either = access.heads | access.others
        self.members = sorted((one for one in candidates if one.node in either), key=self.rank)
        nodes = [one.node for one in self.members]
        self._heads = [place for place, node in enumerate(nodes) if node in access.heads]
        self._others = [place for place, node in enumerate(nodes) if node in access.others]

    @staticmethod
    def rank(one: Candidate) -> tuple[int, int, bool, NodeId]:
        """Return the order among nodes that are equally good for a pipeline."""
        return -one.budget_bytes, -one.speed_mib_per_s, not one.holds, one.node

    def best(self, count: int) -> _Choice | None:
        """Return the best pipeline of `count` nodes, with all that it is better by."""
        shapes = {self.members[place].heads for place in self._heads}
        found = [one for shape in shapes if shape and (one := self._best_of(shape, count))]
        return min(found, default=None)

    def _best_of(self, shape: Shape, count: int) -> _Choice | None:
        layers = len(shape.layer_bytes)
        if not 2 <= count <= min(len(self.members), layers):
            return None
        heads = [place for place in self._heads if self.members[place].heads == shape]
        if not self._may_fit(shape, heads, count):
            return None
        step = -(-layers // CUTS_MAX.get(count, CUTS_OF_MANY_MAX))
        cut = shape.in_steps(step)
        tails = self._tails(cut, count)
        best: _Tail | None = None
        for place in self._foremost(heads, count):
            head = _Runner(self.members[place], cut, shape.head_bytes)
            for used, ways in tails.items():
                if used >> place & 1:
                    continue
                for end in range(1, head.reach[0] + 1):
                    if (rest := ways[end]) is not None:
                        one = head.before(place, 0, end, rest, hop_ns=0)
                        best = one if best is None else min(best, one)
        return None if best is None else self._choice(shape, best, step)

    def _may_fit(self, shape: Shape, heads: Iterable[int], count: int) -> bool:
        """Whether the roomiest nodes would do if layers could be cut: without that none would."""
        rooms = sorted(
            (self.members[place].room_bytes - shape.stage_bytes for place in self._others),
            reverse=True,
        )
        head_bytes = max(self.members[place].room_bytes for place in heads) - shape.head_bytes
        return head_bytes + sum(rooms[: count - 1]) >= sum(shape.layer_bytes)

    def _tails(self, shape: Shape, count: int) -> dict[int, list[_Tail | None]]:
        """Return the best last count - 1 stages, by the set of their nodes and the first layer."""
        layers, hop_ns = len(shape.layer_bytes), _hop_ns(shape, self._link)
        limit = CANDIDATES_MAX.get(count, CANDIDATES_OF_MANY_MAX)
        fit = [
            place
            for place in self._others
            if self.members[place].room_bytes >= shape.stage_bytes + min(shape.layer_bytes)
        ]
        runners = {
            place: _Runner(self.members[place], shape, shape.stage_bytes)
            for place in self._foremost(fit, count)[:limit]
        }
        nothing = _Tail(0, 0, 0, (), ())
        tails: dict[int, list[_Tail | None]] = {0: [*([None] * layers), nothing]}
        for before in range(count - 1, 0, -1):  # stages that are still to come before these
            longer: dict[int, list[_Tail | None]] = {}
            for used, ways in tails.items():
                for place, runner in runners.items():
                    if not used >> place & 1:
                        row = longer.setdefault(used | 1 << place, [None] * (layers + 1))
                        runner.extend(place, ways, row, least=before, hop_ns=hop_ns)
            tails = longer
        return tails

    def _foremost(self, places: Sequence[int], count: int) -> list[int]:
        """Leave out nodes for which another could always stand in, `count` being in use."""

        def better(one: Candidate, other: Candidate) -> bool:
            return (
                one.room_bytes >= other.room_bytes
                and one.speed_mib_per_s >= other.speed_mib_per_s
                and one.holds >= other.holds
            )

        # Members are sorted by budget, so that only those before a node can be as good.
        return [
            place
            for number, place in enumerate(places)
            if sum(better(self.members[one], self.members[place]) for one in places[:number])
            < count
        ]

    def _choice(self, shape: Shape, best: _Tail, step: int) -> _Choice:
        stages = []
        first = 0
        for place, cut in zip(best.order, best.ends, strict=True):
            end = min(cut * step, len(shape.layer_bytes))
            node = self.members[place].node
            stages.append(Stage(node, first, end - 1, shape.need(first, end - 1)))
            first = end
        nodes = tuple(stage.node for stage in stages)
        return best.cost_ns, best.missing, best.strain, nodes, best.ends, tuple(stages)


class _Runner:
    """A node as the head or another stage of one model.

    Attributes:
        reach: For each first layer, the layer after the last one that still fits.
    """

    def __init__(self, one: Candidate, shape: Shape, beside_bytes: int) -> None:
        self._one = one
        self._beside_bytes = beside_bytes
        self._needs = [0, *accumulate(shape.layer_bytes)]
        self._costs = [0, *accumulate(one.read_ns(read) for read in shape.layer_reads)]
        self.reach: list[int] = []
        layers = end = len(shape.layer_bytes)
        for first in range(layers - 1, -1, -1):
            while end > first and self.need(first, end) > one.room_bytes:
                end -= 1
            self.reach.insert(0, end)

    def need(self, first: int, end: int) -> int:
        """Return the memory of the layers from `first` to before `end`."""
        return self._beside_bytes + self._needs[end] - self._needs[first]

    def before(self, place: int, first: int, end: int, rest: _Tail, *, hop_ns: int) -> _Tail:
        """Return `rest` with these layers on this node before it."""
        return _Tail(
            rest.cost_ns + self._costs[end] - self._costs[first] + hop_ns,
            rest.missing + (not self._one.holds),
            rest.strain + self.need(first, end) ** 2 // self._one.budget_bytes,
            (place, *rest.order),
            (end, *rest.ends),
        )

    def extend(
        self,
        place: int,
        ways: Sequence[_Tail | None],
        longer: list[_Tail | None],
        *,
        least: int,
        hop_ns: int,
    ) -> None:
        """Put this node before each of `ways` and keep in `longer` what is better there."""
        for first in range(least, len(self.reach)):
            best = longer[first]
            for end in range(first + 1, self.reach[first] + 1):
                rest = ways[end]
                if rest is None:
                    continue
                cost_ns = rest.cost_ns + self._costs[end] - self._costs[first] + hop_ns
                if best is None or cost_ns <= best.cost_ns:
                    one = self.before(place, first, end, rest, hop_ns=hop_ns)
                    best = one if best is None else min(best, one)
            longer[first] = best
