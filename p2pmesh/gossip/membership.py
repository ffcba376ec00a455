"""The gossip core of one node: what it publishes, believes, passes on, probes and dials.

Pure: `handle(event, now) -> list[Out]`, where `now` is mesh time in seconds and the shell does
what comes out, in that order. In this version every node keeps a link to every other, new records
are flooded over all of them, and whether a node is alive is what each node sees itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from p2pmesh.config import Address
from p2pmesh.errors import PeerError
from p2pmesh.gossip.dialling import Dialling
from p2pmesh.gossip.events import (
    DialFailed,
    Disconnect,
    Event,
    Health,
    HealthChanged,
    LinkDown,
    LinkUp,
    Out,
    PersistEpoch,
    Publish,
    Received,
    Rejected,
    Send,
    SetTimer,
    StateChanged,
    TimerFired,
    TwinFound,
)
from p2pmesh.gossip.probe import PROBE_INTERVAL_S, PROBE_TIMEOUT_S, Prober
from p2pmesh.gossip.sync import Sync
from p2pmesh.identity.keys import MeshId, NodeId, SigningKey
from p2pmesh.state.bodies import MEMBER, WANTS
from p2pmesh.state.document import EPOCH_AHEAD_S_MAX, Document, Verdict
from p2pmesh.wire.messages import (
    PLAN_DIGEST_BYTES,
    Answer,
    Probe,
    Records,
    Summary,
    Unknown,
    decode_message,
    encode_message,
)
from p2pmesh.wire.records import TTL_S_MAX, Record, RecordCheck, seal

LEASE_REFRESH_S = 60
LEASE_TTL_S = 4 * LEASE_REFRESH_S
WANTS_TTL_S = 7 * 86400
WANTS_REFRESH_S = 86400
PAUSE_S = 3.0  # a tick so late means that this machine slept: nobody else is to blame
LAG_S = 0.25  # a time-out so late says more about this node than about the others
TWIN_SLACK_S = 5  # clocks of two machines with one key may differ by that much

TICK, TIMEOUT = "tick", "timeout"


class Gossip:
    """One node's part in the gossip.

    Args:
        key: Signs this node's records.
        mesh: Which mesh it is about.
        instance: Random per start.
        epoch: Already on disk, larger than any used before.
        seeds: Addresses that the user named.
        book: Addresses of nodes known from earlier.
        check: How records of others are checked.
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
        check: RecordCheck | None = None,
    ) -> None:
        self.me = NodeId(key.id)
        self.document = Document(mesh)
        self.prober = Prober()
        self.plans: dict[NodeId, bytes] = {}
        self.plan = bytes(PLAN_DIGEST_BYTES)
        self._key, self._mesh = key, mesh
        self._check = check or RecordCheck()
        self._instance, self._epoch, self._seq = instance, epoch, 0
        self._started_at: float | None = None
        self._ticked_at = 0.0
        self._timeout_due = 0.0
        self._own: dict[str, dict[str, Any]] = {}
        self._links: set[NodeId] = set()
        self._sync = Sync(self.document)
        self._dialling = Dialling(self.me, seeds, book or {})

    @property
    def linked(self) -> frozenset[NodeId]:
        """The nodes with a link."""
        return frozenset(self._links)

    def start(self, now: float) -> list[Out]:
        """Begin: dial, probe, and keep this node's lease."""
        self._started_at = self._ticked_at = now
        return [SetTimer(after_s=PROBE_INTERVAL_S, token=TICK), *self._dial(now)]

    def handle(self, event: Event, now: float) -> list[Out]:
        """What follows from `event`.

        Args:
            event: What happened.
            now: Mesh time in seconds; never goes back.
        """
        match event:
            case Received(node=node, message=message):
                return self._received(node, message, now)
            case TimerFired(token=token):
                return self._timer(token, now)
            case LinkUp(node=node):
                return self._link_up(node, now)
            case LinkDown(node=node):
                return self._link_down(node, now)
            case DialFailed(node=node, nobody_there=nobody_there):
                return self._dial_failed(node, now, nobody_there=nobody_there)
            case Publish(register=register, body=body):
                return self._publish(register, body, now)

    # --- links --------------------------------------------------------------------------------

    def _link_up(self, node: NodeId, now: float) -> list[Out]:
        self._links.add(node)
        before = self.prober.health(node)
        after = self.prober.link_up(node, now)
        self._dialling.linked(node, now)
        return [*_change(node, before, after), *self._sync.link_up(node)]

    def _link_down(self, node: NodeId, now: float) -> list[Out]:
        self._links.discard(node)
        self.plans.pop(node, None)
        self._sync.link_down(node)
        self._dialling.lost(node, now)
        before = self.prober.health(node)
        after = self.prober.link_down(node)
        return [*_change(node, before, after), *self._dial(now)]

    def _dial_failed(self, node: NodeId | None, now: float, *, nobody_there: bool) -> list[Out]:
        self._dialling.failed(node, now)
        if node is None or not nobody_there:
            return []
        before = self.prober.health(node)
        return _change(node, before, self.prober.nobody_there(node))

    def _dial(self, now: float) -> list[Out]:
        return list(self._dialling.due(self.document, self._links, now))

    # --- time ---------------------------------------------------------------------------------

    def _timer(self, token: str, now: float) -> list[Out]:
        if token == TICK:
            return self._tick(now)
        if token == TIMEOUT and now >= self._timeout_due:
            return self._timeout(now)
        return []

    def _tick(self, now: float) -> list[Out]:
        out: list[Out] = [SetTimer(after_s=PROBE_INTERVAL_S, token=TICK)]
        if now - self._ticked_at > PAUSE_S:
            self.prober.forgive(now)
        self._ticked_at = now
        if touched := self.document.expire(now):
            out.append(StateChanged(owners=touched))
            self.prober.forget_except(self.document.owners)
        for register in sorted(self._own):
            if self._needs_refresh(register, now):
                out += self._issue(register, now)
        probed = False
        for node in sorted(self._links):
            if (question := self.prober.ask(node, now)) is not None:
                out.append(self._say(node, Probe, question, now))
                probed = True
        if probed:
            self._timeout_due = now + PROBE_TIMEOUT_S
            out.append(SetTimer(after_s=PROBE_TIMEOUT_S, token=TIMEOUT))
        return [*out, *self._misses(now), *self._dial(now)]

    def _timeout(self, now: float) -> list[Out]:
        if now - self._timeout_due > LAG_S:
            # Answers may lie unread in this node's own queues: read them first.
            self._timeout_due = now + PROBE_TIMEOUT_S
            return [SetTimer(after_s=PROBE_TIMEOUT_S, token=TIMEOUT)]
        return self._misses(now)

    def _misses(self, now: float) -> list[Out]:
        out: list[Out] = []
        for node, health in self.prober.missed(now):
            out.append(HealthChanged(node=node, health=health))
            if health is Health.DEAD and node in self._links:
                out.append(Disconnect(node=node, reason="it does not answer"))
        return out

    # --- own records --------------------------------------------------------------------------

    def _publish(self, register: str, body: dict[str, Any] | None, now: float) -> list[Out]:
        if body is None:
            if self._own.pop(register, None) is None:
                return []
            return self._issue(register, now, body={})
        if self._own.get(register) == body:
            return []
        self._own[register] = body
        return self._issue(register, now)

    def _needs_refresh(self, register: str, now: float) -> bool:
        record = self.document.get(self.me, register)
        every_s = {MEMBER: LEASE_REFRESH_S, WANTS: WANTS_REFRESH_S}.get(register, TTL_S_MAX // 2)
        return record is None or now - record.issued_at >= every_s

    def _issue(self, register: str, now: float, *, body: dict[str, Any] | None = None) -> list[Out]:
        self._seq += 1
        record = seal(
            self._key,
            mesh=self._mesh,
            register=register,
            epoch=self._epoch,
            seq=self._seq,
            instance=self._instance,
            issued_at=int(now),
            ttl_s={MEMBER: LEASE_TTL_S, WANTS: WANTS_TTL_S}.get(register, TTL_S_MAX),
            body=self._own[register] if body is None else body,
        )
        merged = self.document.merge(record, now)
        assert merged, "a node's own newest record always stands"
        return [StateChanged(owners=frozenset({self.me})), *self._flood([record.raw], None)]

    def _outrank(self, record: Record, now: float) -> list[Out]:
        """Somebody holds a record with this node's key that it did not write in this life."""
        assert self._started_at is not None
        # Any register tells: what follows here voids the others that came along with this one.
        alive = record.issued_at > self._started_at + TWIN_SLACK_S
        if alive and self._instance > record.instance:
            return [TwinFound()]
        if record.epoch >= now + EPOCH_AHEAD_S_MAX - 1:
            return []  # nobody would believe a higher one yet; it comes up again
        self._epoch = max(self._epoch, record.epoch) + 1
        self._seq = 0
        out: list[Out] = [PersistEpoch(epoch=self._epoch)]
        for register in sorted(self._own):
            out += self._issue(register, now)
        return out

    # --- messages -----------------------------------------------------------------------------

    def _received(self, node: NodeId, message: bytes, now: float) -> list[Out]:
        before = self.prober.health(node)
        out: list[Out] = _change(node, before, self.prober.heard(node, now))
        try:
            decoded = decode_message(message)
        except PeerError as exc:
            return [*out, Disconnect(node=node, reason=str(exc))]
        match decoded:
            case Records(records=records):
                return [*out, *self._records(node, records, now)]
            case Summary():
                return [*out, *self._sync.answer(node, decoded)]
            case Probe(token=token):
                out.append(self._say(node, Answer, token, now))
            case Answer(token=token):
                self.prober.answered(node, token, now)
            case Unknown():
                return out
        self.plans[node] = decoded.plan
        return [*out, *self._sync.compare(node, decoded.fingerprint)]

    def _records(self, node: NodeId, records: tuple[bytes, ...], now: float) -> list[Out]:
        out: list[Out] = []
        news: list[bytes] = []
        owners: set[NodeId] = set()
        for raw in records:
            try:
                record = self._check.parse(raw)
            except PeerError as exc:
                out.append(Disconnect(node=node, reason=str(exc)))
                break  # what came before it in the message stands
            verdict = self.document.judge(record, now)
            if verdict is Verdict.REFUSED:
                out.append(Rejected(node=node, reason="its owner has more than anybody may"))
            if verdict is not Verdict.NEWS:
                continue
            if not self._check.verify(record):
                out.append(Disconnect(node=node, reason="a record that its owner did not sign"))
                break
            if record.owner == self.me:
                out += self._outrank(record, now)
                continue
            if self.document.merge(record, now):
                news.append(raw)
                owners.add(record.owner)
        if owners:
            out.append(StateChanged(owners=frozenset(owners)))
        return [*out, *self._flood(news, node), *self._dial(now)]

    def _flood(self, records: list[bytes], source: NodeId | None) -> list[Out]:
        if not records:
            return []
        message = encode_message(Records(records=tuple(records)))
        return [Send(node=n, message=message) for n in sorted(self._links) if n != source]

    def _say(self, node: NodeId, kind: type[Probe | Answer], token: int, now: float) -> Send:
        message = kind(
            token=token,
            fingerprint=self.document.fingerprint,
            plan=self.plan,
            sent_at_ms=int(now * 1000),
        )
        return Send(node=node, message=encode_message(message))


def _change(node: NodeId, before: Health, after: Health) -> list[Out]:
    return [] if before is after else [HealthChanged(node=node, health=after)]
