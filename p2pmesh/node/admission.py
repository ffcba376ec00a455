"""Letting others into the mesh: the handlers of streams that ask for a credential.

The decisions are `state/admission.py`'s. Here are the streams, the counting on disk, and the ways
to the member that has to decide: an invitation with a limit is counted by the node that made it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog
import trio

from p2pmesh.config import NAME_CHARS_MAX, Address, parse_address
from p2pmesh.errors import LinkError, LocalError, MeshError, PeerError
from p2pmesh.gossip.buckets import Bucket, Buckets
from p2pmesh.home import Home
from p2pmesh.identity.credentials import CREDENTIAL_BYTES_MAX, Credential, Role, read_credential
from p2pmesh.identity.hello import (
    ANYBODY,
    JOIN,
    LAN,
    REASON_CHARS_MAX,
    STRANGER,
    Peer,
    RefusedError,
)
from p2pmesh.identity.keys import (
    PUBLIC_KEY_BYTES,
    SIGNATURE_BYTES,
    NodeId,
    show_id,
)
from p2pmesh.node.keystore import load_used, save_used
from p2pmesh.node.mesh import Mesh
from p2pmesh.node.roster import Seen
from p2pmesh.state.admission import (
    Applicant,
    Issuer,
    admit,
    invitation_of,
    may_redeem,
    redeem,
    renew,
)
from p2pmesh.transport.base import Handlers, Service, link_errors
from p2pmesh.transport.handshake import receive_frame, send_frame
from p2pmesh.wire.codec import decode, encode
from p2pmesh.wire.fields import as_map, take, take_exactly, take_rows
from p2pmesh.wire.statements import STATEMENT_BYTES_MAX, Invitation, Statement
from p2pmesh.wire.text import plain_text

REQUEST_BYTES_MAX = 1024
ANSWER_BYTES_MAX = CREDENTIAL_BYTES_MAX + STATEMENT_BYTES_MAX + 8192
REQUEST_TIMEOUT_S = 3.0  # a newcomer has all that it says ready
ANSWER_TIMEOUT_S = 8.0  # two hellos, when a request is passed on, and a disk that syncs
PASS_ON_TIMEOUT_S = 6.0  # leaves time to say that the other member does not answer
ADDRESSES_MAX = 16
AT_ONCE_MAX = 16  # newcomers, who are strangers still
LAN_PER_S, LAN_BURST = 64 / 3600, 64  # nodes that this one lets in from its network
LAN_PER_ADDRESS_PER_S, LAN_PER_ADDRESS_BURST = 4 / 3600, 4
GUESTS_MAX = 256  # nodes that use the mesh through this one, remembered for people
WAITING_MAX = 64  # newcomers that a person may let in
WAITING_S = 600.0  # after which one that asks no more is forgotten

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A newcomer on this network whom only a person may let in.

    Attributes:
        name: What it calls itself.
        host: The address that it asked from.
        at: When it last asked, by trio's clock.
    """

    node: NodeId
    name: str
    host: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer to a newcomer.

    Attributes:
        credential: What it may do from now on.
        policy: The statement with the rules of the mesh.
        addresses: Where members may be found; one that takes no part in the gossip has no others.
    """

    credential: Credential
    policy: bytes
    addresses: tuple[Address, ...]


class Admission:
    """Lets others into one mesh.

    Args:
        mesh: Which one.
        home: Where uses of invitations are counted.
        issuer: Returns who signs: this node and its credential.
        lan_refusal: Says why nobody may join from an address without an invitation; "" if they
            may.
    """

    def __init__(
        self,
        mesh: Mesh,
        home: Home,
        issuer: Callable[[], Issuer],
        lan_refusal: Callable[[str], Awaitable[str]],
    ) -> None:
        self._mesh, self._home, self._issuer = mesh, home, issuer
        self._lan_refusal = lan_refusal
        self._used = load_used(home)
        self._counting = trio.Lock()
        self._at_once = 0
        self._all_lan = Bucket(LAN_PER_S, LAN_BURST)
        self._lan: Buckets[str] = Buckets(LAN_PER_ADDRESS_PER_S, LAN_PER_ADDRESS_BURST)
        self._waiting: dict[NodeId, Waiting] = {}
        self._named: set[NodeId] = set()
        self._guests: dict[NodeId, Seen] = {}

    def handlers(self) -> Handlers:
        """The services that strangers may use."""
        return {JOIN: Service(self._join, ANYBODY), LAN: Service(self._join_lan, ANYBODY)}

    # --- people ---------------------------------------------------------------------------------

    @property
    def waiting(self) -> list[Waiting]:
        """The newcomers that only a person may let in, by name."""
        now = trio.current_time()
        self._waiting = {n: one for n, one in self._waiting.items() if now - one.at < WAITING_S}
        return sorted(self._waiting.values(), key=lambda one: (one.name, one.node))

    def wait_for(self, node: NodeId, name: str, host: str) -> None:
        """Note a newcomer on this network that a person may let in."""
        self._waiting.pop(node, None)
        self._waiting[node] = Waiting(
            node=node, name=name or show_id(node), host=host, at=trio.current_time()
        )
        if len(self._waiting) > WAITING_MAX:
            del self._waiting[next(iter(self._waiting))]
        self._mesh.changes.notify()

    def allow(self, node: NodeId) -> None:
        """Let a node in from this network that a person named."""
        self._named.add(node)

    @property
    def guests(self) -> dict[NodeId, Seen]:
        """Return the nodes that use the mesh through this one, by id."""
        return {n: one for n, one in self._guests.items() if not self._mesh.vouch(one.credential)}

    def uses(self, invitation: bytes) -> int:
        """Return how often an invitation that this node made was used."""
        return len(self._used.get(invitation, ()))

    # --- streams --------------------------------------------------------------------------------

    async def _join(self, peer: Peer, stream: trio.abc.Stream) -> None:
        """Answer who has an invitation, or a credential that should be renewed."""
        await self._serve(peer, stream, self._by_invitation)

    async def _join_lan(self, peer: Peer, stream: trio.abc.Stream) -> None:
        """Answer who asks because it is on this network; the transport has checked that it is."""
        await self._serve(peer, stream, self._by_network)

    async def _serve(
        self,
        peer: Peer,
        stream: trio.abc.Stream,
        decide: Callable[[Peer, dict[str, Any]], Awaitable[Credential]],
    ) -> None:
        if self._at_once >= AT_ONCE_MAX:
            busy = RefusedError("too many ask to join at this moment; ask again")
            await send_frame(stream, _no(busy))
            return
        self._at_once += 1
        try:
            with trio.fail_after(ANSWER_TIMEOUT_S):
                with trio.fail_after(REQUEST_TIMEOUT_S):
                    said = await receive_frame(stream, bytes_max=REQUEST_BYTES_MAX)
                fields = as_map(decode(said, bytes_max=REQUEST_BYTES_MAX), "a request to join")
                try:
                    credential = await decide(peer, fields)
                except RefusedError as exc:
                    log.info("not_admitted", node=show_id(peer.node), reason=str(exc))
                    await send_frame(stream, _no(exc))
                    return
                log.info("admitted", node=show_id(credential.node), role=credential.role.word)
                await send_frame(stream, self._yes(credential))
                await _farewell(stream)
        except trio.TooSlowError as exc:
            raise LinkError("a newcomer did not go on") from exc
        finally:
            self._at_once -= 1

    def _yes(self, credential: Credential) -> bytes:
        policy = self._mesh.trust.policy_statement
        return encode(
            {
                "c": credential.raw,
                "p": policy.raw if policy else b"",
                "a": [str(one) for one in self._addresses()],
            }
        )

    def _addresses(self) -> list[Address]:
        """The addresses of some members: of this node, and of others that answer now."""
        nodes = self._mesh.view.nodes
        near = [self._mesh.me, *sorted(self._mesh.linked)]
        found = [view.member.addresses[:1] for one in near if (view := nodes.get(one))]
        return [address for some in found for address in some][:ADDRESSES_MAX]

    # --- an invitation --------------------------------------------------------------------------

    async def _by_invitation(self, peer: Peer, fields: dict[str, Any]) -> Credential:
        if take(fields, "renew", bool, default=False):
            return self._renewed(peer, _name(fields))
        invitation = take_exactly(fields, "i", PUBLIC_KEY_BYTES)
        proof = take_exactly(fields, "s", SIGNATURE_BYTES)
        passed_on = "k" in fields
        if passed_on and (peer.credential is None or peer.credential.role < Role.SERVE):
            raise PeerError("a stranger that asks for another node")
        applicant = Applicant(
            key=take_exactly(fields, "k", PUBLIC_KEY_BYTES) if passed_on else peer.public,
            invitation=invitation,
            proof=proof,
            binding=take_exactly(fields, "b", len(peer.binding)) if passed_on else peer.binding,
        )
        statement = invitation_of(self._mesh.trust, applicant, mesh=peer.mesh, now=self._mesh.now)
        if may_redeem(self._issuer().own, statement):
            return await self._redeem(statement, applicant)
        if passed_on:
            raise RefusedError("this member may not let anybody in with that invitation", STRANGER)
        return await self._pass_on(statement, applicant)

    async def _redeem(self, statement: Statement, applicant: Applicant) -> Credential:
        invitation = statement.body
        assert isinstance(invitation, Invitation)
        async with self._counting:
            used = self._used.get(invitation.id, [])
            credential = redeem(
                self._issuer(),
                self._mesh.trust,
                statement,
                applicant,
                now=self._mesh.now,
                used=used,
            )
            if applicant.node not in used and invitation.uses:
                counted = {**self._used, invitation.id: [*used, applicant.node]}
                try:
                    await trio.to_thread.run_sync(partial(save_used, self._home, counted))
                except LocalError as exc:
                    log.warning("invitation_not_counted", reason=str(exc))
                    raise RefusedError("this member cannot write to its disk; ask another") from exc
                self._used = counted
        return credential

    async def _pass_on(self, statement: Statement, applicant: Applicant) -> Credential:
        """Ask a member that may decide."""
        failure = RefusedError(self._nobody(statement), STRANGER)
        request = encode(
            {
                "i": applicant.invitation,
                "s": applicant.proof,
                "k": applicant.key,
                "b": applicant.binding,
            }
        )
        for node in self._deciders(statement):
            try:
                with link_errors("the request was not passed on"):
                    with trio.fail_after(PASS_ON_TIMEOUT_S):
                        async with await self._mesh.open_stream(node, JOIN) as stream:
                            await send_frame(stream, request)
                            said = await receive_frame(stream, bytes_max=ANSWER_BYTES_MAX)
                return read_answer(said).credential
            except RefusedError:
                raise
            except MeshError as exc:
                log.info("admission_not_passed_on", node=show_id(node), reason=str(exc))
        raise failure

    def _deciders(self, statement: Statement) -> Iterator[NodeId]:
        """The members that may decide about an invitation, its maker first."""
        invitation = statement.body
        assert isinstance(invitation, Invitation)
        nodes = self._mesh.view.nodes
        if statement.owner in nodes and statement.owner != self._mesh.me:
            yield statement.owner
        if not invitation.uses:
            for node in sorted(self._mesh.linked - {statement.owner}):
                view = nodes.get(node)
                if view and view.credential and may_redeem(view.credential, statement):
                    yield node

    def _nobody(self, statement: Statement) -> str:
        name = self._mesh.names.get(statement.owner)
        who = f"{name}, which" if name else "the node that"
        return f"{who} made this invitation, is not reachable; try again when it is"

    def _renewed(self, peer: Peer, name: str) -> Credential:
        if peer.credential is None:
            raise RefusedError("there is no credential to renew", STRANGER)
        if peer.credential.role < Role.SERVE:
            self._note_guest(peer.node, Seen(name=name, credential=peer.credential))
        granted = self._mesh.trust.best_grant(peer.node, self._mesh.now)
        if granted is not None and granted.rank > peer.credential.rank:
            return granted
        fresh = renew(self._issuer(), self._mesh.trust, peer.credential, now=self._mesh.now)
        if fresh is not None:
            return fresh
        if peer.credential.role < Role.SERVE:
            return peer.credential  # it asks for addresses of members as well
        raise RefusedError("this member cannot renew that credential; ask another", STRANGER)

    def _note_guest(self, node: NodeId, guest: Seen) -> None:
        self._guests.pop(node, None)
        self._guests[node] = guest
        if len(self._guests) > GUESTS_MAX:
            del self._guests[next(iter(self._guests))]
        self._mesh.changes.notify()

    # --- the network around ---------------------------------------------------------------------

    async def _by_network(self, peer: Peer, fields: dict[str, Any]) -> Credential:
        name = _name(fields)
        named = peer.node in self._named
        if not named and (reason := await self._lan_refusal(peer.host)):
            raise RefusedError(reason, STRANGER)
        try:
            credential = admit(
                self._issuer(), self._mesh.trust, peer.public, now=self._mesh.now, named=named
            )
        except RefusedError:
            self.wait_for(peer.node, name, peer.host)
            raise
        if not named and not self._has_room(peer.host):
            raise RefusedError("too many joined from this network lately; ask for an invitation")
        self._waiting.pop(peer.node, None)
        self._named.discard(peer.node)
        return credential

    def _has_room(self, host: str) -> bool:
        """Whether one more may come in from an address; if so, it is counted."""
        now = trio.current_time()
        return self._lan.take(host, now) and self._all_lan.take(now)


async def ask_with(stream: trio.abc.Stream, request: dict[str, Any]) -> Answer:
    """Ask for a credential on a stream for `JOIN` or `LAN`.

    Raises:
        RefusedError: The answer is no.
        PeerError: It is none.
        LinkError: None came.
    """
    try:
        with trio.fail_after(ANSWER_TIMEOUT_S):
            await send_frame(stream, encode(request))
            return read_answer(await receive_frame(stream, bytes_max=ANSWER_BYTES_MAX))
    except trio.TooSlowError as exc:
        raise LinkError("the node there did not answer in time") from exc


def read_answer(said: bytes) -> Answer:
    """Read the answer to a request to join; raises as `ask_with`."""
    fields = as_map(decode(said, bytes_max=ANSWER_BYTES_MAX), "an answer to a request to join")
    if "no" in fields:
        reason = plain_text(take(fields, "no", str, size_max=REASON_CHARS_MAX), REASON_CHARS_MAX)
        raise RefusedError(reason or "it did not say why", take(fields, "why", str, default=""))
    return Answer(
        credential=read_credential(take(fields, "c", bytes, size_max=CREDENTIAL_BYTES_MAX)),
        policy=take(fields, "p", bytes, size_max=STATEMENT_BYTES_MAX),
        addresses=tuple(take_rows(fields, "a", _address, count_max=ADDRESSES_MAX)),
    )


def _address(row: Any) -> Address:
    try:
        return parse_address(row if isinstance(row, str) else "")
    except ValueError as exc:
        raise PeerError("invalid address") from exc


def _name(fields: dict[str, Any]) -> str:
    """What a newcomer calls itself."""
    said = take(fields, "name", str, size_max=REQUEST_BYTES_MAX, default="")
    return plain_text(said, NAME_CHARS_MAX)


def _no(exc: RefusedError) -> bytes:
    return encode({"no": str(exc)[:REASON_CHARS_MAX], "why": exc.why})


async def _farewell(stream: trio.abc.Stream) -> None:
    """Let the other side hang up first, so that it has read the answer."""
    with trio.move_on_after(1.0):
        try:
            await stream.receive_some(1)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            log.debug("newcomer_hung_up")
