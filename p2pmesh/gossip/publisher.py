"""This node's own records: writing, refreshing, and standing up for them. Pure.

Nothing is written before the node has learned what earlier lives of its key wrote (a disk may be
lost or old): until then the newest value of each register waits. Others take no more than a burst
of versions from one owner, so this node does not write faster than they believe; the newest value
wins.
"""

from __future__ import annotations

from typing import Any

from p2pmesh.gossip.buckets import Bucket
from p2pmesh.gossip.events import Out, PersistEpoch, Send, TwinFound
from p2pmesh.identity.credentials import Credential
from p2pmesh.identity.keys import MeshId, NodeId, SigningKey
from p2pmesh.state.document import EPOCH_AHEAD_S_MAX, Document
from p2pmesh.wire.messages import Push
from p2pmesh.wire.records import CREDENTIAL, Record, seal
from p2pmesh.wire.registers import MEMBER, REGISTERS, Life, register_of

LEASE_SHARE = 0.75  # of a short one, written when the mesh looked small, that may pass before that
# Nodes that started together shall not go on refreshing together: the first time each comes by up
# to so much of the interval early, later by a little.
EARLY_FIRST, EARLY_LATER = 0.75, 0.1
LOOK_EVERY_S = 0.5  # for what is to be refreshed; what has a new value does not wait
TWIN_SLACK_S = 5  # clocks of two machines with one key may differ by that much
OWNER_RATE_PER_S, OWNER_BURST = 1.0, 20  # versions of one owner that others take
KEPT_FOR_URGENT = 5  # versions of the burst: a refutation half a second late is none


