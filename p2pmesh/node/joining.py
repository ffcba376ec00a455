"""How this node gets into a mesh: by an invitation, by an address, or over its network."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace

import structlog
import trio

from p2pmesh.config import Address, Settings
from p2pmesh.errors import LinkError, LocalError, PeerError
from p2pmesh.home import Home
from p2pmesh.identity.credentials import is_signed
from p2pmesh.identity.hello import (
    CLOCK_SKEW_S_MAX,
    JOIN,
    LAN,
    OVER,
    UNNAMED,
    LocalIdentity,
    Peer,
    Purpose,
    RefusedError,
)
from p2pmesh.identity.keys import MeshId
from p2pmesh.identity.tokens import Token, prove
from p2pmesh.node.admission import Answer, ask_with
from p2pmesh.node.clocks import check_clock
from p2pmesh.node.keystore import (
    MeshInfo,
    forget_mesh,
    load_mesh,
    load_statements,
    save_mesh,
    save_statements,
)
from p2pmesh.state.trust import Trust
from p2pmesh.transport.base import Asked
from p2pmesh.wire.statements import Policy, Statement, parse_statement, verify_statement

JOIN_WAIT_S = 5.0  # the node to join may be starting at the same moment
JOIN_RETRY_S = 0.25
IDENTIFY_TIMEOUT_S = 2.0  # a web server on the way to it answers within a round trip
IDENTIFY_BYTES_MAX = 16 * 1024  # the first models of a node's API name their owner
TLS_RECORD_TYPES = range(20, 25)  # RFC 8446 §5.1: how the first byte of a peer port looks
DEFAULT_PEER_PORT = Settings().peer.port

# A node's API answers with models that it owns; anything else with some status.
_QUESTION = "GET /v1/models HTTP/1.1\r\nConnection: close\r\n"

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """The ways in which a node without a mesh reaches others; a transport's methods.

    Attributes:
        introduce: See `Transport.introduce`.
        ask: See `Transport.ask`.
        identify: Says what answers at an address that is no peer port.
    """

    introduce: Callable[[Address], Awaitable[Peer]]
    ask: Callable[[Address, Purpose, LocalIdentity], Awaitable[Asked]]
    identify: Callable[[Address], Awaitable[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A mesh to take part in.

    Attributes:
        seeds: Where members of it may be found.
        is_new: Whether this node founded it now, or joined it over its network.
    """

    card: MeshInfo
    seeds: tuple[Address, ...] = ()
    is_new: bool = False


async def what_answers(address: Address) -> str:
    """Return a sentence about what listens at an address, if it is no peer port; else "".

    Asked as an HTTP client would ask: a peer port hangs up or sends an alert of TLS.
    """
    answer = b""
    with trio.move_on_after(IDENTIFY_TIMEOUT_S):
        try:
            async with await trio.open_tcp_stream(address.host, address.port) as stream:
                await stream.send_all(f"{_QUESTION}Host: {address}\r\n\r\n".encode())
                while len(answer) < IDENTIFY_BYTES_MAX and (chunk := await stream.receive_some()):
                    answer += chunk
        except (OSError, trio.BrokenResourceError) as exc:
            log.info("stranger_unidentified", address=str(address), reason=str(exc))
    if answer.startswith(b"HTTP/"):
        whose = "the API of a node" if b'"p2pmesh"' in answer else "a web server"
        return (
            f"{address} is {whose} and no peer port; that of a node is {DEFAULT_PEER_PORT} unless "
            "it was chosen otherwise"
        )
    if answer and answer[0] not in TLS_RECORD_TYPES:
        return f"another program answers at {address}, not a p2pmesh node"
    return ""


