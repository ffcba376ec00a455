"""A counter that tasks can wait on: state says that it changed, readers look again."""

from __future__ import annotations

import trio


class Watchable:
    """Counts changes; who waits with the count it saw misses none and sees several as one."""

    def __init__(self) -> None:
        self.count = 0
        self._next = trio.Event()

    def notify(self) -> None:
        """Something changed. May be called outside any task of the reader."""
        self.count += 1
        self._next.set()
        self._next = trio.Event()

    async def wait(self, seen: int) -> int:
        """The count, once it is not `seen` any more."""
        while self.count == seen:
            await self._next.wait()
        return self.count
