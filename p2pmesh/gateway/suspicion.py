"""Ends waits on a replica that is lost: its node is suspect, or its engine does not respond.

A stopped process keeps its connections open and says nothing, so a wait on it would last for ever.
Before a replica has answered, its loss ends the wait at once: the request goes elsewhere, and a
wrong suspicion costs nothing. During an answer it ends only a silence, because what was sent
already cannot be taken back.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

import trio

from p2pmesh.errors import LinkError
from p2pmesh.gateway.route import Target
from p2pmesh.identity.keys import NodeId
from p2pmesh.models.parts import ReplicaKey

# A lost replica that is in the middle of an answer: failure detection has decided by then.
SUSPECT_SILENCE_S = 5.0


class SilenceError(LinkError):
    """The replica said nothing for too long. Its connection may be in order; another is no help."""


class Deadline:
    """Bounds the waits of one exchange with one replica."""

    def __init__(self) -> None:
        self.answering = False
        self._suspect = False
        self._scope: trio.CancelScope | None = None

    def wait(self, limit_s: float) -> _Wait:
        """Bounds one wait, which is the block that is entered with it.

        Raises:
            SilenceError: It took longer than `limit_s`, or the replica was lost.
        """
        return _Wait(self, limit_s)

    def begin(self, scope: trio.CancelScope) -> None:
        """Note that the exchange waits inside of `scope`."""
        self._scope = scope
        if self._suspect:
            self._hurry(scope)

    def end(self, scope: trio.CancelScope) -> None:
        """Note that the wait inside of `scope` is over.

        Raises:
            SilenceError: It took too long.
        """
        self._scope = None
        if scope.cancelled_caught:
            raise SilenceError("it does not respond" if self._suspect else "no answer in time")

    def suspect(self) -> None:
        """The replica was lost."""
        self._suspect = True
        if self._scope is not None:
            self._hurry(self._scope)

    def _hurry(self, scope: trio.CancelScope) -> None:
        patience_s = SUSPECT_SILENCE_S if self.answering else -math.inf
        scope.deadline = min(scope.deadline, trio.current_time() + patience_s)


class _Wait:
    """One wait of a `Deadline`. No generator: each piece of an answer takes one; this is faster."""

    __slots__ = ("_deadline", "_scope")

    def __init__(self, deadline: Deadline, limit_s: float) -> None:
        self._deadline = deadline
        self._scope = trio.CancelScope(deadline=trio.current_time() + limit_s)

    def __enter__(self) -> None:
        self._scope.__enter__()
        self._deadline.begin(self._scope)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        caught = self._scope.__exit__(kind, exc, traceback)
        self._deadline.end(self._scope)
        return caught


class SuspicionWatch:
    """One task per node, or local engine, that is being waited on or was, until it is lost."""

    def __init__(self, lost: Callable[[Target], Awaitable[None]]) -> None:
        self._lost = lost
        self._deadlines: dict[ReplicaKey | NodeId, set[Deadline]] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    @contextmanager
    def deadline(self, target: Target) -> Iterator[Deadline]:
        """A deadline that learns when the replica is lost."""
        if self._nursery is None:  # peers may ask before the start and at the very end
            yield Deadline()
            return
        key = target.key if target.local else target.node
        deadlines = self._deadlines.get(key)
        if deadlines is None:
            deadlines = self._deadlines[key] = set()
            self._nursery.start_soon(self._watch, key, target, deadlines)
        deadline = Deadline()
        deadlines.add(deadline)
        try:
            yield deadline
        finally:
            deadlines.discard(deadline)

    async def _watch(
        self, key: ReplicaKey | NodeId, target: Target, deadlines: set[Deadline]
    ) -> None:
        try:
            await self._lost(target)
        finally:
            del self._deadlines[key]  # the next request watches anew
            for deadline in list(deadlines):
                deadline.suspect()
