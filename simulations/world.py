"""A whole mesh in one process: nodes, their network, and who is told of each step.

Everything follows from the seed. What the nodes share saves time and nothing else: see `memory`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from hashlib import blake2b
from typing import Protocol

from p2pmesh.config import Address
from p2pmesh.gossip.membership import Gossip
from p2pmesh.identity.keys import MeshId, NodeId, SigningKey
from simulations.bodies import bodies_of
from simulations.cache import Memory
from simulations.hosts import Traffic
from simulations.network import Network
from simulations.node import Handled, Node
from simulations.schedule import Schedule, branch

MESH = MeshId(b"simulated mesh  ")
PORT = 9338
SEEDS = 2  # nodes whose addresses everybody is told


class Watcher(Protocol):
    """Somebody who looks at steps and changes nothing."""

    def handled(self, step: Handled) -> None:
        """A node has handled an event."""
        ...


class World:
    """The simulation.

    Args:
        seed: Decides everything.
        size: Nodes to make; none is started yet.
        terse: They have nothing to say of models: less memory for very large meshes.
    """

    def __init__(self, seed: int, size: int, *, terse: bool = False) -> None:
        self.seed = seed
        self.schedule = Schedule()
        self.network = Network(self.schedule, seed)
        self.memory = Memory()
        self.nodes: list[Node] = []
        self.by_id: dict[NodeId, list[Node]] = {}  # twins share one
        self.watchers: list[Watcher] = []  # of every step
        self.readers: list[Watcher] = []  # of those that start a node or change facts
        self.went_down: dict[int, float] = {}  # which nodes, and when
        self.signed: set[bytes] = set()  # what hostile owners signed beside their cores
        self.forked: dict[NodeId, float] = {}  # who signed two values of one version, and when
        self.disturbed_at = 0.0  # when the network was last changed for all
        self._terse = terse
        self._by_address: dict[Address, Node] = {}
        for _ in range(size):
            self.add()

    # --- nodes ------------------------------------------------------------------------------------

    def add(self, *, twin_of: Node | None = None) -> Node:
        """Make a node; it is off."""
        number = len(self.nodes)
        key = twin_of.key if twin_of else key_of(self.seed, number)
        rng = branch(self.seed, f"node/{number}")
        node = Node(number, key, self._address(number, 0), self, rng)
        node.seeds = tuple(other.address for other in self.nodes[:SEEDS])
        node.bodies = dict(bodies_of(number, terse=self._terse))
        self.nodes.append(node)
        self.by_id.setdefault(node.id, []).append(node)
        self._by_address[node.address] = node
        self.network.traffic[number] = Traffic()
        return node

    @property
    def honest(self) -> list[Node]:
        """The nodes that run, awake or not, and have nothing up their sleeves."""
        return [node for node in self.nodes if node.core is not None and not node.hostile]

    @property
    def down(self) -> list[Node]:
        """The nodes whose key no process uses now."""
        used = {node.id for node in self.nodes if node.core is not None}
        return [node for node in self.nodes if node.id not in used]

    def running(self, node: NodeId) -> list[Node]:
        """The nodes that run with that id; several are twins."""
        return [one for one in self.by_id.get(node, ()) if one.core is not None]

    def reach(self, one: Node, other: Node, since_s: float) -> bool:
        """Whether two nodes run and could talk all the time since then."""
        passes = self.network.passes
        touched_at = max(one.steady_since, other.steady_since, self.disturbed_at)
        up = one.awake and other.awake and passes(one, other) and passes(other, one)
        return up and touched_at <= since_s

    def at(self, address: Address) -> Node | None:
        """See `Surroundings`; nobody gets through to who cannot be dialled."""
        node = self._by_address.get(address)
        return node if node is not None and node.dialable else None

    def roam(self, node: Node, visit: int) -> None:
        """Bring a node to another network, where it has another address."""
        del self._by_address[node.address]
        address = self._address(node.number, visit)
        self._by_address[address] = node
        node.move(address)

    def make_core(self, node: Node, *, epoch: int, instance: int) -> Gossip:
        """See `Surroundings`."""
        return Gossip(
            key=node.key,
            mesh=MESH,
            instance=instance,
            epoch=epoch,
            seeds=tuple(seed for seed in node.seeds if seed != node.address),
            book=node.disk.book,
            shared=self.memory.shared,
        )

    def gone(self, node: Node) -> None:
        """See `Surroundings`."""
        if not node.hostile and not self.running(node.id):
            self.went_down[node.number] = self.schedule.now

    def handled(self, step: Handled) -> None:
        """See `Surroundings`."""
        for watcher in self.watchers:
            watcher.handled(step)
        if step.event is None:
            self.went_down.pop(step.node.number, None)
        if step.changed or step.event is None:
            for reader in self.readers:
                reader.handled(step)

    def disturbed(self) -> None:
        """The network is about to change, or just did."""
        self.disturbed_at = self.schedule.now

    @property
    def archive(self) -> list[bytes]:
        """Every record that was ever received, oldest first."""
        return list(self.memory.archive)

    # --- time -------------------------------------------------------------------------------------

    def run(self, seconds: float) -> None:
        """Let time pass."""
        self.schedule.run(self.schedule.now + seconds)

    def start_all(self, within_s: float = 0.0) -> None:
        """Start every node that is off, evenly over that time."""
        start_evenly(self, [node for node in self.nodes if node.core is None], within_s)

    def _address(self, number: int, visit: int) -> Address:
        return Address(f"10.{visit}.{number // 250}.{number % 250 + 1}", PORT)


def start_evenly(world: World, nodes: Iterable[Node], within_s: float) -> None:
    """Start nodes one after the other, over that time."""
    off = list(nodes)
    for position, node in enumerate(off):
        world.schedule.after(within_s * position / len(off), partial(start_if_off, node))


def start_if_off(node: Node) -> None:
    """Start a node, unless something else did meanwhile."""
    if node.core is None:
        node.start()


def key_of(seed: int, number: int) -> SigningKey:
    """The key of a node: another one in each run."""
    return SigningKey(blake2b(f"{seed}/key/{number}".encode(), digest_size=32).digest())
