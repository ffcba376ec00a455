"""The invariants that must hold after every step, whatever fails.

The checkers read documents and messages with means of their own: they check signatures against
the keys that the simulation handed out and keep their own account of who wrote what, so that a
core that stops checking is found out. They know only the public side of the core. In small meshes
every node is followed, in large ones a few.
"""

from __future__ import annotations

from hashlib import blake2b

from p2pmesh.gossip.events import PersistEpoch, Send, SetTimer
from p2pmesh.identity.keys import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, NodeId, verify
from p2pmesh.placement.inputs import facts_of
from p2pmesh.placement.plan import plan
from p2pmesh.state.document import (
    EXPIRY_GRACE_S,
    OWNER_BYTES_MAX,
    OWNERS_MAX,
    REGISTERS_PER_OWNER_MAX,
    Document,
)
from p2pmesh.state.views import read
from p2pmesh.wire.messages import MESSAGE_BYTES_MAX, Message, Push
from p2pmesh.wire.records import Record
from p2pmesh.wire.registers import WANTS
from simulations.node import Handled, Node
from simulations.schedule import ViolationError
from simulations.sizes import size_of
from simulations.world import MESH, World

EXPIRY_SLACK_S = 2.0  # what has run out is looked for once a second
CLOCKS_APART_S = 60.0  # mesh time may differ that much from a node's own
TIMERS_MAX = 16 + 256  # of one core at once: its own few, and one for each errand
PLANS_EVERY_S = 1.0
SMALL_MESH = 32  # up to here every node is followed
FOLLOWED = 8  # of a larger one
COMPARED_EVERY = 50  # changes of a node in a larger mesh


