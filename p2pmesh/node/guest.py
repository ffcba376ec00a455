"""A node that only uses a mesh: it hands on what its clients ask to a member, byte by byte.

Its role is `use`. It takes no part in the gossip, runs no models and lets nobody in. A member
answers as it answers its own clients, checks which web pages may ask included, and this node knows
no more of the mesh than a few addresses of members.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import structlog
import trio

from p2pmesh import __version__
from p2pmesh.config import Address
from p2pmesh.errors import LinkError, LocalError, MeshError, PeerError
from p2pmesh.home import Home
from p2pmesh.identity.credentials import Role, is_signed
from p2pmesh.identity.hello import HTTP, JOIN, LocalIdentity
from p2pmesh.identity.keys import NodeId, show_id
from p2pmesh.node.admission import ask_with
from p2pmesh.node.joining import Entry
from p2pmesh.node.keystore import MeshInfo, load_book, save_book, save_mesh
from p2pmesh.node.status import Addresses
from p2pmesh.transport.base import Transport
from p2pmesh.watchable import Watchable

HEAD_BYTES_MAX = 64 * 1024  # as the gateway of a member
HEAD_TIMEOUT_S = 60.0  # of the first request on a connection
CHUNK_BYTES = 64 * 1024
CONNECTIONS_MAX = 64  # streams that a member takes of one node
LINGER_S = 1.0
LOOK_INTERVAL_S = 10.0  # between two looks at the models, for the status
LOOK_TIMEOUT_S = 5.0
LOOK_BYTES_MAX = 1 << 20
RENEW_INTERVAL_S = 3600.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestParts:
    """What a guest is made of.

    Attributes:
        me: Its identity.
        addresses: Where it listens.
        stop: Begins the node's end; returns at once.
        order: Carries out what a person orders.
    """

    home: Home
    name: str
    me: LocalIdentity
    transport: Transport
    addresses: Addresses
    token: str
    stop: Callable[[], None]
    order: Callable[[str, Mapping[str, Any]], Awaitable[Mapping[str, Any]]]


class Guest:
    """One node that uses one mesh; also the console's source of snapshots.

    Args:
        entry: The mesh, and where members of it may be found.
        parts: What it is made of.
    """

    def __init__(self, entry: Entry, parts: GuestParts) -> None:
        self.card: MeshInfo = entry.card
        self.token, self.stop = parts.token, parts.stop
        self._parts, self._order = parts, parts.order
        self._changes = Watchable()
        book = load_book(parts.home, entry.card.id)
        known = [address for some in book.values() for address in some]
        self._members = list(dict.fromkeys((*entry.seeds, *known)))
        self._models: list[dict[str, Any]] = []
        self._open = 0
        self._warning = ""
        self._started_s = trio.current_time()

    async def run(
        self,
        listeners: list[trio.SocketListener],
        *,
        task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve clients until cancelled.

        Raises:
            LocalError: The role was raised: the node has to start again.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_looking)
            nursery.start_soon(self._keep_renewing)
            await trio.serve_listeners(self._serve, listeners, task_status=task_status)

    # --- clients --------------------------------------------------------------------------------

    async def _serve(self, client: trio.SocketStream) -> None:
        """Join one client's connection with a stream to a member."""
        async with client:
            try:
                if self._open >= CONNECTIONS_MAX:
                    await _say(client, 503, "too many connections to this node are open")
                    return
                self._open += 1
                try:
                    await self._hand_on(client)
                finally:
                    self._open -= 1
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                log.debug("client_left", reason=str(exc))
            except Exception:
                log.exception("connection_failed")

    async def _hand_on(self, client: trio.SocketStream) -> None:
        with trio.move_on_after(HEAD_TIMEOUT_S):
            # A member closes a stream on which nothing comes: so it is opened with the request.
            head = await client.receive_some(CHUNK_BYTES)
            if not head:
                return
            try:
                member = await self._connect()
            except MeshError as exc:
                await _say(client, 503, f"the mesh {self.card.name} cannot be reached: {exc}")
                return
        async with member:
            answered = _Count()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_pump, client, member, head, nursery.cancel_scope)
                nursery.start_soon(_pump_answers, member, client, answered, nursery.cancel_scope)
            if not answered.bytes:
                await _say(client, 502, "the member that was asked left without an answer")

    async def _connect(self) -> trio.abc.Stream:
        """Open a stream to the first member that takes it.

        Raises:
            MeshError: None does.
        """
        failure: MeshError = LinkError("no address of a member is known")
        for address in list(self._members):
            try:
                asked = await self._parts.transport.ask(address, HTTP, self._me)
            except MeshError as exc:
                failure = exc
                continue
            self._prefer(address)
            return asked.stream
        raise failure

    def _prefer(self, address: Address) -> None:
        self._members.remove(address)
        self._members.insert(0, address)

    @property
    def _me(self) -> LocalIdentity:
        return replace(self._parts.me, mesh=self.card.id, credential=self.card.credential.raw)

    # --- the membership -------------------------------------------------------------------------

    async def _keep_renewing(self) -> None:
        while True:
            await trio.sleep(RENEW_INTERVAL_S)
            await self.renew()
            if self.card.credential.role > Role.USE:
                raise LocalError(
                    f"This node may do more in {self.card.name} now than use it: start it again"
                )

    async def renew(self) -> None:
        """Ask a member for what this node was granted, and for addresses of members."""
        for address in list(self._members):
            try:
                asked = await self._parts.transport.ask(address, JOIN, self._me)
                async with asked.stream:
                    answer = await ask_with(asked.stream, {"renew": True, "name": self._parts.name})
                fresh = answer.credential
                if fresh.node != self._me.key.id or fresh.mesh != self.card.id:
                    raise PeerError("a credential that is not this node's")
                if not is_signed(fresh):
                    raise PeerError("a credential with a wrong signature")
            except MeshError as exc:
                log.info("not_renewed", address=str(address), reason=str(exc))
                continue
            self._warning = ""
            self._learn(asked.peer.node, answer.addresses)
            if fresh.rank > self.card.credential.rank:
                self.card = replace(self.card, credential=fresh)
                save_mesh(self._parts.home, self.card)
            return

    def _learn(self, node: NodeId, addresses: tuple[Address, ...]) -> None:
        self._members = list(dict.fromkeys((*self._members, *addresses)))[: 2 * CONNECTIONS_MAX]
        try:
            save_book(self._parts.home, self.card.id, {node: tuple(self._members)})
        except LocalError as exc:
            log.warning("address_book_not_saved", reason=str(exc))

    # --- the status -----------------------------------------------------------------------------

    async def _keep_looking(self) -> None:
        """Keep the list of models for the status."""
        while True:
            models, warning = self._models, ""
            try:
                with trio.fail_after(LOOK_TIMEOUT_S):
                    models = await self._look()
            except (MeshError, trio.TooSlowError, ValueError) as exc:
                warning = f"The mesh {self.card.name} cannot be reached: {str(exc) or 'no answer'}"
            if (models, warning) != (self._models, self._warning):
                self._models, self._warning = models, warning
                self._changes.notify()
            await trio.sleep(LOOK_INTERVAL_S)

    async def _look(self) -> list[dict[str, Any]]:
        said = b""
        async with await self._connect() as stream:
            request = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            try:
                await stream.send_all(request)
                while len(said) < LOOK_BYTES_MAX and (chunk := await stream.receive_some()):
                    said += chunk
            except trio.BrokenResourceError as exc:
                raise LinkError("the member left") from exc
        rows = json.loads(said.partition(b"\r\n\r\n")[2])["data"]
        return [row for row in rows if isinstance(row, dict)]

    async def wait_changed(self, seen: int) -> int:
        """The count of changes, as soon as it is not `seen` any more."""
        return await self._changes.wait(seen)

    async def order(self, name: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Carry out what a person orders; see `Orders.give`."""
        return await self._order(name, values)

    def ready_line(self) -> dict[str, Any]:
        """How programs that started this node reach it."""
        addresses = self._parts.addresses
        return {
            "id": show_id(self._parts.me.key.id),
            "name": self._parts.name,
            "pid": os.getpid(),
            "api": str(addresses.api),
            "console": str(addresses.console),
            "peer": str(addresses.peer),
            "home": str(self._parts.home.root),
        }

    def snapshot(self) -> Mapping[str, Any]:
        """Everything, as JSON values; what only members know is empty."""
        return {
            "node": {
                **self.ready_line(),
                "version": __version__,
                "uptime_s": int(trio.current_time() - self._started_s),
                "memory": {"budget_bytes": 0, "used_bytes": 0},
                "engine": None,
                "role": Role.USE.word,
                "warnings": [self._warning] if self._warning else [],
            },
            "mesh": {
                "id": show_id(self.card.id),
                "name": self.card.name,
                "founded_at": self.card.founded_at,
                "open": None,
                "admits": False,
                "announced": False,
                "others": [],
                "only_admin": "",
                "notices": [],
                "nodes": 0,
                "plan": "",
                "agreed": True,
            },
            "nodes": [],
            "away": [],
            "invitations": [],
            "newcomers": [],
            "models": [_model(row, is_reached=not self._warning) for row in self._models],
        }


def _model(row: Mapping[str, Any], *, is_reached: bool) -> dict[str, Any]:
    """A model of the status, from what a member's API said of it last."""
    said = row.get("p2pmesh")
    more = said if isinstance(said, dict) else {}
    return {
        "id": str(row.get("id", "")),
        "digest": str(more.get("digest", "")),
        "name": "",
        "size_bytes": 0,
        "architecture": "",
        "takes": [],
        "gives": [],
        "state": str(more.get("state", "ready")) if is_reached else "not served",
        "replicas": [],
        "copies": 0,
        "wanted_by": [],
        "reason": str(more.get("reason", "")) if is_reached else "no member can be reached",
    }


class _Count:
    def __init__(self) -> None:
        self.bytes = 0


async def _pump(
    client: trio.abc.Stream, member: trio.abc.Stream, head: bytes, scope: trio.CancelScope
) -> None:
    """Hand on requests until the client leaves; then the answer is of no use any more."""
    try:
        data = bytes(head)
        while data:
            await member.send_all(data)
            data = bytes(await client.receive_some(CHUNK_BYTES))
    except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
        log.debug("requests_ended", reason=str(exc))
        await trio.sleep(1.0)  # the member may have said why
    scope.cancel()


async def _pump_answers(
    member: trio.abc.Stream, client: trio.abc.Stream, count: _Count, scope: trio.CancelScope
) -> None:
    """Hand on answers until the member ends the stream."""
    try:
        while data := bytes(await member.receive_some(CHUNK_BYTES)):
            count.bytes += len(data)
            await client.send_all(data)
    except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
        log.debug("answers_ended", reason=str(exc))
    scope.cancel()


async def _say(client: trio.SocketStream, status: int, sentence: str) -> None:
    """Answer with an error in the shape of OpenAI's API, so that the client gets to read it."""
    error = {"message": sentence, "type": "server_error", "param": None, "code": "mesh_unreachable"}
    body = json.dumps({"error": error}).encode()
    words = {502: "Bad Gateway", 503: "Service Unavailable"}
    head = (
        f"HTTP/1.1 {status} {words[status]}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nRetry-After: 5\r\nConnection: close\r\n\r\n"
    )
    await client.send_all(head.encode() + body)
    await client.send_eof()
    with trio.move_on_after(LINGER_S):
        # What is closed with a request unread is reset, and the answer lost.
        while await client.receive_some(CHUNK_BYTES):
            pass
