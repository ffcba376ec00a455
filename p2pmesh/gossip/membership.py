"""The gossip core of one node: what it publishes, believes, passes on, probes and dials.

Pure: `handle(event, now) -> list[Out]`, where the shell does what comes out, in that order. The
parts each answer one question and do nothing by themselves; here they are put in order:

    intake       what is news         spread       to whom it goes on
    roster       who is here          settling     am I up to date
    neighbours   whom do I link with  healths      who answers
    charges      who is removed       watch        whom do I ask about and accuse
    prober       who answers          pulse        what do probes say
    dialling     whom do I dial       sync         what does a neighbour lack
    author       what do I say        clock        what time is it for all

`now` is this machine's own time; records carry mesh time, which the core makes of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from p2pmesh.config import Address
from p2pmesh.gossip.author import Author
from p2pmesh.gossip.charges import Charges
from p2pmesh.gossip.clock import MeshClock
from p2pmesh.gossip.dialling import Dialling
from p2pmesh.gossip.errands import ERRAND_S
from p2pmesh.gossip.events import (
    DialFailed,
    Disconnect,
    Event,
    Health,
    LinkDown,
    LinkUp,
    Out,
    Publish,
    Received,
    Send,
    SetTimer,
    StateChanged,
    TimerFired,
)
from p2pmesh.gossip.health import Healths
from p2pmesh.gossip.intake import Intake
from p2pmesh.gossip.neighbourhood import Neighbourhood
from p2pmesh.gossip.probe import PROBE_INTERVAL_S, PROBE_TIMEOUT_S, Prober
from p2pmesh.gossip.pulse import Pulse
from p2pmesh.gossip.roster import Roster
from p2pmesh.gossip.settling import Settling
from p2pmesh.gossip.shared import Shared
from p2pmesh.gossip.spread import Spread
from p2pmesh.gossip.sync import Sync
from p2pmesh.gossip.watch import Watch
from p2pmesh.identity.keys import MeshId, NodeId, SigningKey
from p2pmesh.state.document import Document
from p2pmesh.wire.evidence import ACCUSED, accused_to_wire
from p2pmesh.wire.messages import (
    Answer,
    Ask,
    Facts,
    Items,
    Own,
    Probe,
    Ranges,
    Told,
    Unknown,
    Want,
    in_chunks,
)

PAUSE_S = 3.0  # a tick so late means that this machine slept: nobody else is to blame
LAG_S = 0.25  # a time-out so late says more about this node than about the others
REVIEW_S = 0.1  # changes that come so close together are looked at once
LEARN_OWN_S = 2.0  # how long a start waits for word of its own earlier records
LEARN_OWN_MORE_S = 0.3  # once the first has answered
LEARN_OWN_FROM = 3

TICK, TIMEOUT, REVIEW, LEARNED, ERRAND = "tick", "timeout", "review", "learned", "errand"


class Gossip:
    """One node's part in the gossip.

    Args:
        key: Signs this node's records.
        mesh: Which mesh it is about.
        instance: Random per start.
        epoch: Already on disk, larger than any used before.
        seeds: Addresses that the user named.
        book: Addresses of nodes known from earlier.
        shared: The functions that depend on their arguments alone.
    """

    def __init__(
        self,
        *,
        key: SigningKey,
        mesh: MeshId,
        instance: int,
        epoch: int,
        seeds: tuple[Address, ...] = (),
        book: Mapping[NodeId, tuple[Address, ...]] | None = None,
        shared: Shared | None = None,
    ) -> None:
        shared = shared or Shared()
        self.me = NodeId(key.id)
        self.document = Document(mesh, share=shared.held)
        self._alone = not seeds and not book
        self._links: set[NodeId] = set()
        self._clock = MeshClock()
        self._roster = Roster(self.me, self.document, book or {}, shared)
        self._charges = Charges(self.document, self._roster, shared)
        self._intake = Intake(self._roster, self.document, self._charges, shared)
        self._prober = Prober()
        self._settling = Settling(done=self._alone)
        self._sync = Sync(self.document)
        self._spread = Spread()
        self._dialling = Dialling(self._roster, seeds)
        self._author = Author(key, mesh, instance, epoch, self.document)
        self._near = Neighbourhood(self._roster, shared)
        self._watch = Watch(self._roster, self._prober, self._near, self._links)
        self._pulse = Pulse(self._roster, self._clock, self._near, self._settling, self._spread)
        self._healths = Healths(
            self._roster, self._prober, self._near, self._links, lambda: self.document.removed
        )
        self._answered_own: set[NodeId] = set()
        self._ticked_at = self._timeout_due = self._review_due = 0.0
        self._reviewing = False

    # --- what others read -------------------------------------------------------------------------

    @property
    def plan(self) -> bytes:
        """Digest of this node's plan, for its probes; in no record, so it never feeds back."""
        return self._pulse.plan

    @plan.setter
    def plan(self, digest: bytes) -> None:
        self._pulse.plan = digest

    @property
    def plans(self) -> Mapping[NodeId, bytes]:
        """Digests of the neighbours' plans, as they last said."""
        return self._pulse.plans

    @property
    def linked(self) -> frozenset[NodeId]:
        """The nodes with a link."""
        return frozenset(self._links)

    @property
    def joined(self) -> bool:
        """Whether this node writes its records: it knows what earlier lives of it wrote."""
        return self._author.writing

    @property
    def rejoining(self) -> bool:
        """Whether this node may be behind the others: nothing destructive may be done now."""
        return not self._settling.done

    @property
    def isolated(self) -> bool:
        """Whether everybody that this node observes is gone for it: it is itself cut off."""
        others = self._roster.live - {self.me}
        accused = self._watch.suspicion.accusations.keys()
        return bool(others or accused) and not self._links

    @property
    def removed(self) -> frozenset[NodeId]:
        """Whom the mesh has removed, by certificates."""
        return self.document.removed

    @property
    def book(self) -> dict[NodeId, tuple[Address, ...]]:
        """Where nodes are or were, to be kept for the next start."""
        return self._roster.book

    def mesh_now(self, now: float) -> float:
        """Mesh time at the machine's time `now`, both in seconds."""
        return self._clock.now(now)

    def out_of_placement(self, now: float) -> frozenset[NodeId]:
        """Whom placement does without: who was removed, and who is held for a fork."""
        return self.document.removed | self.document.held(self.mesh_now(now))

    def health(self, node: NodeId) -> Health:
        """How `node` is for routing; see `Healths`."""
        return self._healths.of(node)

    def rtt_s(self, node: NodeId) -> float | None:
        """Round-trip time of probes, None while there was none."""
        return self._prober.rtt_s(node)

    # --- events -----------------------------------------------------------------------------------

    def start(self, now: float) -> list[Out]:
        """Begin: dial, probe, and learn what earlier lives of this node wrote."""
        self._ticked_at = now
        self._settling.begin(now)
        self._author.start(self.mesh_now(now))
        self._author.writing = self._alone
        out: list[Out] = [SetTimer(after_s=PROBE_INTERVAL_S, token=TICK)]
        if not self._alone:
            out.append(SetTimer(after_s=LEARN_OWN_S, token=LEARNED))
        return [*out, *self._dial(now)]

    def handle(self, event: Event, now: float) -> list[Out]:
        """What follows from `event`.

        Args:
            event: What happened.
            now: This machine's time in seconds; never goes back within one life.
        """
        return [*self._handle(event, now), *self._healths.changes()]

    def _handle(self, event: Event, now: float) -> list[Out]:
        match event:
            case Received():
                return self._received(event, now)
            case TimerFired(token=token):
                return self._timer(token, now)
            case LinkUp(node=node):
                return self._link_up(node, now)
            case LinkDown(node=node):
                return self._link_down(node, now)
            case DialFailed(node=node, nobody_there=nobody_there):
                return self._dial_failed(node, now, nobody_there=nobody_there)
            case Publish(register=register, body=body):
                self._author.publish(register, body)
                return self._write(now)

    # --- links ------------------------------------------------------------------------------------

    def _link_up(self, node: NodeId, now: float) -> list[Out]:
        self._links.add(node)
        self._healths.touch((node,))
        self._prober.link_up(node, now)
        self._dialling.linked(node, now)
        out: list[Out] = [*self._watch.heard(node)]
        if not self._author.writing:
            out.append(Send(node=node, message=Own()))
        return [*out, *self._probe(node, now), *self._review_soon()]

    def _link_down(self, node: NodeId, now: float) -> list[Out]:
        self._links.discard(node)
        self._healths.touch((node,))
        self._pulse.plans.pop(node, None)
        self._clock.forget(node)
        self._prober.link_down(node, now)
        self._sync.link_down(node)
        self._dialling.lost(node, now)
        return [*self._dial(now), *self._review_soon()]

    def _dial_failed(self, node: NodeId | None, now: float, *, nobody_there: bool) -> list[Out]:
        self._dialling.failed(node, now)
        if node is None or node in self._links:
            return []
        self._healths.touch((node,))
        if nobody_there and node in self._near.wanted:
            self._prober.nobody_there(node)
            return [*self._watch.errands.found(node, alive=False), *self._misses(now)]
        return [*self._watch.errands.found(node, alive=False)]

    def _dial(self, now: float) -> list[Out]:
        return list(self._dialling.due(self._near.wanted, self._links, now))

    # --- time -------------------------------------------------------------------------------------

    def _timer(self, token: str, now: float) -> list[Out]:
        if token == TICK:
            return self._tick(now)
        if token == TIMEOUT and now >= self._timeout_due:
            return self._timeout(now)
        if token == REVIEW:
            self._reviewing = False
            return self._review(now)
        if token == LEARNED:
            return self._begin_writing(now)
        if token == ERRAND:
            return [*self._watch.errands.overdue(now)]
        return []

    def _tick(self, now: float) -> list[Out]:
        late_s = now - self._ticked_at - PROBE_INTERVAL_S
        self._ticked_at = now
        out: list[Out] = [SetTimer(after_s=PROBE_INTERVAL_S, token=TICK)]
        if late_s > PAUSE_S:
            self._prober.forgive(now)
            self._watch.suspicion.forgive()
            self._settling.again(now)
        if gone := self.document.expire(self.mesh_now(now)):
            out += self._learned(gone, now)
        self._settling.review(self._links, now)
        out += self._sync.tick(now)
        for node in sorted(self._links):
            if node in self._near.wanted or not self._settling.done:
                self._dialling.keep(node, now)
            if self._watch.is_mine_to_probe(node, now):
                out += self._probe(node, now)
        out += [Disconnect(node=n, reason="not needed") for n in self._dialling.unwanted(now)]
        self._timeout_due = now + PROBE_TIMEOUT_S
        out.append(SetTimer(after_s=PROBE_TIMEOUT_S, token=TIMEOUT))
        return [*out, *(self._misses(now) if late_s <= LAG_S else []), *self._review(now)]

    def _timeout(self, now: float) -> list[Out]:
        if now - self._timeout_due > LAG_S:
            # Answers may lie unread in this node's own queues: read them first.
            self._timeout_due = now + PROBE_TIMEOUT_S
            return [SetTimer(after_s=PROBE_TIMEOUT_S, token=TIMEOUT)]
        return self._misses(now)

    def _misses(self, now: float) -> list[Out]:
        """Count missing answers; ask around about, and accuse, whom this node observes."""
        self._healths.touch(self._prober.count(self._near.wanted, now))
        if not self._settling.done:
            return []
        return [*self._watch.ask_around(now), *self._accuse(now)]

    def _accuse(self, now: float) -> list[Out]:
        if not self._settling.done or not self._watch.accuse(self.document.removed, now):
            return []
        rows = self._watch.suspicion.accusations.values()
        self._author.publish(ACCUSED, accused_to_wire(rows) if rows else None)
        return self._write(now)

    def _review_soon(self) -> list[Out]:
        if self._reviewing:
            return []
        self._reviewing = True
        return [SetTimer(after_s=REVIEW_S, token=REVIEW)]

    def _review(self, now: float) -> list[Out]:
        """Act on what has changed: neighbours, observers, removals, own records that wait."""
        out: list[Out] = []
        for certificate in self._charges.ripe(now):
            if self.document.add_certificate(certificate, self.mesh_now(now)):
                out += self._learned({certificate.subject}, now)
        if concerned := self._near.update(self._charges.accused(now) | self._charges.wrong(now)):
            self._healths.touch(concerned)
            self._prober.keep_only(self._near.wanted)
            self._dialling.forget_except(self._near.wanted)
        out += [*self._write(now), *self._accuse(now), *self._dial(now)]
        if not self._reviewing and (after_s := self._charges.next_ripe_s(now)) is not None:
            self._reviewing = True
            out.append(SetTimer(after_s=max(after_s, REVIEW_S), token=REVIEW))
        return out

    # --- probes -----------------------------------------------------------------------------------

    def _probe(self, node: NodeId, now: float) -> list[Out]:
        token = self._prober.ask(node, now)
        return (
            [] if token is None else [Send(node=node, message=self._pulse.probe(node, token, now))]
        )

    def _compare(self, node: NodeId, said: Probe | Answer, now: float) -> list[Out]:
        """What follows from what a neighbour says that it knows."""
        if said.keep:
            self._dialling.keep(node, now)
        complete = self._pulse.read(node, said, now)
        self._settling.review(self._links, now)
        asker = isinstance(said, Answer)
        return [
            *self._sync.lacking(node, said.recent, now),
            *self._sync.compare(
                node, said.cutoff, said.fingerprint, now, first=complete, asker=asker
            ),
        ]

    # --- messages ---------------------------------------------------------------------------------

    def _received(self, event: Received, now: float) -> list[Out]:
        node = event.node
        if not self._prober.answering(node):
            self._healths.touch((node,))
        self._prober.heard(node, now)
        return [*self._watch.heard(node), *self._message(event, now)]

    def _message(self, event: Received, now: float) -> list[Out]:
        node = event.node
        match event.message:
            case Facts() as facts:
                return self._facts(node, facts, now)
            case Probe() as probe:
                answer = self._pulse.answer(node, probe, now)
                return [Send(node=node, message=answer), *self._compare(node, probe, now)]
            case Answer() as answer:
                rtt_s = self._prober.answered(node, answer.token, now)
                if rtt_s is not None:
                    self._clock.observe(node, answer.at_ms / 1000 + rtt_s / 2 - now)
                return self._compare(node, answer, now)
            case Ask() as ask:
                return self._run_errand(node, ask, now)
            case Told(subject=subject, token=token, alive=alive):
                self._watch.suspicion.told(node, subject, token, alive=alive, now=now)
                return self._accuse(now)
            case Ranges() as ranges:
                return self._sync.ranges(node, ranges, now)
            case Items() as items:
                return self._sync.items(node, items, now)
            case Want() as want:
                return self._sync.want(node, want, now)
            case Own():
                raws = (record.raw for record in self.document.registers(node))
                return [Send(node=node, message=next(in_chunks(raws, asked=True)))]
            case Unknown():
                return []

    def _run_errand(self, node: NodeId, ask: Ask, now: float) -> list[Out]:
        if not self._watch.errands.accept(node, ask, now):
            return []
        subject = ask.subject
        until = SetTimer(after_s=ERRAND_S, token=ERRAND)
        if subject in self._links:
            return [*self._probe(subject, now), until]
        dial = self._dialling.try_once(subject)
        return [dial, until] if dial else [*self._watch.errands.found(subject, alive=False)]

    def _facts(self, node: NodeId, facts: Facts, now: float) -> list[Out]:
        taken = self._intake.take(node, facts, now, self.mesh_now(now))
        out: list[Out] = list(taken.out)
        if taken.owners:
            out += self._learned(taken.owners, now)
        for record in taken.own:
            out += self._author.outranked(record, self.mesh_now(now))
        if taken.doubted:
            self._author.refute()
        if taken.ids:
            self._spread.learned(taken.ids, now)
            if self._settling.done or not facts.asked:  # a snapshot is news only to this node
                onward = self._spread.onward(self._near.eager, self._links, node)
                out += self._spread.flood(taken.news, onward)
        if facts.asked:
            out += self._sync.pulled(node, facts, now)
            out += self._learned_own(node, now)
        return [*out, *self._write(now)]

    def _learned(self, owners: Iterable[NodeId], now: float) -> list[Out]:
        """Facts of these owners changed."""
        owners = frozenset(owners)
        self._roster.refresh(owners)
        self._charges.refresh(owners, now)
        self._healths.touch(owners)
        if self.me in self._charges.accused(now):
            self._author.refute()
        return [StateChanged(owners=owners), *self._review_soon()]

    # --- own records ------------------------------------------------------------------------------

    def _write(self, now: float) -> list[Out]:
        records = self._author.due(self.mesh_now(now), len(self._roster.live))
        if not records:
            return []
        self._spread.learned((record.digest for record in records), now)
        facts = Facts(records=tuple(record.raw for record in records))
        return [*self._learned({self.me}, now), *self._spread.flood(facts, self._links)]

    def _learned_own(self, node: NodeId, now: float) -> list[Out]:
        if self._author.writing:
            return []
        self._answered_own.add(node)
        if len(self._answered_own) >= LEARN_OWN_FROM:
            return self._begin_writing(now)
        return [SetTimer(after_s=LEARN_OWN_MORE_S, token=LEARNED)]

    def _begin_writing(self, now: float) -> list[Out]:
        self._author.writing = True
        return self._write(now)
