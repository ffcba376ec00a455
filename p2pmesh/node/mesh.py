"""The trio shell around the gossip core: it feeds events in, does what comes out, and tells.

No protocol decision is made here. Everybody else in the node reads `view` and `health` and waits
on `changes`; the only way to say something to the mesh is `publish`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog
import trio

from p2pmesh.config import Address
from p2pmesh.errors import LinkError, LocalError
from p2pmesh.gossip.events import (
    Declare,
    Dial,
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
    TrustChanged,
    TwinFound,
    UseCredential,
)
from p2pmesh.gossip.membership import Gossip
from p2pmesh.identity.credentials import Credential
from p2pmesh.identity.hello import CLOCK_SKEW_S_MAX, GOSSIP, Peer, Purpose
from p2pmesh.identity.keys import NodeId, show_id
from p2pmesh.node.clocks import check_clock
from p2pmesh.node.reaching import open_first
from p2pmesh.state.admission import fault
from p2pmesh.state.owner_records import EXPIRY_GRACE_S
from p2pmesh.state.trust import Trust
from p2pmesh.state.views import MeshReader, MeshView
from p2pmesh.transport.base import Handlers, Transport
from p2pmesh.transport.links import Links
from p2pmesh.watchable import Watchable
from p2pmesh.wire.messages import Message
from p2pmesh.wire.statements import Statement

SETTLE_MAX_S = 3.0  # nobody answered, or there is very much to learn: it acts on what it knows
JUST_STARTED_S = 30.0  # who was answered by nobody for so long need not ask who has the right time
REVOKED_GRACE_S = 1.0
CREDENTIALS_INTERVAL_S = 60.0  # between looks for peers whose credential ran out while connected
CLOCKS_WAIT_S = 2.0  # after the first link, for what more peers say of the time

log = structlog.get_logger(__name__)


def _forget(_statements: Collection[Statement]) -> None:
    """Keep no statements, in a mesh that asks for no credentials."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanAgreement:
    """How many linked nodes have this node's plan."""

    same: int
    asked: int