class Publisher:
    """The author of this node's own records.

    Args:
        key: Signs it.
        mesh: Which mesh it is about.
        instance: Random per start.
        epoch: Already on disk, larger than any used before.
        document: Where it stands beside what others say.
        credential: This node's, None in a mesh that asks for none.
    """

    def __init__(
        self,
        key: SigningKey,
        mesh: MeshId,
        instance: int,
        epoch: int,
        document: Document,
        *,
        credential: Credential | None = None,
    ) -> None:
        self._credential = credential
        self.writing = False
        self._me = NodeId(key.id)
        self._key, self._mesh, self._instance = key, mesh, instance
        self._epoch, self._seq = epoch, 0
        self._document = document
        self._bodies: dict[str, dict[str, Any]] = {}
        self._waiting: set[str] = set()
        self._bucket = Bucket(OWNER_RATE_PER_S, OWNER_BURST)
        self._on_own_record: set[int] = set()  # instances
        self._started_at = 0
        self._looked_at = -LOOK_EVERY_S

    def start(self, mesh_now: float) -> None:
        """The node's life begins."""
        self._started_at = int(mesh_now)

    def publish(self, register: str, body: dict[str, Any] | None) -> None:
        """Set a register; None withdraws it. `due` says what is to be sent."""
        if body is None:
            if self._bodies.pop(register, None) is not None:
                self._waiting.add(register)
        elif self._bodies.get(register) != body:
            self._bodies[register] = body
            self._waiting.add(register)

    def use(self, credential: Credential) -> None:
        """Have this node's records carry that credential from now on."""
        self._credential = credential
        self._waiting |= {name for name in self._bodies if not _is_leased(name)}

    def refute(self) -> None:
        """Somebody takes this node for dead: say anew that it is here."""
        if MEMBER in self._bodies:
            self._waiting.add(MEMBER)

    def introduce(self, node: NodeId) -> list[Out]:
        """Return a message with this node's lease, before twins take each other's links."""
        member = self._document.get(self._me, MEMBER)
        return [] if member is None else [Send(node=node, message=Push(records=(member.raw,)))]

    def due(self, mesh_now: float, members: int) -> list[Record]:
        """Write the records that are due; the caller floods them.

        Args:
            mesh_now: Mesh time in seconds.
            members: How many nodes share the price of leases.
        """
        if not self.writing or (not self._waiting and mesh_now < self._looked_at + LOOK_EVERY_S):
            return []
        self._looked_at = mesh_now
        for register in self._bodies:
            if self._needs_refresh(register, mesh_now, members):
                self._waiting.add(register)
        written: list[Record] = []
        for register in sorted(self._waiting, key=_rank):
            if not self._may_stand(register, mesh_now):
                continue
            kept = 0 if register_of(register).urgent else KEPT_FOR_URGENT
            if self._bucket.tokens(mesh_now) < kept + 1 or not self._bucket.take(mesh_now):
                break
            self._waiting.discard(register)
            written.append(self._write(register, mesh_now, members))
        return written

    def on_own_record(self, record: Record, mesh_now: float) -> list[Out]:
        """Somebody holds a record with this node's key that this life did not write.

        Left over from an earlier life, it is outdone by a higher epoch. From one that runs now,
        the smaller instance stays and the other gives way.
        """
        if record.instance == self._instance and record.epoch == self._epoch:
            return []  # what it said before its lease ran out
        # Epochs are on disk before use: nobody but a twin that started at once has the same.
        # Nor does anybody else rise above an epoch that outranked it in this life.
        answers = record.instance in self._on_own_record
        slack_s = -TWIN_SLACK_S if answers else TWIN_SLACK_S
        alive = record.epoch == self._epoch or record.issued_at > self._started_at + slack_s
        if alive and self._instance > record.instance:
            return [TwinFound()]
        if record.epoch >= mesh_now + EPOCH_AHEAD_S_MAX - 1:
            return []  # nobody would believe a higher one yet; it comes up again
        if register_of(record.register).life is Life.OWN:
            self._waiting.add(record.register)  # it outlives epochs: this life says it anew, or not
        if record.epoch < self._epoch:
            return []
        self._on_own_record.add(record.instance)
        self._epoch = max(self._epoch, record.epoch) + 1
        self._seq = 0
        self._waiting |= self._bodies.keys()
        return [PersistEpoch(epoch=self._epoch)]

    def _may_stand(self, register: str, mesh_now: float) -> bool:
        """Whether a record could stand: most need a lease of this epoch, leases a credential."""
        if not _is_leased(register):
            return self._credential is None or self._credential.expires_at > mesh_now
        lease = self._document.get(self._me, MEMBER)
        return lease is not None and lease.epoch == self._epoch and lease.expires_at > mesh_now

    def _needs_refresh(self, register: str, mesh_now: float, members: int) -> bool:
        record = self._document.get(self._me, register)
        if record is None:
            return True
        own = self._credential
        if own is not None and not _is_leased(register) and record.expires_at >= own.expires_at:
            return False  # no other version could last longer
        row = register_of(register)
        every_s = row.refreshed_every_s(members)
        if row.life is Life.LEASE:
            # All that start together write leases for a small mesh: they wait as long as they can,
            # as the refreshes of a large one would come within a minute.
            every_s = min(every_s, LEASE_SHARE * record.ttl_s)
        if not _is_leased(register):
            every_s *= 1 - self._early(record)
        return mesh_now - record.issued_at >= every_s

    def _early(self, lease: Record) -> float:
        most = (
            EARLY_FIRST
            if lease.issued_at < self._started_at + REGISTERS[MEMBER].refresh_s
            else EARLY_LATER
        )
        return most * lease.digest[0] / 256

    def _ttl_s(self, register: str, mesh_now: float, members: int) -> int:
        row = register_of(register)
        ttl_s = row.ttl_s(members)
        standing = self._document.get(self._me, register)
        if standing is not None and not _is_leased(register):
            # None ends before the one that it replaces: else an old record could return.
            ttl_s = max(ttl_s, standing.expires_at - int(mesh_now))
        if self._credential is not None and not _is_leased(register):
            # Records carry the credential that they rest on, and end before it.
            ttl_s = min(ttl_s, self._credential.expires_at - int(mesh_now))
        return max(0, min(ttl_s, row.ttl_s_max))

    def _write(self, register: str, mesh_now: float, members: int) -> Record:
        self._seq += 1
        body = self._bodies.get(register, {})
        if self._credential is not None and not _is_leased(register):
            body = {**body, CREDENTIAL: self._credential.raw}
        record = seal(
            self._key,
            mesh=self._mesh,
            register=register,
            epoch=self._epoch,
            seq=self._seq,
            instance=self._instance,
            issued_at=int(mesh_now),
            ttl_s=self._ttl_s(register, mesh_now, members),
            body=body,
        )
        merged = self._document.merge(record, mesh_now)
        assert merged, "a node's own newest record always stands"
        return record


def _is_leased(register: str) -> bool:
    return register_of(register).life is Life.LEASED


def _rank(register: str) -> tuple[int, str]:
    """In which order registers are written: the lease, what is urgent, the rest."""
    row = register_of(register)
    return (0 if row.life is Life.LEASE else 1 if row.urgent else 2), register
