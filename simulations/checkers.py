"""What must hold after every step, whatever fails, and what must hold once nothing fails any more.

The checkers read documents and messages with means of their own: they check signatures against
the keys that the simulation handed out and keep their own account of who wrote what, so that a
core that stops checking is found out. They know only the public side of the core.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from functools import lru_cache
from hashlib import blake2b

from p2pmesh.gossip.events import Health, PersistEpoch, Send, SetTimer, StateChanged
from p2pmesh.identity.keys import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, NodeId, verify
from p2pmesh.placement.inputs import facts_of
from p2pmesh.placement.plan import plan
from p2pmesh.state.bodies import MEMBER, WANTS
from p2pmesh.state.document import (
    EXPIRY_GRACE_S,
    OWNER_BYTES_MAX,
    OWNERS_MAX,
    REGISTERS_PER_OWNER_MAX,
    Document,
)
from p2pmesh.state.views import read
from p2pmesh.wire.messages import MESSAGE_BYTES_MAX, Message, Records, decode_message
from p2pmesh.wire.records import Record, parse
from simulations.node import Handled, Node
from simulations.world import MESH, World

EXPIRY_SLACK_S = 2.0  # what has run out is looked for once a second
TIMERS_MAX = 16  # of one core at once; timers that beget two would pass any number
PLANS_EVERY_S = 1.0
SMALL_MESH = 32  # up to here every step is checked, above every so many


class ViolationError(AssertionError):
    """Something that must never happen did."""


class Safety:
    """The invariants that hold after every step.

    Args:
        world: What is watched.
        stride: Look at the documents of every so many steps only.
    """

    def __init__(self, world: World, *, stride: int = 1) -> None:
        self._world = world
        self._stride = stride
        self._steps = 0
        self._public = {node.id: node.key.public for node in world.nodes}
        self._signed: dict[bytes, bool] = {}
        self._written: set[bytes] = set()
        self._lives: dict[tuple[int, int], _Life] = {}
        self._states: dict[bytes, bytes] = {}
        self._fingerprints: dict[bytes, bytes] = {}
        self._plans: dict[tuple[bytes, frozenset[NodeId]], bytes] = {}
        self._next_planner = 0
        world.schedule.after(PLANS_EVERY_S, self._plan_in_turn)

    def handled(self, step: Handled) -> None:
        """Check one step of one node."""
        node = step.node
        life = self._lives.get((node.number, node.instance))
        if life is None:
            life = self._lives[node.number, node.instance] = _Life(node.disk.epoch)
            self._public.setdefault(node.id, node.key.public)
        self._note_own(step)
        if node.hostile:
            return
        self._check_outs(step, life)
        self._steps += 1
        if self._steps % self._stride == 0:
            self._check_document(step, life)

    def check_plans(self, nodes: list[Node]) -> None:
        """Equal records and equal losses make equal plans."""
        for node in nodes:
            if node.core is None:
                continue
            document = node.core.document
            view = read(document, me=node.id)
            health = node.core.prober.health
            dead = frozenset(n for n in view.nodes if n != node.id and health(n) is Health.DEAD)
            made = plan(facts_of(view, dead)).encode()
            other = self._plans.setdefault((document.fingerprint, dead), made)
            if other != made:
                raise self._violation(node, "plans differently from equal facts")

    # --- what goes out ----------------------------------------------------------------------------

    def _check_outs(self, step: Handled, life: _Life) -> None:
        node = step.node
        for out in step.outs:
            match out:
                case PersistEpoch(epoch=epoch):
                    if epoch <= life.epoch:
                        raise self._violation(node, f"goes from epoch {life.epoch} to {epoch}")
                    life.epoch = epoch
                case Send(message=message):
                    self._check_message(step, message, life)
                case SetTimer(after_s=after_s) if after_s <= 0:
                    raise self._violation(node, "sets a timer that never lets time pass")
                case _:
                    pass
        if node.timers > TIMERS_MAX:
            raise self._violation(node, f"has {node.timers} timers under way")

    def _check_message(self, step: Handled, message: bytes, life: _Life) -> None:
        node = step.node
        if len(message) > MESSAGE_BYTES_MAX:
            raise self._violation(node, f"sends a message of {len(message)} bytes")
        said = _decoded(message)
        for raw in said.records if isinstance(said, Records) else ():
            record = _parsed(raw)
            if not self._is_signed(record):
                raise self._violation(node, f"passes on {_show(record)}, which nobody signed")
            if record.expires_at + EXPIRY_GRACE_S + EXPIRY_SLACK_S <= step.now:
                raise self._violation(node, f"passes on {_show(record)}, which has run out")
            if record.owner == node.id and record.instance == node.instance:
                self._written.add(raw)
                if record.epoch > life.epoch:
                    raise self._violation(node, f"uses epoch {record.epoch} before it is on disk")

    # --- what it believes -------------------------------------------------------------------------

    def _check_document(self, step: Handled, life: _Life) -> None:
        node = step.node
        assert node.core is not None
        document = node.core.document
        fingerprint = document.fingerprint
        told = any(isinstance(out, StateChanged) for out in step.outs)
        if fingerprint == life.fingerprint and not told:
            return
        if not told and self._stride == 1 and step.event is not None:
            raise self._violation(node, "changes its records without a word")
        life.fingerprint = fingerprint
        records = {record.key: record for record in document.records()}
        for key, record in records.items():
            if life.standing.get(key) is not record:
                self._check_record(node, record, life)
        life.standing = records
        self._check_bounds(node, document)
        state = blake2b(b"".join(r.digest for r in records.values()), digest_size=16).digest()
        if self._states.setdefault(fingerprint, state) != state:
            raise self._violation(node, "has the fingerprint of another state")
        if self._fingerprints.setdefault(state, fingerprint) != fingerprint:
            raise self._violation(node, "has another fingerprint of an equal state")

    def _check_record(self, node: Node, record: Record, life: _Life) -> None:
        if record.mesh != MESH or not self._is_signed(record):
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

    def _check_bounds(self, node: Node, document: Document) -> None:
        owners = document.owners
        if len(owners) > OWNERS_MAX:
            raise self._violation(node, f"keeps records of {len(owners)} owners")
        for owner in owners:
            held = document.registers(owner)
            size = sum(len(record.raw) for record in held)
            if len(held) > REGISTERS_PER_OWNER_MAX or size > OWNER_BYTES_MAX:
                raise self._violation(
                    node, f"keeps {len(held)} records, {size} bytes, of one owner"
                )

    def _note_own(self, step: Handled) -> None:
        node = step.node
        if node.core is not None and any(isinstance(out, StateChanged) for out in step.outs):
            for record in node.core.document.registers(node.id):
                if record.instance == node.instance:
                    self._written.add(record.raw)

    def _is_signed(self, record: Record) -> bool:
        raw = record.raw
        if raw not in self._signed:
            public = self._public.get(record.owner, b"")
            signed = raw[SIGNATURE_BYTES + PUBLIC_KEY_BYTES :]
            self._signed[raw] = verify(public, raw[:SIGNATURE_BYTES], signed)
        return self._signed[raw]

    def _plan_in_turn(self) -> None:
        nodes = [node for node in self._world.honest if node.awake]
        if nodes:
            self._next_planner += 1
            self.check_plans([nodes[self._next_planner % len(nodes)]])
        self._world.schedule.after(PLANS_EVERY_S, self._plan_in_turn)

    def _violation(self, node: Node, what: str) -> ViolationError:
        return ViolationError(f"at {self._world.schedule.now:.3f} s node {node.number} {what}")


class _Life:
    """What was seen of one life of one node."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch  # on disk
        self.fingerprint = b""
        self.standing: dict[tuple[NodeId, str], Record] = {}
        self.newest: dict[tuple[NodeId, str], tuple[int, int, bytes]] = {}
        self.epochs: dict[NodeId, int] = {}


