"""Facts from neighbours, checked and merged: the cheapest check first. Pure.

What is known is recognised by its head alone (microseconds). The rest is taken from each neighbour
at a bounded rate, since a signature costs a hundred. Only then is it read, judged, its signature
checked, and merged. One forged byte ends the link.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from p2pmesh.errors import PeerError
from p2pmesh.gossip.buckets import Buckets
from p2pmesh.gossip.events import Disconnect, Out, Rejected
from p2pmesh.gossip.overlay import RINGS
from p2pmesh.gossip.publisher import OWNER_BURST, OWNER_RATE_PER_S
from p2pmesh.gossip.removal import Removal, quorum
from p2pmesh.identity.keys import NodeId
from p2pmesh.state.document import Document, MergeOutcome
from p2pmesh.wire.evidence import Certificate, Fork, make_fork
from p2pmesh.wire.facts import FACT_KINDS, Fact, verify
from p2pmesh.wire.messages import Push, gather
from p2pmesh.wire.records import Record, RecordCheck, credential_of
from p2pmesh.wire.statements import Statement

PEER_RATE_PER_S = 500.0  # signatures; some 6 % of a core for a neighbour that means ill
COMPLAINTS = 1 / 60, 1  # per second and at once, of one neighbour: somebody reads the log
PEER_BURST = 16384  # a snapshot of a large mesh comes from one neighbour
DOUBTFUL_BYTES_MAX = 1 << 20  # certificates that do not convince yet; repair brings others again


@dataclass(slots=True)
class PushResult:
    """The result of one message of facts.

    Attributes:
        fresh: What is to be passed on at once; certificates are not, everybody makes them.
        ids: Of all that is new.
        owners: Whose facts changed.
        own: Records with this node's key that this life did not write.
        statements: Those that are to stand, by id, and whether each is to be passed on.
        doubted: Somebody holds a certificate that removes this node, which has to speak up.
        out: What is to be done about the sender.
        whole: All was looked at; what a neighbour sends beyond its rate is not.
        asked: The ids that were asked for.
        seen: The ids of all that was looked at, of a message that somebody asked for.
    """

    fresh: list[Fact] = field(default_factory=list)
    ids: list[bytes] = field(default_factory=list)
    owners: set[NodeId] = field(default_factory=set)
    own: list[Record] = field(default_factory=list)
    statements: dict[bytes, tuple[Statement, bool]] = field(default_factory=dict, compare=False)
    doubted: bool = False
    out: list[Out] = field(default_factory=list)
    whole: bool = True
    asked: AbstractSet[bytes] = field(default=frozenset(), compare=False)
    seen: set[bytes] = field(default_factory=set, compare=False)

    @property
    def nothing(self) -> bool:
        """Nothing of it was news, and nobody is to hear of it."""
        return not (self.ids or self.own or self.doubted or self.out)

    @property
    def news(self) -> Push:
        """Return the facts to pass on, as a message."""
        return gather(self.fresh)


class Receiver:
    """How one node takes facts in.

    Attributes:
        learning: This node does not know everybody yet: it cannot tell how many could have spoken,
            and takes certificates only that would do in any mesh.

    Args:
        me: This node.
        document: Where facts go.
        removal: Whether a certificate is believed.
        check: How facts are read and their signatures checked.
    """

    def __init__(
        self, me: NodeId, document: Document, removal: Removal, check: RecordCheck
    ) -> None:
        self.learning = False
        self._me = me
        self._document = document
        self._removal, self._check = removal, check
        self._peers: Buckets[NodeId] = Buckets(PEER_RATE_PER_S, PEER_BURST)
        self._owners: Buckets[NodeId] = Buckets(OWNER_RATE_PER_S, OWNER_BURST)
        self._complaints: Buckets[NodeId] = Buckets(*COMPLAINTS)
        self._doubtful: dict[NodeId, Certificate] = {}

    def take(
        self,
        node: NodeId,
        facts: Push,
        now: float,
        mesh_now: float,
        asked: AbstractSet[bytes] = frozenset(),
    ) -> PushResult:
        """Merge what is news in a message from `node`.

        Args:
            node: Who said it.
            facts: What it said.
            asked: The ids that it was asked for: those may come at any rate of their owners.
            now: For rates, in seconds.
            mesh_now: Mesh time in seconds.
        """
        taken = PushResult(asked=asked)
        try:
            self._take_all(node, facts, now, mesh_now, taken)
        except PeerError as exc:  # what came before it in the message stands
            taken.out.append(Disconnect(node=node, reason=str(exc), hostile=True))
        self._declare(mesh_now, taken)
        return taken

    def reconsider(self, mesh_now: float) -> PushResult:
        """Look again at certificates that did not convince when they came.

        Args:
            mesh_now: Mesh time in seconds.
        """
        taken = PushResult()
        for subject, certificate in list(self._doubtful.items()):
            outcome = self._document.judge(certificate, mesh_now)
            if not outcome.may_count or self._believe(certificate, outcome, mesh_now, taken):
                del self._doubtful[subject]
        return taken

    def _take_all(
        self,
        node: NodeId,
        facts: Push,
        now: float,
        mesh_now: float,
        taken: PushResult,
    ) -> None:
        for kind in FACT_KINDS.values():
            for raw in facts.of(kind):
                if kind is FACT_KINDS[Record] and self._known(raw):
                    if facts.asked:
                        taken.seen.add(self._check.digest(raw))
                    continue
                if not self._may(node, kind.signatures_max, now, taken):
                    return
                self._fact(node, kind.parse(raw, self._check), now, mesh_now, taken)
            self._declare(mesh_now, taken)

    def _declare(self, mesh_now: float, taken: PushResult) -> None:
        """Let the statements of a message stand together: each change of trust is work."""
        if not taken.statements:
            return
        result = self._document.declare((one for one, _ in taken.statements.values()), mesh_now)
        taken.ids += result.ids
        taken.owners |= result.owners
        said = (taken.statements[item] for item in result.ids)
        taken.fresh += [statement for statement, pass_on in said if pass_on]
        taken.statements.clear()

    def _may(self, node: NodeId, signatures: int, now: float, taken: PushResult) -> bool:
        """Whether so many more signatures may be checked for a neighbour."""
        if self._peers.take(node, now, signatures):
            return True
        taken.whole = False
        self._reject(node, "it sends more than it may", now, taken)
        return False

    def _reject(self, node: NodeId, reason: str, now: float, taken: PushResult) -> None:
        if self._complaints.take(node, now):
            taken.out.append(Rejected(node=node, reason=reason))

    def _known(self, raw: bytes) -> bool:
        """Whether these bytes, or a newer version, are in the document; a guess from the head."""
        head = self._check.peek(raw)
        if head is None:
            return False
        owner, register, epoch, seq = head
        if self._document.stale(owner, register, epoch, seq):
            return True
        standing = self._document.get(owner, register)
        return standing is not None and standing.raw == raw

    def _fact(
        self, node: NodeId, fact: Fact, now: float, mesh_now: float, taken: PushResult
    ) -> None:
        taken.seen.add(fact.id)
        outcome = self._document.judge(fact, mesh_now)
        if outcome is MergeOutcome.REFUSED:
            self._reject(node, "it brings more than there is room for", now, taken)
        if not outcome.may_count:
            return
        if not self._may(node, self._new_signatures(fact), now, taken):
            return
        if not verify(fact, self._check):
            raise PeerError(f"{FACT_KINDS[type(fact)].name} with a wrong signature")
        if isinstance(fact, Certificate):
            self._certificate(fact, outcome, mesh_now, taken)
        else:
            self._said(fact, outcome, now, mesh_now, taken)

    def _new_signatures(self, fact: Fact) -> int:
        """Return how many signatures of credentials come with a record that were not checked."""
        if not isinstance(fact, Record) or (own := credential_of(fact)) is None:
            return 0
        standing = self._document.get(*fact.key)
        before = credential_of(standing) if standing else None
        return 0 if before is own else len(own.chain)

    def _said(
        self,
        fact: Statement | Record | Fork,
        outcome: MergeOutcome,
        now: float,
        mesh_now: float,
        taken: PushResult,
    ) -> None:
        """Take in what an owner said, or said twice.

        All goes on at the owner's rate at most, and what was not asked for is taken at it; what
        falls behind comes with repair.
        """
        timely = self._owners.take(fact.owner, now)
        may_merge = timely or fact.id in taken.asked
        if may_merge and isinstance(fact, Record) and outcome is MergeOutcome.EQUIVOCATION:
            standing = self._document.get(*fact.key)
            assert standing is not None, "a fork has two sides"
            fork = make_fork(standing, fact)
            self._merge(fork, None, mesh_now, taken, pass_on=timely)
        if isinstance(fact, Statement):
            if may_merge:
                taken.statements[fact.id] = fact, timely
        elif fact.owner == self._me and isinstance(fact, Record):
            taken.own.append(fact)
        elif may_merge:
            self._merge(fact, outcome, mesh_now, taken, pass_on=timely)

    def _merge(
        self,
        fact: Fact,
        outcome: MergeOutcome | None,
        mesh_now: float,
        taken: PushResult,
        *,
        pass_on: bool,
    ) -> bool:
        result = self._document.merge(fact, mesh_now, outcome)
        taken.ids += result.ids
        taken.owners |= result.owners
        if result and pass_on:
            taken.fresh.append(fact)
        return bool(result)

    def _certificate(
        self, certificate: Certificate, outcome: MergeOutcome, mesh_now: float, taken: PushResult
    ) -> None:
        strong = len(certificate.evidence) >= quorum(RINGS)
        if (self.learning and not strong) or not self._believe(
            certificate, outcome, mesh_now, taken
        ):
            # Members that it speaks of may come with the next message.
            self._doubtful.pop(certificate.subject, None)
            self._doubtful[certificate.subject] = certificate
            while sum(len(one.raw) for one in self._doubtful.values()) > DOUBTFUL_BYTES_MAX:
                del self._doubtful[next(iter(self._doubtful))]

    def _believe(
        self, certificate: Certificate, outcome: MergeOutcome, mesh_now: float, taken: PushResult
    ) -> bool:
        """Believe a certificate if it convinces; one against this node is only noted."""
        if certificate.subject == self._me and self._removal.must_answer(certificate, mesh_now):
            taken.doubted = True
            return True
        if not self._removal.is_sufficient(certificate):
            return False
        return self._merge(certificate, outcome, mesh_now, taken, pass_on=False)