class Mesh:
    """One node's access to the mesh.

    Args:
        core: The gossip core, not yet started.
        transport: Where links come from.
        save_epoch: Writes an epoch to disk, durably.
        clock: Unix time in seconds; never goes back.
        save_statements: Writes the statements of trust to disk.
        credential: This node's; None in a mesh that asks for none.
        changes: Notified of each change; None for one of its own.
    """

    def __init__(
        self,
        core: Gossip,
        transport: Transport,
        *,
        save_epoch: Callable[[int], None],
        clock: Callable[[], float],
        save_statements: Callable[[Collection[Statement]], None] = _forget,
        credential: Credential | None = None,
        changes: Watchable | None = None,
    ) -> None:
        self.me = core.me
        self.changes = Watchable() if changes is None else changes
        self.settled = trio.Event()
        self.unsaved = ""  # why what was last decided about members is not on this disk
        self.refusal = ""  # what a peer last said that takes this node for no member any more
        self._core = core
        self._transport = transport
        self._links = Links(transport, core.me, self)
        self._save_epoch = save_epoch
        self._clock = clock
        self._save_statements, self._credential = save_statements, credential
        self._reader = MeshReader(core.document, core.me)
        self._seen = self._glance()
        # Who founds a mesh knows from the start all that there is, the time too.
        self._clocks: dict[NodeId, int] | None = {} if core.rejoining else None
        self._suspected: dict[NodeId, trio.Event] = {}
        self._nursery: trio.Nursery | None = None
        self._early: list[Publish] = []
        self._failure: LocalError | None = None
        self._failed = trio.Event()
        self._finishing = False

    # --- what the rest of the node sees ---------------------------------------------------------

    @property
    def view(self) -> MeshView:
        """Return the view of the records; a new one after each change."""
        return self._reader.view

    @property
    def linked(self) -> frozenset[NodeId]:
        """The nodes with a gossip link."""
        return self._core.linked

    @property
    def dead(self) -> frozenset[NodeId]:
        """The nodes that placement does without: by the records, so alike everywhere."""
        return self._core.out_of_placement(self._clock()).intersection(self.view.nodes)

    @property
    def catching_up(self) -> bool:
        """Whether this node was away or is new, and may not know yet what the others do."""
        return self._core.rejoining

    @property
    def agreement(self) -> PlanAgreement:
        """How many of the linked nodes said that they have the same plan."""
        plans = [self._core.plans.get(node) for node in self._core.linked]
        return PlanAgreement(same=plans.count(self._core.plan), asked=len(plans))

    def health(self, node: NodeId) -> Health:
        """Return this node's own view of `node`; it sees itself live."""
        return Health.LIVE if node == self.me else self._core.health(node)

    def rtt_s(self, node: NodeId) -> float | None:
        """Round-trip time of probes, None while there was none."""
        return self._core.rtt_s(node)

    def suspected(self, node: NodeId) -> trio.Event:
        """Set once `node` does not answer; a node that is trusted again gets a new one."""
        event = self._suspected.get(node)
        if event is None or (event.is_set() and self.health(node) is Health.LIVE):
            event = self._suspected[node] = trio.Event()
        if self.health(node) is not Health.LIVE:
            event.set()
        return event

    @property
    def book(self) -> Mapping[NodeId, tuple[Address, ...]]:
        """Return the last known addresses of others; kept beyond leases, as nodes may come back."""
        return self._core.book

    def publish(self, register: str, body: Mapping[str, Any] | None) -> None:
        """Say what one of this node's registers holds now; None withdraws it.

        What is published before `run` is said as soon as it runs.
        """
        said = Publish(register=register, body=None if body is None else dict(body))
        if self._nursery is None:
            self._early.append(said)
        else:
            self._feed(said)

    # --- trust ----------------------------------------------------------------------------------

    @property
    def trust(self) -> Trust:
        """What the statements of trust come to; another object after each change."""
        return self._core.document.trust

    @property
    def statements(self) -> tuple[Statement, ...]:
        """All statements of trust that stand, sorted by id."""
        return self._core.document.statements

    @property
    def credential(self) -> Credential | None:
        """Return what this node may do; None in a mesh that asks for no credentials."""
        return self._credential

    @property
    def now(self) -> float:
        """Mesh time in seconds."""
        return self._core.mesh_now(self._clock())

    @property
    def names(self) -> dict[NodeId, str]:
        """Return what people call the members."""
        return {node: view.member.name for node, view in self.view.nodes.items()}

    def vouch(self, credential: Credential) -> str:
        """Say why a credential is not good in this mesh any more; "" if it is."""
        return fault(self.trust, credential, self.names)

    def declare(self, *statements: Statement) -> None:
        """Make statements of trust, on this disk and in the whole mesh, one with the other."""
        self._feed(Declare(statements=statements))

    def use(self, credential: Credential) -> None:
        """Have this node's records carry another credential from now on."""
        self._credential = credential
        self._feed(UseCredential(credential=credential))

    def _heed_trust(self) -> None:
        """Keep the statements, and part with those whose credential they void."""
        self._keep_statements()
        if self._is_revoked and self._nursery is not None:
            self._nursery.start_soon(self._end_if_revoked)
        self._part_with_others()

    def _keep_statements(self) -> None:
        try:
            self._save_statements(self._core.document.statements)
        except LocalError as exc:
            # Whoever was revoked stays out while this node runs; after a restart others say so.
            log.warning("statements_not_saved", reason=str(exc))
            self.unsaved = str(exc)
        else:
            self.unsaved = ""

    async def _watch_credentials(self) -> None:
        while True:
            await trio.sleep(CREDENTIALS_INTERVAL_S)
            if self.unsaved:
                self._keep_statements()
                self.changes.notify()
            self._part_with_others()

    def _part_with_others(self) -> None:
        """End the connections of peers that showed a credential which is good no more."""
        # A link ends a moment later, when the peer has heard why.
        self._transport.cut_off(lambda peer: peer.purpose == GOSSIP or self._is_good(peer))
        for node in self._links.of(lambda peer: not self._is_good(peer)):
            log.info("peer_no_member", node=show_id(node))
            self._links.dismiss(node)

    @property
    def _is_revoked(self) -> bool:
        return self._credential is not None and bool(self.vouch(self._credential))

    async def _end_if_revoked(self) -> None:
        # A lower role comes as a revocation and a grant, which may arrive one after the other.
        await trio.sleep(REVOKED_GRACE_S)
        if self._is_revoked:
            assert self._credential is not None
            self._fail(LocalError(self.vouch(self._credential)))

    def _is_good(self, peer: Peer) -> bool:
        own = peer.credential
        if own is None:
            return True
        # Who has a newer one by now shows it on a new connection.
        return self.now < own.expires_at + EXPIRY_GRACE_S and not self.vouch(own)

    def set_plan(self, digest: bytes) -> None:
        """Say in probes which plan this node computed, and here that it is a new one."""
        self._core.plan = digest
        self.changes.notify()  # with an equal digest too: the reasons in it may be others

    async def open_stream(self, node: NodeId, purpose: Purpose) -> trio.abc.Stream:
        """Open a byte stream to the handler that `node` has for `purpose`.

        Raises:
            LinkError: It cannot be reached at any of its addresses.
            PeerError: What answers there is not that node, or does not offer `purpose`.
        """
        view = self.view.nodes.get(node)
        addresses = view.member.addresses if view else ()
        if not addresses:
            raise LinkError(f"{show_id(node)} has no address")
        open_at = partial(self._transport.open_stream, purpose=purpose, expected=node)
        return await open_first(addresses, open_at)

    # --- running --------------------------------------------------------------------------------

    async def run(
        self,
        handlers: Handlers,
        *,
        task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Take part until cancelled.

        Args:
            handlers: What other nodes may open streams for, and who serves them.
            task_status: Told once others can reach this node.

        Raises:
            LocalError: Another node runs with this one's key, the disk failed, or at the start
                the others say that this machine's clock is wrong.
        """
        if self._is_revoked:
            assert self._credential is not None
            raise LocalError(self.vouch(self._credential))
        async with trio.open_nursery() as nursery:
            await nursery.start(self._links.run, handlers)
            self._nursery = nursery
            self._do(self._core.start(self._clock()))
            for said in self._early:
                self._feed(said)
            nursery.start_soon(self._settle)
            nursery.start_soon(self._compare_clocks)
            nursery.start_soon(self._watch_credentials)
            task_status.started()
            await self._failed.wait()
            nursery.cancel_scope.cancel()
        assert self._failure is not None
        raise self._failure

    async def finish(self, deadline_s: float) -> None:
        """Send what is queued (a goodbye, say) and close all links; no new ones are dialled."""
        self._finishing = True
        await self._links.finish(deadline_s)

    async def _settle(self) -> None:
        with trio.move_on_after(SETTLE_MAX_S):
            while self._core.rejoining or not self._core.joined:
                await self.changes.wait(self.changes.count)
        self.settled.set()

    async def _compare_clocks(self) -> None:
        """A newcomer whose clock the others say is wrong gives way; who was here before does not.

        Those who come later are judged by their own start, however many they are.
        """
        with trio.move_on_after(JUST_STARTED_S):
            while not self._core.linked:
                await self.changes.wait(self.changes.count)
            await trio.sleep(CLOCKS_WAIT_S)
        clocks, self._clocks = self._clocks, None
        try:
            check_clock(list((clocks or {}).values()))
        except LocalError as exc:
            self._fail(exc)

    # --- events from the links ------------------------------------------------------------------

    def link_up(self, peer: Peer) -> None:
        """See `LinkEvents`."""
        self.refusal = ""
        if abs(peer.clock_ahead_s) > CLOCK_SKEW_S_MAX:
            log.warning("clock_differs", node=show_id(peer.node), ahead_s=peer.clock_ahead_s)
        if self._clocks is not None:
            self._clocks[peer.node] = peer.clock_ahead_s
        self._feed(LinkUp(node=peer.node, version=peer.version))

    def link_down(self, node: NodeId) -> None:
        """See `LinkEvents`."""
        self._feed(LinkDown(node=node))

    def refused(self, sentence: str) -> None:
        """See `LinkEvents`."""
        if sentence != self.refusal:
            log.warning("refused_by_peer", reason=sentence)
            self.refusal = sentence
            self.changes.notify()

    def message_received(self, node: NodeId, message: Message) -> None:
        """See `LinkEvents`."""
        self._feed(Received(node=node, message=message))

    def dial_failed(self, node: NodeId | None, *, nobody_there: bool) -> None:
        """See `LinkEvents`."""
        self._feed(DialFailed(node=node, nobody_there=nobody_there))

    # --- the core -------------------------------------------------------------------------------

    def _feed(self, event: Event) -> None:
        try:
            self._do(self._core.handle(event, self._clock()))
        except LocalError as exc:
            self._fail(exc)
        if (seen := self._glance()) != self._seen:
            self._seen = seen
            self.changes.notify()

    def _glance(self) -> tuple[object, ...]:
        """Return the values that others read here and no event of the core announces."""
        core = self._core
        out = core.out_of_placement(self._clock())
        return core.linked, out, core.rejoining, self.agreement

    def _fail(self, failure: LocalError) -> None:
        # Events come in the tasks of links, where an error would only end that link.
        self._failure = failure
        self._failed.set()

    def _do(self, outs: list[Out]) -> None:
        for out in outs:
            match out:
                case Send(node=node, message=message):
                    self._links.send(node, message)
                case SetTimer(after_s=after_s, token=token):
                    assert self._nursery is not None
                    self._nursery.start_soon(self._timer, after_s, token)
                case Dial(node=node, addresses=addresses):
                    if not self._finishing:
                        self._links.dial(node, addresses)
                case Disconnect():
                    self._disconnect(out)
                case StateChanged(owners=owners):
                    self._learn(owners)
                case TrustChanged():
                    self._heed_trust()
                    self.changes.notify()
                case HealthChanged(node=node, health=health):
                    log.info("health_changed", node=show_id(node), health=health.value)
                    self.suspected(node)  # sets the event of those who wait, if it is suspect
                    self.changes.notify()
                case PersistEpoch(epoch=epoch):
                    self._save_epoch(epoch)
                case Rejected(node=node, reason=reason):
                    log.warning("record_rejected", node=show_id(node), reason=reason)
                case TwinFound():
                    raise LocalError(
                        "Another node is running with this node's key; "
                        "give each its own --home instead of a copy"
                    )

    def _disconnect(self, out: Disconnect) -> None:
        if out.hostile:
            self._links.cut_off(out.node, out.reason)
        else:
            log.info("peer_disconnected", node=show_id(out.node), reason=out.reason)
            self._links.close(out.node)

    def _learn(self, owners: Collection[NodeId]) -> None:
        """Read these owners again; a lease that was only renewed wakes nobody."""
        if self._reader.update(owners):
            self.changes.notify()

    async def _timer(self, after_s: float, token: str) -> None:
        await trio.sleep(after_s)
        self._feed(TimerFired(token=token))
