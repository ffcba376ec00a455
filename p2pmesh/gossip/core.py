"""The gossip core of one node: calls its parts in order for each event. Pure.

The parts each answer one question and do nothing by themselves:

    receiver     merges what arrives        dissemination  passes news on
    members      who is in the mesh         catch_up       whether this node is up to date
    near         links and observers        healths        which nodes answer
    removal      who is removed             watch          probes by others, accusations
    prober       what was measured          heartbeat      content of probes and answers
    dialer       which nodes to dial        sync           repair with a neighbour
    publisher    this node's records        recovery       its records of earlier lives
    clock        mesh time
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from p2pmesh.config import Address
from p2pmesh.gossip.antientropy import AntiEntropy
from p2pmesh.gossip.catch_up import CatchUp
from p2pmesh.gossip.clock import MeshClock
from p2pmesh.gossip.dialer import Dialer
from p2pmesh.gossip.dissemination import Dissemination
from p2pmesh.gossip.events import (
    Declare,
    DialFailed,
    Disconnect,
    Event,
    LinkDown,
    LinkUp,
    Out,
    Publish,
    Received,
    Send,
    SetTimer,
    StateChanged,
    TimerFired,
    TrustChanged,
    UseCredential,
)
from p2pmesh.gossip.health import Healths
from p2pmesh.gossip.heartbeat import Heartbeat
from p2pmesh.gossip.indirect import ERRAND_S
from p2pmesh.gossip.members import Members
from p2pmesh.gossip.neighbours import Neighbours
from p2pmesh.gossip.probe import PROBE_INTERVAL_S, PROBE_TIMEOUT_S, Prober
from p2pmesh.gossip.publisher import Publisher
from p2pmesh.gossip.receive import PushResult, Receiver
from p2pmesh.gossip.recovery import LEARNED, Recovery
from p2pmesh.gossip.removal import Removal
from p2pmesh.gossip.shared import Shared
from p2pmesh.gossip.watch import Watch
from p2pmesh.identity.credentials import Credential
from p2pmesh.identity.keys import MeshId, NodeId, SigningKey
from p2pmesh.state.document import Document
from p2pmesh.state.trust import Authorised
from p2pmesh.wire.evidence import accused_to_wire
from p2pmesh.wire.messages import (
    Ack,
    FetchRequest,
    Items,
    Own,
    Ping,
    ProbeReport,
    ProbeRequest,
    Push,
    Ranges,
    Unknown,
    gather,
)
from p2pmesh.wire.registers import ACCUSED
from p2pmesh.wire.statements import Statement

PAUSE_S = 3.0  # a tick so late means that this machine slept: nobody else is to blame
LAG_S = 0.25  # a time-out so late says more about this node than about the others
REVIEW_S = 0.1  # changes that come so close together are looked at once

TICK, TIMEOUT, REVIEW, ERRAND = "tick", "timeout", "review", "errand"


class Core:
    """The gossip core of one node; `Gossip` is its public face and documents its arguments."""

    def __init__(
        self,
        *,
        key: SigningKey,
        mesh: MeshId,
        instance: int,
        epoch: int,
        seeds: tuple[Address, ...],
        book: Mapping[NodeId, tuple[Address, ...]],
        shared: Shared,
        authorised: Authorised,
        statements: Iterable[Statement],
        credential: Credential | None,
    ) -> None:
        self.me = NodeId(key.id)
        self.document = Document(
            mesh,
            keeper=self.me,
            authorised=authorised,
            share=shared.held,
            grow=shared.grown,
            homes=shared.homes,
        )
        kept = tuple(statements)
        self.document.declare(kept, max((one.issued_at for one in kept), default=0))
        self._trust = self.document.trust
        self._alone = not seeds and not book
        self.links: set[NodeId] = set()
        self.clock = MeshClock()
        self.members = Members(self.me, self.document, book, shared)
        self._removal = Removal(self.document, self.members, shared)
        self._receiver = Receiver(self.me, self.document, self._removal, shared.check)
        self.prober = Prober()
        self.catch_up = CatchUp(done=self._alone)
        self._sync = AntiEntropy(self.document)
        self._dissemination = Dissemination()
        self._dialer = Dialer(self.members, seeds)
        self.publisher = Publisher(key, mesh, instance, epoch, self.document, credential=credential)
        self._near = Neighbours(self.members, shared)
        self.watch = Watch(self.members, self.prober, self._near, self.links)
        self.heartbeat = Heartbeat(
            self.members, self.clock, self._near, self.catch_up, self._dissemination
        )
        self.healths = Healths(self.members, self.prober, self._near, self._removal, self.links)
        self.recovery = Recovery(done=self._alone)
        self._ticked_at = self._timeout_due = 0.0
        self._reviewing = False

    # --- events -----------------------------------------------------------------------------------

    def start(self, now: float) -> list[Out]:
        """Begin: dial, probe, and learn what earlier lives of this node wrote."""
        self._ticked_at = now
        self.catch_up.begin(now)
        self.publisher.start(self.clock.now(now))
        out: list[Out] = [SetTimer(after_s=PROBE_INTERVAL_S, token=TICK)]
        return [*out, *self.recovery.begin(), *self._dial(now), *self._write(now)]

    def handle(self, event: Event, now: float) -> list[Out]:
        """Return the effects of `event`.

        Args:
            event: What happened.
            now: This machine's time in seconds; never goes back within one life.
        """
        woken = self._wake(now) if now - self._ticked_at > PROBE_INTERVAL_S + PAUSE_S else []
        out = [*woken, *self._dispatch(event, now), *self.healths.changes()]
        return [*out, *self._trust_changes()]

    def _dispatch(self, event: Event, now: float) -> list[Out]:
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
                self.publisher.publish(register, body)
                return self._write(now)
            case Declare(statements=statements):
                return self._declare(statements, now)
            case UseCredential(credential=credential):
                self.publisher.use(credential)
                return self._write(now)

    # --- links ------------------------------------------------------------------------------------

    def _link_up(self, node: NodeId, now: float) -> list[Out]:
        self.links.add(node)
        self.healths.touch((node,))
        self.prober.link_up(node, now)
        self._dialer.linked(node, now)
        found = [*self.watch.heard(node), *self.recovery.ask(node), *self.publisher.introduce(node)]
        return [*found, *self._probe(node, now), *self._review_soon()]

    def _link_down(self, node: NodeId, now: float) -> list[Out]:
        self.links.discard(node)
        self.healths.touch((node,))
        self.heartbeat.plans.pop(node, None)
        self.clock.forget(node)
        self.prober.link_down(node, now)
        self.recovery.lost(node)
        self._sync.link_down(node)
        self._dialer.lost(node, now)
        if node not in self._near.wanted:
            # Let go, or only met on the way in: live, like all strangers, until somebody misses it.
            self.prober.keep_only(self._near.wanted)
            self._dialer.forget_except(self._near.wanted)
        return [*self._dial(now), *self._review_soon()]

    def _dial_failed(self, node: NodeId | None, now: float, *, nobody_there: bool) -> list[Out]:
        self._dialer.failed(node, now)
        if node is None or node in self.links:
            return []
        self.healths.touch((node,))
        found: list[Out] = [*self.watch.indirect.found(node, alive=False)]
        if nobody_there and node in self._near.wanted:
            self.prober.nobody_there(node)
            found += self._misses(now)
        return found

    def _dial(self, now: float) -> list[Out]:
        return list(self._dialer.due(self._near.wanted, self.links, now))

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
            self.recovery.done = True
            return self._write(now)
        if token == ERRAND:
            return [*self.watch.indirect.overdue(now)]
        return []

    def _tick(self, now: float) -> list[Out]:
        late_s = now - self._ticked_at - PROBE_INTERVAL_S
        self._ticked_at = now
        out: list[Out] = [SetTimer(after_s=PROBE_INTERVAL_S, token=TICK)]
        out += self._learned(self.document.expire(self.clock.now(now)), now)
        self.catch_up.review(self.links, self._sync.exhausted_peers, now)
        out += self._sync.tick(now)
        if self.catch_up.done or not self._sync.busy:
            out += self._follow(self._receiver.reconsider(self.clock.now(now)), now)
        for node in sorted(self.links):
            if node in self._near.wanted or not self.catch_up.done:
                self._dialer.keep(node, now)
            if self.watch.is_mine_to_probe(node, now):
                out += self._probe(node, now)
        out += [Disconnect(node=n, reason="not needed") for n in self._dialer.unwanted(now)]
        self._timeout_due = now + PROBE_TIMEOUT_S
        out.append(SetTimer(after_s=PROBE_TIMEOUT_S, token=TIMEOUT))
        return [*out, *(self._misses(now) if late_s <= LAG_S else []), *self._review(now)]

    def _wake(self, now: float) -> list[Out]:
        """This machine slept: blame nobody, and pass nothing on that has run out meanwhile."""
        self._ticked_at = now
        self.prober.forgive(now)
        self.watch.suspicion.forgive()
        self.catch_up.again(now)
        self._sync.exhausted_peers.clear()
        return self._learned(self.document.expire(self.clock.now(now)), now)

    def _timeout(self, now: float) -> list[Out]:
        if now - self._timeout_due > LAG_S:
            # Answers may lie unread in this node's own queues: read them first.
            self._timeout_due = now + PROBE_TIMEOUT_S
            return [SetTimer(after_s=PROBE_TIMEOUT_S, token=TIMEOUT)]
        return self._misses(now)

    def _misses(self, now: float) -> list[Out]:
        """Count missing answers; ask around about, and accuse, whom this node observes."""
        missed = self.prober.count(self._near.wanted, now)
        self.healths.touch(missed)
        out: list[Out] = [
            Disconnect(node=n, reason="silent") for n in self.prober.unresponsive_links(now)
        ]
        # A connection may be dead where both its ends are well: a new one tells.
        doubted = [n for n in sorted(missed) if n in self.links and self.prober.doubts(n)]
        out += [dial for node in doubted if (dial := self._dialer.try_once(node))]
        if not self.catch_up.done:
            return out
        return [*out, *self.watch.ask_around(now), *self._accuse(now)]

    def _accuse(self, now: float) -> list[Out]:
        if not self.catch_up.done or not self.watch.accuse(self.document.removed, now):
            return []
        rows = self.watch.suspicion.accusations.values()
        self.publisher.publish(ACCUSED, accused_to_wire(rows) if rows else None)
        return self._write(now)

    def _review_soon(self) -> list[Out]:
        timer = [] if self._reviewing else [SetTimer(after_s=REVIEW_S, token=REVIEW)]
        self._reviewing = True
        return [*timer]

    def _review(self, now: float) -> list[Out]:
        """Act on what has changed: neighbours, observers, removals, own records that wait."""
        out: list[Out] = []
        for certificate in self._removal.ripe(now) if self.catch_up.done else ():
            out += self._learned(self.document.merge(certificate, self.clock.now(now)).owners, now)
        if concerned := self._near.update(self._removal.non_voters, self._removal.weakly_removed):
            self.healths.touch(concerned)
            self.prober.keep_only(self._near.wanted)
            self._dialer.forget_except(self._near.wanted)
        out += [*self._write(now), *self._accuse(now), *self._dial(now)]
        if not self._reviewing and (after_s := self._removal.next_ripe_s(now)) is not None:
            self._reviewing = True
            out.append(SetTimer(after_s=max(after_s, REVIEW_S), token=REVIEW))
        return out

    # --- probes -----------------------------------------------------------------------------------

    def _probe(self, node: NodeId, now: float) -> list[Out]:
        if (token := self.prober.ask(node, now)) is None:
            return []
        return [Send(node=node, message=self.heartbeat.probe(node, token, now))]

    def _compare(self, node: NodeId, said: Ping | Ack, now: float) -> list[Out]:
        """Compare a neighbour's fingerprint with this node's; return the effects."""
        if said.keep:
            self._dialer.keep(node, now)
        complete = self.heartbeat.read(node, said, now)
        self.catch_up.review(self.links, self._sync.exhausted_peers, now)
        asker = isinstance(said, Ack)
        return [
            *self._sync.lacking(node, said.recent, now),
            *self._sync.compare(
                node, said.cutoff, said.fingerprint, now, first=complete, asker=asker
            ),
        ]

    # --- messages ---------------------------------------------------------------------------------

    def _received(self, event: Received, now: float) -> list[Out]:
        node = event.node
        if node not in self.links:
            return []  # it was said before the link broke
        if not self.prober.answering(node):
            self.healths.touch((node,))
        self.prober.heard(node, now)
        return [*self.watch.heard(node), *self._message(event, now)]

    def _message(self, event: Received, now: float) -> list[Out]:
        node = event.node
        match event.message:
            case Push() as facts:
                return self._facts(node, facts, now)
            case Ping() as probe:
                answer = self.heartbeat.answer(node, probe, now)
                return [Send(node=node, message=answer), *self._compare(node, probe, now)]
            case Ack() as answer:
                rtt_s = self.prober.answered(node, answer.token, now)
                if rtt_s is not None:
                    self.clock.observe(node, answer.at_ms / 1000 + rtt_s / 2 - now)
                return self._compare(node, answer, now)
            case ProbeRequest() as ask:
                return self._run_errand(node, ask, now)
            case ProbeReport(subject=subject, token=token, alive=alive):
                self.watch.suspicion.told(node, subject, token, alive=alive, now=now)
                return self._accuse(now)
            case Ranges() as ranges:
                return [*self._sync.ranges(node, ranges, now)]
            case Items() as items:
                return [*self._sync.items(node, items, now)]
            case FetchRequest() as want:
                return [*self._sync.want(node, want, now)]
            case Own():
                return [*self._sync.own(node, now)]
            case Unknown():
                return []

    def _run_errand(self, node: NodeId, ask: ProbeRequest, now: float) -> list[Out]:
        subject = ask.subject
        if subject == self.me or not self.watch.indirect.accept(node, ask, now):
            return []
        ways: list[Out] = self._probe(subject, now) if subject in self.links else []
        if not self.prober.answering(subject) and (dial := self._dialer.try_once(subject)):
            ways.append(dial)
        if subject not in self.links and not ways:
            return [*self.watch.indirect.found(subject, alive=False)]
        return [*ways, SetTimer(after_s=ERRAND_S, token=ERRAND)]

    def _facts(self, node: NodeId, facts: Push, now: float) -> list[Out]:
        self._receiver.learning = not self.catch_up.done
        asked = self._sync.asked(node) if facts.asked else frozenset[bytes]()
        taken = self._receiver.take(node, facts, now, self.clock.now(now), asked)
        if taken.nothing and not facts.asked:
            return []  # most of what is flooded comes several times
        out = [*taken.out, *self._follow(taken, now)]
        for record in taken.own:
            out += self.publisher.on_own_record(record, self.clock.now(now))
        if taken.ids and (self.catch_up.done or not facts.asked):
            # What is asked for while catching up is news only to this node.
            eager_peers = self._dissemination.eager_peers(self._near.eager, self.links, node)
            out += self._dissemination.flood(taken.news, eager_peers)
        if facts.asked and self.recovery.is_reply(node):
            out += self.recovery.replied()
        elif facts.asked:
            out += self._sync.pulled(node, taken.seen, now, whole=taken.whole)
        return [*out, *self._write(now)]

    def _follow(self, taken: PushResult, now: float) -> list[Out]:
        """Return the effects of facts that were merged."""
        if taken.doubted:
            self.publisher.refute()
        if taken.ids:
            self._dissemination.learned(taken.ids, now)
        return self._learned(taken.owners, now)

    def _learned(self, owners: Collection[NodeId], now: float) -> list[Out]:
        """Facts of these owners changed."""
        if not owners:
            return []
        owners, before = frozenset(owners), self._removal.accused
        self.members.refresh(owners)
        self._removal.refresh(owners)
        accused = self._removal.accused
        self.healths.touch(owners | before | accused)
        if self.me in accused and self._removal.must_refute(self.clock.now(now)):
            self.publisher.refute()
        if self.members.moved or accused:
            return [StateChanged(owners=owners), *self._review_soon()]
        return [StateChanged(owners=owners)]

    # --- trust ------------------------------------------------------------------------------------

    def _declare(self, statements: Iterable[Statement], now: float) -> list[Out]:
        said = {one.id: one for one in statements}
        result = self.document.declare(said.values(), self.clock.now(now))
        self._dissemination.learned(result.ids, now)
        fresh = gather(said[item] for item in result.ids)
        flooded = self._dissemination.flood(fresh, self.links) if result else []
        return [*flooded, *self._learned(result.owners, now)]

    def _trust_changes(self) -> list[Out]:
        """Announce that other statements stand than before the event, if they do."""
        if self.document.trust is self._trust:
            return []
        self._trust = self.document.trust
        self._sync.retry()
        return [TrustChanged(), *self._review_soon()]

    # --- own records ------------------------------------------------------------------------------

    def _write(self, now: float) -> list[Out]:
        self.publisher.writing = self.recovery.done
        records = self.publisher.due(self.clock.now(now), len(self.members.live))
        if not records:
            return []
        self._dissemination.learned((record.digest for record in records), now)
        facts = Push(records=tuple(record.raw for record in records))
        return [*self._learned({self.me}, now), *self._dissemination.flood(facts, self.links)]
