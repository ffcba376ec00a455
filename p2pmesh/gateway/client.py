"""One HTTP/1.1 connection that came in, from a client or from a peer.

Rules here: one task reads ahead (bounded), so that a client that leaves is noticed at once, even
while its request waits for an engine; only the handler writes. The end of what a client sends
counts as its leaving: TCP does not tell a closed connection from a half-closed one. h11 keeps the
protocol's state; nothing here knows paths, models or engines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import Protocol

import h11
import trio

from p2pmesh.errors import LinkError, MeshError
from p2pmesh.gateway.bodies import BodyBudget, IncomingBody
from p2pmesh.gateway.headers import Header
from p2pmesh.gateway.limits import Limits
from p2pmesh.gateway.scan import Body

# One system call's worth.
RECEIVE_BYTES = 64 * 1024
# Read ahead of the handler; then TCP makes the client wait.
INBOX_BYTES_MAX = 128 * 1024


class SendWatch(Protocol):
    """Is told of each sending, and may bring the deadline of its scope forward."""

    def began_sending(self, scope: trio.CancelScope) -> None:
        """A piece is about to be sent inside of `scope`."""
        ...

    def ended_sending(self, scope: trio.CancelScope) -> None:
        """It was sent, or given up."""
        ...


class ClientGoneError(MeshError):
    """The client closed, reset, or stopped reading; nobody is left to answer."""


class ClientConnection:
    """The server's end of one connection. `run_reader` must run beside whoever uses the rest.

    Attributes:
        started: Whether the answer to the present request was begun.
        last: Set it to say with the next answer that no other request will be taken.
        bytes_in: What was received, in all.
        bytes_out: What was sent, in all.
    """

    def __init__(self, stream: trio.abc.Stream, limits: Limits) -> None:
        self._stream = stream
        self._limits = limits
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.head_bytes)
        self._inbox = bytearray()
        self._gone = False
        self._handler = trio.lowlevel.ParkingLot()
        self._reader = trio.lowlevel.ParkingLot()
        self._work: trio.CancelScope | None = None
        self._informing: trio.Event | None = None
        self._flushing = False
        self._pending: list[bytes] = []
        self._discarding = False
        self._head_only = False
        self.started = False
        self.last = False
        self.bytes_in = 0
        self.bytes_out = 0

    async def run_reader(self) -> None:
        """Read until the client leaves; then cancel the work that is being done for it."""
        try:
            while data := await self._stream.receive_some(RECEIVE_BYTES):
                self.bytes_in += len(data)
                if not self._discarding:
                    self._inbox += data
                self._handler.unpark_all()
                while len(self._inbox) >= INBOX_BYTES_MAX:
                    await self._reader.park()
        except (trio.BrokenResourceError, trio.ClosedResourceError, LinkError):
            pass  # a reset is one way to leave
        self._leave()

    def _leave(self) -> None:
        self._gone = True
        self._handler.unpark_all()
        if self._work is not None:
            self._work.cancel()

    @contextmanager
    def work(self) -> Iterator[None]:
        """Bounds what is done for the client: it is cancelled as soon as the client leaves.

        Raises:
            ClientGoneError: It left.
        """
        with trio.CancelScope() as scope:
            self._work = scope
            if self._gone:
                scope.cancel()
            try:
                yield
            finally:
                self._work = None
        if scope.cancelled_caught:
            raise ClientGoneError("the client left before the answer ended")

    async def _more(self, deadline: float) -> bool:
        """Feed h11 with what has come; False when the client left or was too slow."""
        with trio.move_on_at(deadline):
            while not self._inbox and not self._gone:
                await self._handler.park()
        if not self._inbox:
            return False
        self._http.receive_data(bytes(self._inbox))
        self._inbox.clear()
        self._reader.unpark_all()
        return True

    async def next_request(self, idle_s: float | None = None) -> h11.Request | None:
        """The head of the next request; None when there will be none.

        Args:
            idle_s: How long to wait for its first byte; the usual time between two requests.

        Raises:
            h11.RemoteProtocolError: What came is not HTTP.
        """
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
        self.started = False
        limits = self._limits
        idle_s = limits.keep_alive_idle_s if idle_s is None else idle_s
        deadline: float | None = None
        while True:
            event = self._http.next_event()
            if isinstance(event, h11.Request):
                self._head_only = event.method == b"HEAD"
                return event
            if event is not h11.NEED_DATA:
                return None
            if deadline is None and self._http.trailing_data[0]:
                deadline = trio.current_time() + limits.head_deadline_s
            idle = trio.current_time() + idle_s
            if not await self._more(idle if deadline is None else deadline):
                return None

    async def read_body(self, budget: BodyBudget, declared_bytes: int) -> Body:
        """The body of the request whose head was just read. Its bytes stay counted in `budget`.

        Args:
            budget: For this body and all others.
            declared_bytes: Its length as the head says it; 0 when it does not.

        Raises:
            ApiError: 413 or 503; nothing stays counted then.
            ClientGoneError: It stopped sending, or sends too slowly.
            h11.RemoteProtocolError: Its framing is broken.
        """
        body = IncomingBody(
            budget,
            declared_bytes=declared_bytes,
            stall_s=self._limits.body_stall_s,
            now=trio.current_time(),
        )
        try:
            while True:
                event = self._http.next_event()
                if isinstance(event, h11.Data):
                    body.add(event.data, trio.current_time())
                elif event is h11.NEED_DATA:
                    await self._ask_for_body(body.due)
                else:
                    return body.finish()
        except BaseException:
            budget.give_back(body.size_bytes)
            raise

    async def _ask_for_body(self, due: float) -> None:
        if self._http.they_are_waiting_for_100_continue:
            self._put(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue"))
            await self.flush()
        if not await self._more(due):
            raise ClientGoneError("the client did not send the whole body")

    def _put(self, event: h11.Event) -> None:
        data = self._http.send(event)
        if data:
            self._pending.append(data)

    def start(self, status: int, headers: Sequence[Header], *, reason: bytes = b"") -> None:
        """Queue the head of the answer; `flush` sends it.

        When the request was not read to its end, the connection is closed after the answer.
        """
        try:
            reason = reason or HTTPStatus(status).phrase.encode("ascii")
        except ValueError:
            reason = b"Status"
        self.started = True
        headers = list(headers)
        if self.last or not self._is_read():
            headers.append((b"connection", b"close"))
        self._put(h11.Response(status_code=status, headers=headers, reason=reason))

    def _is_read(self) -> bool:
        """Whether the request was read to its end, or is here to its end."""
        try:
            while self._http.their_state is h11.SEND_BODY:
                if self._http.next_event() is h11.NEED_DATA:
                    return False
        except h11.RemoteProtocolError:
            return False
        return self._http.their_state is h11.DONE

    def write(self, data: bytes) -> None:
        """Queue a piece of the body; dropped when only the head was asked for."""
        if not self._head_only:
            self._put(h11.Data(data=data))

    def finish(self) -> None:
        """Queue the end of the answer."""
        self._put(h11.EndOfMessage())

    async def flush(self, watch: SendWatch | None = None) -> None:
        """Send what is queued, waiting for a slow client, but not for ever.

        Args:
            watch: Told of the waiting.

        Raises:
            ClientGoneError: It took nothing for too long, or closed.
        """
        if not self._pending:
            return
        if self._informing is not None:
            await self._informing.wait()
        pieces, self._pending = self._pending, []
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        scope = trio.CancelScope(deadline=trio.current_time() + self._limits.send_stall_s)
        if watch is not None:  # before it is entered, as moving its deadline costs less then
            watch.began_sending(scope)
        self._flushing = True
        try:
            with scope:
                await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError, LinkError) as exc:
            raise ClientGoneError("the client closed the connection") from exc
        finally:
            self._flushing = False
            if watch is not None:
                watch.ended_sending(scope)
        if scope.cancelled_caught:
            raise ClientGoneError("the client stopped reading")
        self.bytes_out += len(data)

    async def say_processing(self) -> None:
        """Send 102: the request is being worked on. Does nothing once the answer was begun.

        Nor while something else is being sent, as one stream takes one sender: 100 Continue, say.
        """
        if self._informing is not None or self._flushing or self._gone or self.started:
            return
        if self._http.our_state is not h11.SEND_RESPONSE:
            return
        event = h11.InformationalResponse(status_code=102, headers=[], reason=b"Processing")
        data = self._http.send(event)
        assert data is not None, "only ConnectionClosed has no bytes"
        informing = self._informing = trio.Event()
        sent = False
        try:
            with trio.move_on_after(self._limits.send_stall_s):
                await self._stream.send_all(data)
                sent = True
        except (trio.BrokenResourceError, trio.ClosedResourceError, LinkError):
            sent = False  # as if it had been too slow: nobody is left to answer
        finally:
            self._informing = None
            informing.set()
            if sent:
                self.bytes_out += len(data)
            else:
                self._leave()  # half of a line may be out: nothing can follow it

    @property
    def can_go_on(self) -> bool:
        """Whether another request may follow on this connection."""
        return self._http.our_state is h11.DONE and self._http.their_state is h11.DONE

    @property
    def can_answer(self) -> bool:
        """Whether an answer may still be started."""
        return self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE)

    async def linger(self) -> None:
        """Let a client that is still sending read its answer before the connection is closed.

        Closing with unread bytes resets the connection, which can destroy the answer on its way.
        """
        if self._gone or self._http.their_state in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED):
            return
        self._discarding = True
        self._inbox.clear()
        self._reader.unpark_all()
        with trio.move_on_after(self._limits.linger_s):
            if isinstance(self._stream, trio.abc.HalfCloseableStream):
                try:
                    await self._stream.send_eof()
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    return
            while not self._gone:
                await self._handler.park()
