"""One simulated node: the real gossip core in a shell that stands for process, kernel and disk.

The shell does what `p2pmesh.node.mesh` does on trio, rule for rule. It knows nothing of how the
core works: only its events, its outs and its public attributes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Protocol

from p2pmesh.config import Address
from p2pmesh.gossip.events import (
    Dial,
    Disconnect,
    Event,
    Out,
    PersistEpoch,
    Publish,
    Send,
    SetTimer,
    StateChanged,
    TimerFired,
    TwinFound,
)
from p2pmesh.gossip.membership import Gossip
from p2pmesh.identity import hello
from p2pmesh.identity.keys import NodeId, SigningKey
from p2pmesh.state.registers import Member
from p2pmesh.wire.registers import MEMBER
from simulations.future_protocol import NEWER, REGISTER, newer_body, newer_words
from simulations.hosts import End, Payload
from simulations.links import Links
from simulations.machine import Machine
from simulations.network import Network
from simulations.schedule import Schedule

NOBODY: frozenset[NodeId] = frozenset()


@dataclass(frozen=True, slots=True)
class Disk:
    """The state that survives a restart.

    Attributes:
        epoch: As `PersistEpoch` last had it written.
        book: The address book.
    """

    epoch: int = 0
    book: Mapping[NodeId, tuple[Address, ...]] = field(default_factory=dict)


@dataclass(slots=True)
class Handled:
    """One step of one node, for whoever watches.

    Attributes:
        event: None: the start.
        now: The node's own clock.
        changed: Whose facts it says are others now.
    """

    node: Node
    event: Event | None
    now: float
    outs: list[Out]
    changed: frozenset[NodeId]


class Surroundings(Protocol):
    """The surroundings of a simulated node."""

    schedule: Schedule
    network: Network

    def at(self, address: Address) -> Node | None:
        """Return the node that has that address at the moment."""
        ...

    def make_core(self, node: Node, *, epoch: int, instance: int) -> Gossip:
        """A core for one life of `node`."""
        ...

    def handled(self, step: Handled) -> None:
        """Called after each step."""
        ...

    def gone(self, node: Node) -> None:
        """The process of `node` has ended."""
        ...


class Node(Machine):
    """A host of the network; off until it is started.

    Args:
        number: Which host it is.
        key: Who it is; twins share one.
        address: Where it listens.
        around: The world.
        rng: Draws its instances.
    """

    def __init__(
        self, number: int, key: SigningKey, address: Address, around: Surroundings, rng: Random
    ) -> None:
        super().__init__(number, around.schedule, around.network)
        self.key, self.address = key, address
        self.id = NodeId(key.id)
        self.hostile = False  # it may also say what its core does not: see `attacks`
        self.dialable = True
        self.disk_full = False
        self.gave_up = False  # its process ended because nothing could be written
        self.versions: tuple[int, ...] = hello.VERSIONS
        self.seeds: tuple[Address, ...] = ()
        self.bodies: dict[str, dict[str, Any]] = {}  # what it publishes when it starts
        self.disk = Disk()
        self.backup = Disk()  # its disk as it was when the process last started
        self.core: Gossip | None = None
        self.links = Links(self, around.schedule, around.network, around.at)
        self._around = around
        self._random = rng

    # --- the process ------------------------------------------------------------------------------

    @property
    def listening(self) -> bool:
        """See `Host`."""
        return self.core is not None

    def start(self) -> None:
        """Start the process."""
        assert self.core is None, "it is running"
        self.gave_up = self.disk_full
        if self.gave_up:
            return  # as `p2pmesh.node.keystore.next_epoch` has it
        self.boot(self._random.getrandbits(63))
        # As `p2pmesh.node.keystore.next_epoch` does.
        epoch = max(self.disk.epoch + 1, int(self.clock()))
        self.disk = self.backup = replace(self.disk, epoch=epoch)
        self.core = self._around.make_core(self, epoch=epoch, instance=self.instance)
        self._done(None, self.core.start(self.clock()))
        self._publish_member()
        for register, body in self.bodies.items():
            said = newer_words(body) if NEWER in self.versions else body
            self.tell(Publish(register=register, body=said))
        if NEWER in self.versions:
            self.tell(Publish(register=REGISTER, body=newer_body(self.number)))

    def kill(self) -> None:
        """End the process: its kernel closes what it had open."""
        self.links.forget(told=True)
        self._gone()

    def cut_power(self) -> None:
        """The machine is gone from one moment to the next, and nobody is told."""
        self.links.forget(told=False)
        self.powered = False
        self._gone()

    def _gone(self) -> None:
        self.save_book()
        self.core = None
        self.halt()
        self._around.gone(self)

    def move(self, address: Address) -> None:
        """Another network, another address: old connections fall silent, and nobody is told."""
        self.touch()
        self.address = address
        for end in self.links.ends.values():
            self._around.network.lose(end)
        if self.core is not None:
            self._publish_member()

    def save_book(self) -> None:
        """Write the address book to disk."""
        if self.core is not None and not self.disk_full:
            self.disk = replace(self.disk, book=dict(self.core.book))

    def _publish_member(self) -> None:
        addresses = (self.address,) if self.dialable else ()
        member = Member(name=f"node-{self.number}", addresses=addresses, version="0")
        body = member.to_wire()
        if NEWER in self.versions:
            body = newer_words(body)
        self.tell(Publish(register=MEMBER, body=body))

    # --- the shell --------------------------------------------------------------------------------

    def tell(self, event: Event) -> None:
        """Give the core an event and do what comes out."""
        if self.core is None:
            return
        if self.awake and not self.lag_s:
            self._handle(event)
        else:
            self.once_awake(lambda: self._handle(event))

    def _handle(self, event: Event) -> None:
        if self.core is not None:
            self._done(event, self.core.handle(event, self.clock()))

    def _done(self, event: Event | None, outs: list[Out]) -> None:
        now, changed = self.clock(), NOBODY
        for out in outs:
            if type(out) is Send:
                self.links.send(out.node, out.message)
            elif type(out) is StateChanged:
                changed |= out.owners
            else:
                self._do(out)
        self._around.handled(Handled(self, event, now, outs, changed))

    def _do(self, out: Out) -> None:
        match out:
            case SetTimer(after_s=after_s, token=token):
                self.set_timer(after_s, token)
            case Dial(node=node, addresses=addresses):
                self.links.dial(node, addresses)
            case Disconnect(node=node):
                self.links.close(node)
            case PersistEpoch() if self.disk_full:
                self.gave_up = True
                self._around.schedule.after(0, self._give_way, self.instance)
            case PersistEpoch(epoch=epoch):
                self.disk = replace(self.disk, epoch=epoch)
            case TwinFound():
                self._around.schedule.after(0, self._give_way, self.instance)
            case _:
                pass  # for logs and for the rest of the node

    def ring(self, token: str) -> None:
        """See `Machine`."""
        self.tell(TimerFired(token=token))

    def _give_way(self, instance: int) -> None:
        if instance == self.instance and self.core is not None:
            self.kill()

    # --- what the network tells it ----------------------------------------------------------------

    def accepted(self, end: End) -> None:
        """See `Host`."""
        self.links.accepted(end)

    def received(self, end: End, payload: Payload) -> None:
        """See `Host`."""
        self.links.received(end, payload)

    def ended(self, end: End) -> None:
        """See `Host`."""
        self.links.ended(end)
