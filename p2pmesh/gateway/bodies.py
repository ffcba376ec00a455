"""Bodies of requests on their way in: bounded in size, memory and time.

A small body is bytes. A large one lives in one mapping of its own, outside the heap: when the
request is over its memory goes back to the system, where many pieces would leave the heap full of
holes. Bounds: each body, all together, a reserve that large ones leave to small ones, and a
minimum rate, so that nobody holds memory by sending a byte now and then.
"""

from __future__ import annotations

import mmap
import sys

from p2pmesh.gateway.limits import RETRY_AFTER_S, Limits
from p2pmesh.gateway.openai import ApiError
from p2pmesh.gateway.scan import Body

# Chats are smaller, as a rule; what is larger brings images or whole books.
SMALL_BODY_BYTES = 1024 * 1024
# So much of the memory for bodies is for small ones only: a few uploads do not stop all chats.
SMALL_RESERVE_SHARE = 8
# A slow line at its worst; each piece earns its sender time at this rate.
RATE_MIN_BYTES_PER_S = 8 * 1024


class BodyBudget:
    """Bounds one body, and the memory that all bodies of one kind of callers take together."""

    def __init__(self, limits: Limits) -> None:
        self._one_max = limits.body_bytes
        self._free = limits.bodies_bytes
        self._reserve = limits.bodies_bytes // SMALL_RESERVE_SHARE

    def check(self, size_bytes: int) -> None:
        """Refuse a body of this size.

        Raises:
            ApiError: 413.
        """
        if size_bytes > self._one_max:
            message = f"The body is larger than the {self._one_max >> 20} MiB that are accepted"
            raise ApiError(413, message, code="request_too_large")

    def take(self, size_bytes: int, *, large: bool = False) -> None:
        """Count bytes that were read.

        Args:
            size_bytes: How many.
            large: Whether their body has outgrown the reserve for small ones.

        Raises:
            ApiError: 503, the bodies being read fill all the memory there is for them.
        """
        if size_bytes > self._free - (self._reserve if large else 0):
            raise ApiError(
                503,
                "Too much request data at once; try again soon",
                code="overloaded",
                retry_after_s=RETRY_AFTER_S,
            )
        self._free -= size_bytes

    def give_back(self, size_bytes: int) -> None:
        """Count bytes that are no longer held."""
        self._free += size_bytes


class IncomingBody:
    """One body while it is read.

    Args:
        budget: Where its bytes are counted.
        declared_bytes: Its length, where the client has said it; else 0.
        stall_s: How long the client may send nothing.
        now: The present time in seconds.

    Attributes:
        size_bytes: What has come, and is counted.
        due: When the client has to have sent more.
    """

    def __init__(
        self, budget: BodyBudget, *, declared_bytes: int, stall_s: float, now: float
    ) -> None:
        self._budget = budget
        self._declared_bytes = declared_bytes
        self._stall_s = stall_s
        self._small = bytearray()
        self._large: mmap.mmap | None = None
        self.size_bytes = 0
        self.due = now + stall_s

    def add(self, data: bytes | bytearray, now: float) -> None:
        """Keep a piece.

        Raises:
            ApiError: 413 or 503, there is no room for it.
        """
        size_bytes = self.size_bytes + len(data)
        self._budget.check(size_bytes)
        self._budget.take(len(data), large=size_bytes > SMALL_BODY_BYTES)
        self.due = min(now + self._stall_s, self.due + len(data) / RATE_MIN_BYTES_PER_S)
        if self._large is None and size_bytes <= SMALL_BODY_BYTES:
            self._small += data
        else:
            buffer = self._room(size_bytes)
            buffer[self.size_bytes : size_bytes] = bytes(data)
        self.size_bytes = size_bytes

    def finish(self) -> Body:
        """Return the whole body; its bytes stay counted."""
        if self._large is None:
            return bytes(self._small)
        if len(self._large) != self.size_bytes:
            self._large = _copy(self._large, self.size_bytes, self.size_bytes)
        return self._large

    def _room(self, size_bytes: int) -> mmap.mmap:
        """Return the mapping, made so large that `size_bytes` fit."""
        if self._large is None:
            self._large = _mapping(max(self._declared_bytes, size_bytes))
            self._large[: len(self._small)] = bytes(self._small)
            self._small = bytearray()
        elif len(self._large) < size_bytes:
            self._large = _copy(self._large, self.size_bytes, max(2 * len(self._large), size_bytes))
        return self._large


def _copy(source: mmap.mmap, used_bytes: int, size_bytes: int) -> mmap.mmap:
    target = _mapping(size_bytes)
    with memoryview(source) as view:
        target[:used_bytes] = view[:used_bytes]
    source.close()
    return target


def _mapping(size_bytes: int) -> mmap.mmap:
    """Return memory of this process's own; what is not written takes none."""
    if sys.platform == "win32":
        return mmap.mmap(-1, size_bytes)
    return mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
