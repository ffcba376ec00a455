"""The send queue of one link: bounded, and small messages before bulk.

Bulk is what was asked for and can wait: chunks of a snapshot, ids and ranges of a repair. A probe
behind it would make this node look slow. What is on its way to the kernel is not called back, so
a small message waits for one bulk message at most.
"""

from __future__ import annotations

from collections import deque

import trio

# A node that joins a large mesh while it starts is sent each news alone: at 1000 nodes some
# thousand messages in a second. A link that does not get rid of so many is stuck.
MESSAGES_MAX = 4096
BYTES_MAX = 4 << 20  # times some twenty links of a node: what a mesh of stuck peers can cost


class Outbox:
    """Messages of one link, taken by one writer."""

    def __init__(self) -> None:
        self._small: deque[bytes] = deque()
        self._bulk: deque[bytes] = deque()
        self._size_bytes = 0
        self._closed = False
        self._changed = trio.Event()

    def put(self, message: bytes, *, bulk: bool) -> bool:
        """Whether there was room for it; what comes after `close` is dropped."""
        if self._closed:
            return True
        size_bytes = self._size_bytes + len(message)
        if len(self._small) + len(self._bulk) >= MESSAGES_MAX or size_bytes > BYTES_MAX:
            return False
        (self._bulk if bulk else self._small).append(message)
        self._size_bytes = size_bytes
        self._changed.set()
        return True

    def close(self) -> None:
        """Nothing more comes: `take` says so once the rest is taken."""
        self._closed = True
        self._changed.set()

    async def take(self) -> bytes | None:
        """The next message as soon as there is one; None at the end."""
        while not (self._small or self._bulk):
            if self._closed:
                return None
            self._changed = trio.Event()
            await self._changed.wait()
        message = (self._small or self._bulk).popleft()
        self._size_bytes -= len(message)
        return message