class Joiner:
    """Gets this node into meshes, and remembers the last one.

    Args:
        home: Where it is remembered.
        me: This node, without a mesh.
        name: What people call this node.
        door: How others are reached.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        home: Home,
        me: LocalIdentity,
        name: str,
        door: Door,
        clock: Callable[[], float],
    ) -> None:
        self._home, self._me, self._name, self._door = home, me, name, door
        self._clock = clock

    def earlier(self) -> MeshInfo | None:
        """Return the mesh in which this node was last.

        Raises:
            LocalError: What was remembered is damaged.
        """
        card = load_mesh(self._home)
        if card is None or card.credential.node != self._me.key.id:
            return None  # the key was replaced: this is another node
        return card

    def is_usable(self, card: MeshInfo) -> bool:
        """Whether this node's membership in a mesh has neither run out nor, as it knows, ended.

        Raises:
            LocalError: The statements of that mesh are damaged.
        """
        own = card.credential
        return self._clock() < own.expires_at and Trust(
            load_statements(self._home, card.id)
        ).allows(own)

    async def by_name(
        self, wanted: Iterable[Address | Token], note: Callable[[str], None]
    ) -> Entry:
        """Get into the mesh that the user named, by invitations or addresses of its members.

        Args:
            wanted: Any one that leads somewhere will do.
            note: Told in a sentence when it becomes another mesh than the one to join.

        Raises:
            LocalError: None leads anywhere, and there is no earlier mesh to wait for; or this
                machine's clock is wrong.
        """
        ways = tuple(wanted)
        tokens = [one for one in ways if isinstance(one, Token)]
        addresses = tuple(one for one in ways if isinstance(one, Address))
        earlier = self.earlier()
        usable = earlier if earlier and self.is_usable(earlier) else None
        for token in tokens:
            if usable is None or token.mesh != usable.id:
                continue
            if not await self._is_refused(usable, token.addresses):
                return Entry(card=usable, seeds=(*token.addresses, *addresses))
            usable = None
        try:
            if tokens:
                return await self._first(tokens)
            return await self._at(addresses, usable)
        except _UnansweredError as exc:
            if usable is None:
                raise
            log.warning("join_unanswered", ways=len(ways))
            note(f"{exc}. Going on in the mesh {usable.name}, as before")
            return Entry(card=usable, seeds=addresses)

    async def redeem(self, token: Token) -> Entry:
        """Become a member by an invitation, and remember it.

        Raises:
            LocalError: None of its addresses answers, or the answer is no.
        """

        async def attempt(address: Address) -> Entry:
            asked = await self._door.ask(address, JOIN, self._as_newcomer(token.mesh))
            async with asked.stream:
                await self._check_clock(asked.peer, ())
                proof = prove(token, node=self._me.key.public, binding=asked.peer.binding)
                request = {"name": self._name, "i": token.key.public, "s": proof}
                answer = await ask_with(asked.stream, request)
            return self._enter(asked.peer, answer, (address, *token.addresses))

        return await self._try(token.addresses, attempt, JOIN_WAIT_S)

    async def over_network(self, mesh: MeshId, addresses: Iterable[Address]) -> Entry:
        """Become a member of an open mesh over the network that this node is on.

        Raises:
            LocalError: Nobody answers, or the answer is no.
        """

        async def attempt(address: Address) -> Entry:
            asked = await self._door.ask(address, LAN, self._as_newcomer(mesh))
            async with asked.stream:
                answer = await ask_with(asked.stream, {"name": self._name})
            return replace(self._enter(asked.peer, answer, (address,)), is_new=True)

        return await self._try(tuple(addresses), attempt, 0.0)

    # --- inside ---------------------------------------------------------------------------------

    async def _first(self, tokens: Iterable[Token]) -> Entry:
        failure: LocalError | None = None
        for token in tokens:
            try:
                return await self.redeem(token)
            except LocalError as exc:
                failure = exc
        assert failure is not None, "there is a token"
        raise failure

    async def _at(self, addresses: tuple[Address, ...], usable: MeshInfo | None) -> Entry:
        """Find a mesh by addresses of its members: this node's own, or one to join."""

        async def attempt(address: Address) -> Entry:
            peer = await self._door.introduce(address)
            await self._check_clock(peer, [one for one in addresses if one != address])
            if usable is None or peer.mesh != usable.id:
                return await self.over_network(peer.mesh, [address])
            return Entry(card=usable, seeds=addresses)

        return await self._try(addresses, attempt, JOIN_WAIT_S)

    async def _try(
        self,
        addresses: tuple[Address, ...],
        attempt: Callable[[Address], Awaitable[Entry]],
        wait_s: float,
    ) -> Entry:
        """Return what the first address leads to; one that never will is asked once."""
        said: dict[Address, str] = {}
        hopeless: set[Address] = set()
        refused: RefusedError | None = None
        deadline = trio.current_time() + wait_s
        while True:
            for address in [one for one in addresses if one not in hopeless]:
                try:
                    return await attempt(address)
                except RefusedError as exc:
                    said[address], refused = f"{address}: {exc}", exc
                    hopeless.add(address)
                except (LinkError, PeerError) as exc:
                    stranger = "" if address in said else await self._door.identify(address)
                    said[address] = stranger or str(exc)
                    if stranger:
                        hopeless.add(address)
            if trio.current_time() >= deadline or hopeless.issuperset(addresses):
                break
            await trio.sleep(JOIN_RETRY_S)
        reasons = [said[address] for address in addresses]
        if refused is not None:
            raise LocalError("Cannot join: " + "; ".join(dict.fromkeys(reasons)))
        raise _UnansweredError(
            "Cannot join: "
            + "; ".join(dict.fromkeys(reasons))
            + ". Check the address, and that `p2pmesh up` runs there"
        )

    async def _is_refused(self, card: MeshInfo, addresses: Iterable[Address]) -> bool:
        """Whether a member says that this node's membership has ended."""
        me = replace(self._as_newcomer(card.id), credential=card.credential.raw)
        for address in addresses:
            try:
                asked = await self._door.ask(address, JOIN, me)
            except RefusedError as exc:
                return exc.by_peer and exc.why in OVER
            except (LinkError, PeerError) as exc:
                log.info("membership_not_checked", address=str(address), reason=str(exc))
                continue
            await trio.aclose_forcefully(asked.stream)
            return False
        return False

    def _as_newcomer(self, mesh: MeshId) -> LocalIdentity:
        return LocalIdentity(key=self._me.key, instance=self._me.instance, mesh=mesh)

    def _enter(self, peer: Peer, answer: Answer, seeds: tuple[Address, ...]) -> Entry:
        """Check what a member answered, and remember the mesh."""
        credential = answer.credential
        policy = _policy(answer.policy, peer.mesh)
        if credential.node != self._me.key.id or credential.mesh != peer.mesh:
            raise PeerError("a credential that is not for this node")
        if not is_signed(credential):
            raise PeerError("a credential with a wrong signature")
        rules = policy.body if policy and isinstance(policy.body, Policy) else None
        card = MeshInfo(
            id=peer.mesh,
            name=(rules.name if rules else peer.mesh_name) or UNNAMED,
            founded_at=rules.founded_at if rules else credential.chain[0].issued_at,
            credential=credential,
            joined_at=int(self._clock()),
        )
        earlier = load_mesh(self._home)
        if earlier is not None and earlier.id != card.id:
            forget_mesh(self._home)
        if earlier is None or earlier.id != card.id:
            save_statements(self._home, card.id, [policy] if policy else [])
        save_mesh(self._home, card)
        return Entry(card=card, seeds=tuple(dict.fromkeys((*seeds, *answer.addresses))))

    async def _check_clock(self, peer: Peer, others: Iterable[Address]) -> None:
        if abs(peer.clock_ahead_s) <= CLOCK_SKEW_S_MAX:
            return
        ahead_s = [peer.clock_ahead_s]
        for address in others:
            try:
                ahead_s.append((await self._door.introduce(address)).clock_ahead_s)
            except (LinkError, PeerError) as exc:
                log.info("clock_not_compared", address=str(address), reason=str(exc))
        check_clock(ahead_s)


class _UnansweredError(LocalError):
    """Nobody answers who could let this node in."""


def _policy(raw: bytes, mesh: MeshId) -> Statement | None:
    if not raw:
        return None
    statement = parse_statement(raw)
    if statement.mesh != mesh or not verify_statement(statement):
        raise PeerError("rules of a mesh that are not signed by it")
    return statement