class Safety:
    """The invariants that hold after every step.

    Args:
        world: What is watched.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._all = len(world.nodes) <= SMALL_MESH
        self._every = 1 if self._all else max(1, len(world.nodes) // FOLLOWED)
        self._public = {node.id: node.key.public for node in world.nodes}
        self._good: dict[bytes, Record] = {}  # signed by its owner
        self._written: set[bytes] = set()
        self._last: Message | None = None
        self._lives: dict[tuple[int, int], _Life] = {}
        self._states: dict[bytes, bytes] = {}
        self._fingerprints: dict[bytes, bytes] = {}
        self._plans: dict[bytes, bytes] = {}
        self._next_planner = 0
        world.schedule.after(PLANS_EVERY_S, self._plan_in_turn)

    def handled(self, step: Handled) -> None:
        """Check one step of one node.

        Raises:
            ViolationError: It broke an invariant.
        """
        node = step.node
        if step.event is None:
            self._lives[node.number, node.instance] = _Life(node.disk.epoch)
            self._public.setdefault(node.id, node.key.public)
        if node.id in step.changed:
            self._note_own(node)
        if node.hostile or node.number % self._every:
            return
        life = self._lives[node.number, node.instance]
        self._check_outs(step, life)
        assert node.core is not None
        fingerprint = node.core.document.fingerprint
        if step.changed:
            self._check_owners(node, step.changed, life)
        elif fingerprint != life.fingerprint and step.event is not None:
            raise self._violation(node, "changes its facts without a word")
        if fingerprint != life.fingerprint:
            life.fingerprint = fingerprint
            life.changes += 1
            if self._all or life.changes % COMPARED_EVERY == 0:
                self._compare(node, node.core.document)

    def check_plans(self, nodes: list[Node]) -> None:
        """Equal facts make equal plans, of each in a small mesh and of some in a larger one."""
        for node in nodes[:: 1 if self._all else self._every]:
            if node.core is None:
                continue
            document = node.core.document
            dead = node.core.out_of_placement(node.clock())
            key = document.fingerprint + b"".join(sorted(dead))
            made = plan(facts_of(read(document), dead)).encode()
            if self._plans.setdefault(key, made) != made:
                raise self._violation(node, "plans differently from equal facts")

    # --- what goes out ----------------------------------------------------------------------------

    def _check_outs(self, step: Handled, life: _Life) -> None:
        node = step.node
        for out in step.outs:
            match out:
                case Send(message=message):
                    if message is not self._last:
                        self._last = message
                        self._check_message(step, message, life)
                case PersistEpoch(epoch=epoch):
                    if epoch <= life.epoch:
                        raise self._violation(node, f"goes from epoch {life.epoch} to {epoch}")
                    life.epoch = epoch
                case SetTimer(after_s=after_s) if after_s <= 0:
                    raise self._violation(node, "sets a timer that never lets time pass")
                case _:
                    pass
        if node.timers > TIMERS_MAX:
            raise self._violation(node, f"has {node.timers} timers under way")

    def _check_message(self, step: Handled, message: Message, life: _Life) -> None:
        node = step.node
        if size_of(message) > MESSAGE_BYTES_MAX:
            raise self._violation(node, f"sends a message of {size_of(message)} bytes")
        if not isinstance(message, Push):
            return
        for raw in message.records:
            record = self._signed(raw)
            if record is None:
                raise self._violation(node, "passes on a record which nobody signed")
            if record.expires_at + EXPIRY_GRACE_S + EXPIRY_SLACK_S + CLOCKS_APART_S <= step.now:
                raise self._violation(node, f"passes on {_show(record)}, which has run out")
            if record.owner == node.id and record.instance == node.instance:
                self._written.add(raw)
                if record.epoch > life.epoch:
                    raise self._violation(node, f"uses epoch {record.epoch} before it is on disk")

    # --- what it believes -------------------------------------------------------------------------

    def _check_owners(self, node: Node, owners: frozenset[NodeId], life: _Life) -> None:
        assert node.core is not None
        document = node.core.document
        if len(document) > OWNERS_MAX:
            raise self._violation(node, f"keeps records of {len(document)} owners")
        for owner in owners:
            held = document.registers(owner)
            size = 0
            for record in held:
                size += len(record.raw)
                if life.standing.get(record.key) is not record:
                    self._check_record(node, record, life)
                    life.standing[record.key] = record
            if len(held) > REGISTERS_PER_OWNER_MAX or size > OWNER_BYTES_MAX:
                raise self._violation(
                    node, f"keeps {len(held)} records, {size} bytes, of one owner"
                )

    def _check_record(self, node: Node, record: Record, life: _Life) -> None:
        if record.mesh != MESH or self._signed(record.raw) is None:
            raise self._violation(node, f"believes {_show(record)}, which its owner never signed")
        if record.raw not in self._written and record.raw not in self._world.signed:
            raise self._violation(node, f"believes {_show(record)}, which its owner never wrote")
        newest = life.newest.get(record.key)
        if newest is not None and record.version < newest:
            raise self._violation(node, f"goes back to {_show(record)} from {newest[:2]}")
        life.newest[record.key] = record.version
        if record.register != WANTS:
            if record.epoch < life.epochs.get(record.owner, 0):
                raise self._violation(node, f"takes {_show(record)} of an epoch that is over")
            life.epochs[record.owner] = record.epoch

    def _compare(self, node: Node, document: Document) -> None:
        """Equal fingerprints are those of equal facts, and the other way round."""
        ids = [record.digest for record in document.records()]
        ids += [certificate.id for certificate in document.certificates]
        ids += [fork.id for owner in document.owners for fork in document.forks(owner)]
        state = blake2b(b"".join(sorted(ids)), digest_size=16).digest()
        fingerprint = document.fingerprint
        if self._states.setdefault(fingerprint, state) != state:
            raise self._violation(node, "has the fingerprint of another state")
        if self._fingerprints.setdefault(state, fingerprint) != fingerprint:
            raise self._violation(node, "has another fingerprint of an equal state")

    def _note_own(self, node: Node) -> None:
        assert node.core is not None
        for record in node.core.document.registers(node.id):
            if record.instance == node.instance:
                self._written.add(record.raw)

    def _signed(self, raw: bytes) -> Record | None:
        """The record, if its owner signed it; checked with the keys that were handed out."""
        known = self._good.get(raw)
        if known is None:
            record = self._world.memory.shared.check.parse(raw)
            public = self._public.get(record.owner, b"")
            if verify(public, raw[:SIGNATURE_BYTES], raw[SIGNATURE_BYTES + PUBLIC_KEY_BYTES :]):
                known = self._good[raw] = record
        return known

    def _plan_in_turn(self) -> None:
        nodes = [node for node in self._world.honest if node.awake]
        if nodes and self._all:
            self._next_planner += 1
            self.check_plans([nodes[self._next_planner % len(nodes)]])
        self._world.schedule.after(PLANS_EVERY_S, self._plan_in_turn)

    def _violation(self, node: Node, what: str) -> ViolationError:
        return ViolationError(f"at {self._world.schedule.now:.3f} s node {node.number} {what}")


class _Life:
    """The observations of one life of one node."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch  # on disk
        self.changes = 0
        self.fingerprint = bytes(16)
        self.standing: dict[tuple[NodeId, str], Record] = {}
        self.newest: dict[tuple[NodeId, str], tuple[int, int, bytes]] = {}
        self.epochs: dict[NodeId, int] = {}


def _show(record: Record) -> str:
    owner = record.owner.hex()[:8]
    return f"{record.register} of {owner} version {record.epoch}.{record.seq}"
