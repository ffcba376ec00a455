"""One simulated node: the real gossip core in a shell that stands for process, kernel and disk.

The shell does what `p2pmesh.node.mesh` does on trio, rule for rule. It knows nothing of how the
core works: only its events, its outs and its public attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Protocol

from p2pmesh.config import Address
from p2pmesh.errors import PeerError
from p2pmesh.gossip.events import (
    Dial,
    Disconnect,
    Event,
    Health,
    Out,
    PersistEpoch,
    Publish,
    Send,
    SetTimer,
    TimerFired,
    TwinFound,
)
from p2pmesh.gossip.membership import Gossip
from p2pmesh.identity.keys import NodeId, SigningKey
from p2pmesh.state.bodies import MEMBER, Member
from simulations.links import Links
from simulations.network import End, Network, Schedule

START_S = 1_800_000_000  # unix time at the start of every run


@dataclass(frozen=True, slots=True)
class Disk:
    """What survives a restart.

    Attributes:
        epoch: As `PersistEpoch` last had it written.
        book: The address book.
    """

    epoch: int = 0
    book: Mapping[NodeId, tuple[Address, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Handled:
    """One step of one node, for whoever watches."""

    node: Node
    event: Event | None  # None: the start
    now: float  # the node's own clock
    outs: list[Out]


class Surroundings(Protocol):
    """What a node finds around it."""

    schedule: Schedule
    network: Network

    def at(self, address: Address) -> Node | None:
        """Whose address that is at the moment."""
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


class Node:
    """A host of the network; off until it is started.

    Args:
        number: Which host it is.
        key: Who it is; twins share one.
        address: Where it listens.
        around: The world.
        rng: Draws its instances.
        hostile: It may also say what its core does not: see `faults`.
    """

    def __init__(
        self,
        number: int,
        key: SigningKey,
        address: Address,
        around: Surroundings,
        rng: Random,
        *,
        hostile: bool = False,
    ) -> None:
        self.number, self.key, self.address, self.hostile = number, key, address, hostile
        self.id = NodeId(key.id)
        self.seeds: tuple[Address, ...] = ()
        self.bodies: dict[str, dict[str, Any]] = {}  # what it publishes when it starts
        self.disk = Disk()
        self.backup = Disk()  # its disk as it was when the process last started
        self.core: Gossip | None = None
        self.instance = 0
        self.frozen = False
        self.powered = True
        self.links = Links(self, around.network, around.at)
        self.offset_s = 0.0
        self.steady_since = 0.0  # when something was last done to it
        self.timers = 0  # under way
        self._around = around
        self._random = rng
        self._clock_s = 0.0
        self._slept_s = 0.0
        self._suspended_at = 0.0
        self._held: list[Callable[[], None]] = []

    # --- the machine ------------------------------------------------------------------------------

    @property
    def listening(self) -> bool:
        """See `Host`."""
        return self.core is not None

    @property
    def awake(self) -> bool:
        """See `Host`."""
        return self.core is not None and self.powered and not self.frozen

    def clock(self) -> float:
        """This machine's unix time, never going back within one life of the process."""
        self._clock_s = max(self._clock_s, START_S + self._around.schedule.now + self.offset_s)
        return self._clock_s

    def start(self) -> None:
        """Start the process."""
        assert self.core is None, "it is running"
        self.powered, self.frozen, self._clock_s = True, False, 0.0
        self._touch()
        # As `p2pmesh.node.keystore.next_epoch` does.
        epoch = max(self.disk.epoch + 1, int(self.clock()))
        self.disk = self.backup = replace(self.disk, epoch=epoch)
        self.instance = self._random.getrandbits(63)
        self.core = self._around.make_core(self, epoch=epoch, instance=self.instance)
        self._done(None, self.core.start(self.clock()))
        member = Member(name=f"node-{self.number}", addresses=(self.address,), version="0")
        self.tell(Publish(register=MEMBER, body=member.to_wire()))
        for register, body in self.bodies.items():
            self.tell(Publish(register=register, body=body))

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
        self._touch()
        self.save_book()
        self.core, self.frozen, self.timers = None, False, 0
        self._held.clear()
        self._around.network.wake(self)
        self._around.gone(self)

    def freeze(self) -> None:
        """Stop the process; its kernel goes on taking what comes."""
        self._touch()
        self.frozen = True

    def suspend(self) -> None:
        """Close the lid: nothing runs, and no monotonic clock either."""
        self._touch()
        self.powered, self._suspended_at = False, self._around.schedule.now

    def resume(self) -> None:
        """Undo `freeze` or `suspend`."""
        self._touch()
        if not self.powered:
            self._slept_s += self._around.schedule.now - self._suspended_at
        self.powered, self.frozen = True, False
        held, self._held = self._held, []
        for action in held:
            self._around.schedule.after(0, action)
        self._around.network.wake(self)

    def jump_clock(self, seconds: float) -> None:
        """Set the machine's clock forwards or back."""
        self._touch()
        self.offset_s += seconds

    def move(self, address: Address) -> None:
        """Another network, another address: old connections are cut without a word."""
        self._touch()
        self.address = address
        for end in list(self.links.ends.values()):
            self._around.network.vanish(end)
            self._around.schedule.after(0, self.ended, end)
        if self.core is not None:
            member = Member(name=f"node-{self.number}", addresses=(address,), version="0")
            self.tell(Publish(register=MEMBER, body=member.to_wire()))

    def _touch(self) -> None:
        self.steady_since = self._around.schedule.now

    def save_book(self) -> None:
        """Write the address book to disk."""
        book = dict(self.disk.book)
        for owner in self.core.document.owners if self.core else ():
            record = self.core.document.get(owner, MEMBER) if self.core else None
            try:
                if record is not None and owner != self.id:
                    book[owner] = Member.from_wire(record.body).addresses
            except PeerError:
                continue  # signed nonsense has no address
        self.disk = replace(self.disk, book=book)

    # --- what others see of its core --------------------------------------------------------------

    def sees_dead(self, node: NodeId) -> bool:
        """Whether this node does without `node`: it is dead to it or not even known."""
        assert self.core is not None
        known = self.core.document.get(node, MEMBER) is not None
        return not known or self.core.prober.health(node) is Health.DEAD

    # --- the shell --------------------------------------------------------------------------------

    def tell(self, event: Event) -> None:
        """Give the core an event and do what comes out."""
        if self.core is not None:
            self.once_awake(lambda: self._handle(event))

    def once_awake(self, action: Callable[[], None]) -> None:
        """Call `action` now or when the process goes on; never if it ends before."""
        if self.awake:
            action()
        else:
            self._held.append(action)

    def _handle(self, event: Event) -> None:
        if self.core is not None:
            self._done(event, self.core.handle(event, self.clock()))

    def _done(self, event: Event | None, outs: list[Out]) -> None:
        now = self.clock()
        for out in outs:
            self._do(out)
        self._around.handled(Handled(node=self, event=event, now=now, outs=outs))

    def _do(self, out: Out) -> None:
        match out:
            case Send(node=node, message=message):
                self.links.send(node, message)
            case SetTimer(after_s=after_s, token=token):
                self.timers += 1
                after = self._around.schedule.after
                after(after_s, self._ring, token, self.instance, self._slept_s)
            case Dial(node=node, addresses=addresses):
                self.links.dial(node, addresses)
            case Disconnect(node=node):
                if end := self.links.ends.get(node):
                    self._around.network.close(end)
                    self._around.schedule.after(0, self.ended, end)
            case PersistEpoch(epoch=epoch):
                self.disk = replace(self.disk, epoch=epoch)
            case TwinFound():
                self._around.schedule.after(0, self._give_way, self.instance)
            case _:
                pass  # for logs and for the rest of the node

    def _give_way(self, instance: int) -> None:
        if instance == self.instance and self.core is not None:
            self.kill()

    def _ring(self, token: str, instance: int, slept_s: float) -> None:
        if instance != self.instance or self.core is None:
            return
        if not self.powered:
            left_s = max(0.0, self._around.schedule.now - self._suspended_at)
            self._held.append(lambda: self._again(token, instance, left_s))
        elif self._slept_s > slept_s:
            late_s = self._slept_s - slept_s
            self._around.schedule.after(late_s, self._ring, token, instance, self._slept_s)
        elif self.frozen:
            self._held.append(lambda: self._ring(token, instance, slept_s))
        else:
            self.timers -= 1
            self.tell(TimerFired(token=token))

    def _again(self, token: str, instance: int, left_s: float) -> None:
        self._around.schedule.after(left_s, self._ring, token, instance, self._slept_s)

    # --- what the network tells it ----------------------------------------------------------------

    def accepted(self, end: End) -> None:
        """See `Host`."""
        self.links.accepted(end)

    def received(self, end: End, message: bytes) -> None:
        """See `Host`."""
        self.links.received(end, message)

    def ended(self, end: End) -> None:
        """See `Host`."""
        self.links.ended(end)
