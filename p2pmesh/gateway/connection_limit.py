"""How many requests one replica is given at once, and which of them give way.

Rules: requests beyond the bound wait in turn. A client that does not read its answer holds a slot
of the engine for nothing; while other requests wait for a slot, the answers that have been stuck
for long are given up, the one stuck longest first, and only as many as wait.
"""

from __future__ import annotations

from itertools import islice

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
        self._places = places
        self._taken = 0
        # Invariant: nobody waits while a place is free.
        self._queue = trio.lowlevel.ParkingLot()
        # Since when each answer is on its way, the oldest first.
        self._sending: dict[trio.CancelScope, float] = {}

    def resize(self, slots: int, places: int) -> None:
        """Set both bounds anew; those beyond them stay until they are done."""
        self._slots = slots
        self._places = places
        self._let_in()

    def acquire_nowait(self) -> bool:
        """Take a place if one is free and nobody waits for it; whether that was so."""
        if self._taken >= self._places:
            return False
        self._taken += 1
        self._hurry(self._taken)
        return True

    async def acquire(self) -> None:
        """Wait for a place."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self.acquire_nowait():
            return
        self._hurry(self._taken + len(self._queue) + 1)
        await self._queue.park()

    def release(self) -> None:
        """Give a place back."""
        self._taken -= 1
        self._let_in()

    def _let_in(self) -> None:
        free = self._places - self._taken
        if free > 0 and self._queue:
            self._taken += len(self._queue.unpark(count=free))

    def began_sending(self, scope: trio.CancelScope) -> None:
        """Note that a piece of an answer is about to go to the client.

        Args:
            scope: Around the sending; its deadline is brought forward when others wait.
        """
        self._sending[scope] = trio.current_time()
        self._hurry(self._taken + len(self._queue))

    def ended_sending(self, scope: trio.CancelScope) -> None:
        """Note that the piece was taken, or given up."""
        del self._sending[scope]

    def _hurry(self, users: int) -> None:
        waiting = users - self._slots
        if waiting > 0:
            for scope, since in islice(self._sending.items(), waiting):
                due = since + GIVE_WAY_S
                if due < scope.deadline:  # noqa: PLR1730 - to set the same again costs as much
                    scope.deadline = due
