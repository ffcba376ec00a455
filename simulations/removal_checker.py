"""Whether nodes that were accused and removed really were gone, by a count of its own.

The checker knows who really runs and who could talk to whom. An honest node accuses nobody whom it
could talk to all the time; a certificate holds enough valid accusations, as many as the mesh had
members that were there to see; only its subject takes it back; and who was there all the time
is never removed.
"""

from __future__ import annotations

from typing import Any

from p2pmesh.identity.keys import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, NodeId, verify
from p2pmesh.state.document import Document
from p2pmesh.wire.codec import decode
from p2pmesh.wire.evidence import Certificate
from p2pmesh.wire.records import RECORD_BYTES_MAX
from p2pmesh.wire.registers import ACCUSED, MEMBER
from simulations.node import Handled, Node
from simulations.schedule import ViolationError
from simulations.world import World

STEADY_S = 15.0  # after anything was done to a node or the network, nobody's judgement is false
OBSERVERS_MAX = 5
SIGNED_FROM = SIGNATURE_BYTES + PUBLIC_KEY_BYTES
BODY, OWNER, REGISTER = 9, 2, 3  # where a signed list has them


def quorum(observers: int) -> int:
    """How many of so many observers have to accuse a node."""
    return max(1, observers if observers <= 3 else observers - 1)


class Justice:
    """A reader that judges every accusation and every certificate once, where it first shows.

    Args:
        world: What is watched.
    """

    def __init__(self, world: World) -> None:
        self.wronged: list[str] = []
        self._world = world
        self._judged: set[bytes] = set()
        self._removed: dict[tuple[int, NodeId], tuple[int, int]] = {}
        self._rows: dict[int, frozenset[tuple[NodeId, int, int]]] = {}

    @property
    def certificates(self) -> int:
        """How many there were, right or wrong."""
        return len(self._judged)

    def handled(self, step: Handled) -> None:
        """See `Watcher`.

        Raises:
            ViolationError: A certificate proves too little, or an accusation is a lie.
        """
        node = step.node
        if node.hostile or node.core is None:
            return
        if node.id in step.changed:
            self._hear(node)
        document = node.core.document
        for subject in sorted(step.changed):
            certificate = document.certificate(subject)
            if certificate is not None:
                self._removed[node.instance, subject] = certificate.epoch, certificate.seq
                if certificate.raw not in self._judged:
                    self._judged.add(certificate.raw)
                    self._judge(node, certificate)
            elif (version := self._removed.pop((node.instance, subject), None)) is not None:
                member = document.get(subject, MEMBER)
                if member is not None and (member.epoch, member.seq) <= version:
                    what = f"takes back the removal of {subject.hex()[:8]}, which nothing refutes"
                    raise self._violation(node, what)

    # --- accusations ------------------------------------------------------------------------------

    def _hear(self, accuser: Node) -> None:
        """Is what an honest node accuses others of now true?"""
        assert accuser.core is not None
        record = accuser.core.document.get(accuser.id, ACCUSED)
        rows = frozenset(
            (NodeId(row[0]), row[1], row[2])
            for row in (record.body.get("s", []) if record is not None else [])
        )
        for subject, _, _ in sorted(rows - self._rows.get(accuser.number, frozenset())):
            others = self._world.running(subject)
            if len(others) == 1 and self._saw(accuser, others[0]):
                raise self._violation(
                    accuser, f"accuses node {others[0].number}, which it could talk to all the time"
                )
        self._rows[accuser.number] = rows

    def _saw(self, accuser: Node, subject: Node) -> bool:
        """Whether nothing was in the way of a probe for long."""
        if not self._world.network.conditions.calm or accuser.lag_s or subject.lag_s:
            return False
        since_s = self._world.schedule.now - STEADY_S
        return not subject.hostile and self._world.reach(accuser, subject, since_s)

    # --- certificates -----------------------------------------------------------------------------

    def _judge(self, node: Node, certificate: Certificate) -> None:
        accusers = {self._accuser(node, certificate, record.raw) for record in certificate.evidence}
        least = quorum(min(OBSERVERS_MAX, self._witnesses(node, certificate)))
        if len(accusers) < least:
            raise self._violation(
                node,
                f"removes {certificate.subject.hex()[:8]} on the word of {len(accusers)}, "
                f"where {least} are needed",
            )
        for subject in self._world.running(certificate.subject):
            if self._is_false(subject, accusers):
                at = self._world.schedule.now
                self.wronged.append(f"at {at:.3f} s node {subject.number}, found by {node.number}")

    def _accuser(self, node: Node, certificate: Certificate, raw: bytes) -> NodeId:
        """Return the signer of one piece of evidence, if it says what it should."""
        fields: list[Any] = decode(raw[SIGNED_FROM:], bytes_max=RECORD_BYTES_MAX)
        owner = NodeId(fields[OWNER])
        named = [certificate.subject, certificate.epoch, certificate.seq]
        keys = self._world.by_id.get(owner)
        good = (
            keys is not None
            and fields[REGISTER] == ACCUSED
            and owner != certificate.subject
            and named in fields[BODY]["s"]
            and verify(keys[0].key.public, raw[:SIGNATURE_BYTES], raw[SIGNED_FROM:])
        )
        if not good:
            raise self._violation(node, "holds a certificate with evidence that is none")
        return owner

    def _witnesses(self, node: Node, certificate: Certificate) -> int:
        """How many were there to see, for sure: they ran and nothing was in the way.

        Where packets suffer, neighbours are accused in good faith, and who is does not count.
        """
        assert node.core is not None
        since_s = self._world.schedule.now - STEADY_S
        suffering = not self._world.network.conditions.calm
        accused = _accused(node.core.document) if suffering else frozenset[NodeId]()
        return sum(
            1
            for other in self._world.nodes
            if other.id != certificate.subject
            and other.id not in accused
            and other.steady_since <= since_s
            and not other.lag_s
            and (other is node or self._world.reach(node, other, since_s))
        )

    def _is_false(self, subject: Node, accusers: set[NodeId]) -> bool:
        """Whether an honest accuser could have talked to the subject all the time."""
        since_s = self._world.schedule.now - STEADY_S
        return not subject.hostile and any(
            not accuser.hostile and self._world.reach(accuser, subject, since_s)
            for one in accusers
            for accuser in self._world.running(one)
        )

    def _violation(self, node: Node, what: str) -> ViolationError:
        return ViolationError(f"at {self._world.schedule.now:.3f} s node {node.number} {what}")


def _accused(document: Document) -> frozenset[NodeId]:
    """Everybody whom anybody accuses as they stand."""
    accused = set[NodeId]()
    for owner in document.owners:
        record = document.get(owner, ACCUSED)
        for subject, epoch, seq in record.body.get("s", []) if record is not None else []:
            member = document.get(NodeId(subject), MEMBER)
            if member is not None and (member.epoch, member.seq) == (epoch, seq):
                accused.add(member.owner)
    return frozenset(accused)
