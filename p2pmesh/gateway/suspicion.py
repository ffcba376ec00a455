"""Ends waits on a node that the failure detector suspects.

A stopped node keeps its connections open and says nothing, so a wait on it would last for ever.
Before a node has answered, suspicion ends the wait at once: the request goes elsewhere, and a
wrong suspicion costs nothing. During an answer it ends only a silence, because what was sent
already cannot be taken back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from p2pmesh.errors import LinkError
from p2pmesh.identity.keys import NodeId

# A suspected node that is in the middle of an answer: failure detection has decided by then.
SUSPECT_SILENCE_S = 5.0


class Guard:
    """Bounds the waits of one exchange with one node."""

    def __init__(self) -> None:
        self.answering = False
        self._suspect = False
        self._scope: trio.CancelScope | None = None

    @contextmanager
    def wait(self, limit_s: float) -> Iterator[None]:
        """Bounds one wait.

        Raises:
            LinkError: It took longer than `limit_s`, or the node became suspect.
        """
        with trio.CancelScope(deadline=trio.current_time() + limit_s) as scope:
            self._scope = scope
            if self._suspect:
                self._hurry(scope)
            try:
                yield
            finally:
                self._scope = None
        if scope.cancelled_caught:
            raise LinkError("the node does not respond" if self._suspect else "no answer in time")

    def suspect(self) -> None:
        """The node became suspect."""
        self._suspect = True
        if self._scope is not None:
            self._hurry(self._scope)

    def _hurry(self, scope: trio.CancelScope) -> None:
        patience_s = SUSPECT_SILENCE_S if self.answering else -math.inf
        scope.deadline = min(scope.deadline, trio.current_time() + patience_s)


class SuspicionWatch:
    """One task per node that is being waited on or was, until it becomes suspect."""

    def __init__(self, suspected: Callable[[NodeId], trio.Event]) -> None:
        self._suspected = suspected
        self._guards: dict[NodeId, set[Guard]] = {}
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
    def guard(self, node: NodeId) -> Iterator[Guard]:
        """A guard that learns when the node becomes suspect."""
        guards = self._guards.get(node)
        if guards is None:
            assert self._nursery is not None, "run() runs before the first request"
            guards = self._guards[node] = set()
            self._nursery.start_soon(self._watch, node, guards)
        guard = Guard()
        guards.add(guard)
        try:
            yield guard
        finally:
            guards.discard(guard)

    async def _watch(self, node: NodeId, guards: set[Guard]) -> None:
        try:
            await self._suspected(node).wait()
        finally:
            del self._guards[node]  # the next request watches the next event
            for guard in list(guards):
                guard.suspect()
