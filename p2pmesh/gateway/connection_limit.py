"""How many requests one replica is given at once, and which of them give way.

Rules: requests beyond the bound wait in turn. A client that does not read its answer holds a slot
of the engine for nothing; while other requests wait for a slot, the answers that have been stuck
for long are given up, the one stuck longest first, and only as many as wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio

# Buffers on the way hold some seconds of an answer already: who has not read for so much longer is
# busy with something else.
GIVE_WAY_S = 5.0


class ConnectionLimit:
    """The places of one replica.

    Args:
        slots: How many requests it works on at once.
        places: How many connections to it there may be.
    """

    def __init__(self, slots: int, places: int) -> None:
        self._slots = slots
        self._places = trio.CapacityLimiter(places)
        self._users = 0
        self._stuck: dict[trio.CancelScope, float] = {}

    def resize(self, slots: int, places: int) -> None:
        """Set both bounds anew; those beyond them stay until they are done."""
        self._slots = slots
        if self._places.total_tokens != places:
            self._places.total_tokens = places

    def acquire_nowait(self) -> bool:
        """Take a place if one is free and nobody waits for it; whether that was so."""
        try:
            self._places.acquire_nowait()
        except trio.WouldBlock:
            return False
        self._users += 1
        self._hurry()
        return True

    async def acquire(self) -> None:
        """Wait for a place."""
        self._users += 1
        self._hurry()
        try:
            await self._places.acquire()
        except BaseException:
            self._users -= 1
            raise

    def release(self) -> None:
        """Give a place back."""
        self._places.release()
        self._users -= 1

    @contextmanager
    def sending(self, scope: trio.CancelScope) -> Iterator[None]:
        """Note that a piece of an answer is on its way to the client, until the block ends.

        Args:
            scope: Around the block; its deadline is brought forward when others wait.
        """
        self._stuck[scope] = trio.current_time()
        if self._users > self._slots:
            self._hurry()
        try:
            yield
        finally:
            del self._stuck[scope]

    def _hurry(self) -> None:
        waiting = self._users - self._slots
        if waiting <= 0:
            return
        for scope, since in sorted(self._stuck.items(), key=lambda item: item[1])[:waiting]:
            scope.deadline = min(scope.deadline, since + GIVE_WAY_S)
