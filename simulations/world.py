"""A whole mesh in one process: nodes, their network, and what they were told to say.

Everything follows from the seed. Two things are shared between the nodes, which no node can tell
but by the time that it saves: records are parsed once and their signatures are checked once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from hashlib import blake2b
from typing import Protocol

from p2pmesh.config import Address
from p2pmesh.gossip.events import Publish
from p2pmesh.gossip.membership import Gossip
from p2pmesh.identity.keys import MeshId, SigningKey
from p2pmesh.models.cards import Card, ModelDigest
from p2pmesh.state.bodies import (
    CAPS,
    SERVES,
    WANTS,
    Caps,
    Held,
    Served,
    Wanted,
    held_pages,
    held_register,
    serves_to_wire,
    wants_to_wire,
)
from p2pmesh.wire.records import Record, RecordCheck, parse, verify_record
from simulations.network import Network, Schedule, Traffic, branch
from simulations.node import Handled, Node

MESH = MeshId(b"simulated mesh  ")
PORT = 9338
GIB = 1 << 30
MODELS = 4  # different ones in the whole mesh
SEEDS = 2  # nodes whose addresses everybody is told


class Watcher(Protocol):
    """Somebody who looks at each step and changes nothing."""

    def handled(self, step: Handled) -> None:
        """A node has handled an event."""
        ...


class World:
    """The simulation.

    Args:
        seed: Decides everything.
        size: Nodes to make; none is started yet.
    """

    def __init__(self, seed: int, size: int) -> None:
        self.seed = seed
        self.schedule = Schedule()
        self.network = Network(self.schedule, seed)
        self.nodes: list[Node] = []
        self.watchers: list[Watcher] = []
        self.went_down: dict[int, float] = {}  # which nodes, and when
        self.signed: set[bytes] = set()  # what hostile owners signed beside their cores
        self.disturbed_at = 0.0  # when the network was last changed for all
        self._by_address: dict[Address, Node] = {}
        self._parsed: dict[bytes, Record] = {}
        self._verified: dict[bytes, bool] = {}
        self._check = RecordCheck(parse=self._parse, verify=self._verify)
        for _ in range(size):
            self.add()

    # --- nodes ------------------------------------------------------------------------------------

    def add(self, *, hostile: bool = False, twin_of: Node | None = None) -> Node:
        """Make a node; it is off."""
        number = len(self.nodes)
        key = twin_of.key if twin_of else key_of(self.seed, number)
        rng = branch(self.seed, f"node/{number}")
        node = Node(number, key, self._address(number, 0), self, rng, hostile=hostile)
        node.seeds = tuple(other.address for other in self.nodes[:SEEDS])
        node.bodies = dict(bodies_of(number))
        self.nodes.append(node)
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

    def at(self, address: Address) -> Node | None:
        """See `Surroundings`."""
        return self._by_address.get(address)

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
            check=self._check,
        )

    def gone(self, node: Node) -> None:
        """See `Surroundings`."""
        if not node.hostile and node.id not in {other.id for other in self.honest}:
            self.went_down[node.number] = self.schedule.now

    def handled(self, step: Handled) -> None:
        """See `Surroundings`."""
        if step.event is None:
            self.went_down.pop(step.node.number, None)
        for watcher in self.watchers:
            watcher.handled(step)

    def disturbed(self) -> None:
        """The network is about to change, or just did."""
        self.disturbed_at = self.schedule.now

    @property
    def archive(self) -> list[bytes]:
        """Every record that was ever received, oldest first."""
        return list(self._parsed)

    # --- time -------------------------------------------------------------------------------------

    def run(self, seconds: float) -> None:
        """Let time pass."""
        self.schedule.run(self.schedule.now + seconds)

    def start_all(self, within_s: float = 0.0) -> None:
        """Start every node that is off, evenly over that time."""
        off = [node for node in self.nodes if node.core is None]
        for position, node in enumerate(off):
            after_s = within_s * position / len(off)
            self.schedule.after(after_s, partial(start_if_off, node))

    # --- memory of what was checked ---------------------------------------------------------------

    def _parse(self, raw: bytes) -> Record:
        record = self._parsed.get(raw)
        if record is None:
            record = self._parsed[raw] = parse(raw)
        return record

    def _verify(self, record: Record) -> bool:
        good = self._verified.get(record.raw)
        if good is None:
            good = self._verified[record.raw] = verify_record(record)
        return good

    def _address(self, number: int, visit: int) -> Address:
        return Address(f"10.{visit}.{number // 250}.{number % 250 + 1}", PORT)


def start_if_off(node: Node) -> None:
    """Start a node, unless something else did meanwhile."""
    if node.core is None:
        node.start()


def key_of(seed: int, number: int) -> SigningKey:
    """The key of a node: another one in each run."""
    return SigningKey(blake2b(f"{seed}/key/{number}".encode(), digest_size=32).digest())


# --- what nodes say -------------------------------------------------------------------------------


def model(number: int) -> ModelDigest:
    """One of the models of the mesh."""
    return ModelDigest(f"{number:064x}")


def caps(budget_gib: int) -> Publish:
    """That a node has so much memory to give."""
    body = Caps(budget_bytes=budget_gib * GIB, engine="simulated", rpc="").to_wire()
    return Publish(register=CAPS, body=body)


def bodies_of(number: int) -> Iterator[tuple[str, dict[str, object]]]:
    """What a node says when it starts: enough for plans in which nodes and wishes compete."""
    yield CAPS, caps(4 + number % 5).body or {}
    held = [
        Held(digest=model(one), stem=f"model-{one}", card=_card(one))
        for one in range(MODELS)
        if (number + one) % 3 == 0
    ]
    for page, body in enumerate(held_pages(held)):
        yield held_register(page), body
    wanted = Wanted(
        digest=model(number % MODELS),
        stem=f"model-{number % MODELS}",
        replicas=1 + number % 3,
        priority=number % 2,
        context=0,
        slots=4,
    )
    yield WANTS, wants_to_wire([wanted])
    if held and number % 2:
        yield SERVES, serves_to_wire([Served(digest=held[0].digest, state="ready")])


def _card(number: int) -> Card:
    size = (1 + number) * GIB
    return Card(
        architecture="llama",
        name=f"Model {number}",
        layers=2,
        layer_bytes=(size // 2, size // 2),
        other_bytes=0,
        size_bytes=size,
        kv_bytes_per_token=1024,
        experts=0,
        experts_used=0,
        context=4096,
        width=64,
        vocabulary=300,
        modality="chat",
        chat_template=True,
        parameters=size,
        quantisation="Q8_0",
    )