class Gap(StrEnum):
    """A kind of difference between what nodes see and how things are."""

    STATE = "state"  # two live nodes have different records
    TWINS = "twins"  # two nodes still run with one key
    ABSENT = "absent"  # a live node is unknown, or known by an earlier life
    WRONGED = "wronged"  # a live node is taken for dead
    GHOST = "ghost"  # a dead node is counted on


def unsettled(world: World) -> Iterator[tuple[Gap, str]]:
    """What still differs from how things are: nothing, once the mesh has settled."""
    nodes = world.honest
    first = nodes[0].core
    assert first is not None
    if any(n.core and n.core.document.fingerprint != first.document.fingerprint for n in nodes):
        yield Gap.STATE, "fingerprints differ"
    living = {node.id: node for node in nodes}
    if len(living) < len(nodes):
        yield Gap.TWINS, "two nodes run with one key"
    down = [node for node in world.down if not node.hostile and node.instance]
    for node in nodes:
        assert node.core is not None
        for other in living.values():
            record = node.core.document.get(other.id, MEMBER)
            if record is None or record.instance not in _instances(world, other.id):
                text = f"node {node.number} does not know node {other.number} as it is"
                yield Gap.ABSENT, text
            elif other.id != node.id and node.sees_dead(other.id):
                yield Gap.WRONGED, f"node {node.number} takes node {other.number} for dead"
        for other in down:
            if not node.sees_dead(other.id):
                text = f"node {node.number} does not know that node {other.number} is gone"
                yield Gap.GHOST, text


def _instances(world: World, node: NodeId) -> set[int]:
    return {other.instance for other in world.nodes if other.id == node and other.core}


@lru_cache(maxsize=1024)
def _decoded(message: bytes) -> Message:
    return decode_message(message)


@lru_cache(maxsize=16384)
def _parsed(raw: bytes) -> Record:
    return parse(raw)


def _show(record: Record) -> str:
    owner = record.owner.hex()[:8]
    return f"{record.register} of {owner} version {record.epoch}.{record.seq}"
