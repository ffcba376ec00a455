"""One stream of snapshots for every browser, bounded however slow a browser is.

Rules: one task watches the node; each subscriber pulls. Nothing is queued for anybody: who was
busy gets the newest snapshot next and never sees those between. Changes within `COALESCE_S`
of each other are one event. Knows nothing of HTTP but the text of Server-Sent Events.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

import trio

COALESCE_S = 0.25  # four redraws a second read as live; more only warms the machine
KEEP_ALIVE_S = 15.0  # shorter than the idle time-outs of proxies and laptops' routers
SUBSCRIBERS_MAX = 64  # people watching one node; each costs a socket and one frame

# The comment keeps the connection open; the event lets the page notice a node that froze,
# because a browser does not show comments to scripts.
KEEP_ALIVE = b": keep-alive\nevent: alive\ndata: {}\n\n"


class SnapshotSource(Protocol):
    """The part of a node that the feed needs."""

    def snapshot(self) -> Mapping[str, Any]:
        """The whole status as JSON values; cheap, does not block."""

    async def wait_changed(self, seen: int) -> int:
        """The version counter, as soon as it is greater than `seen`."""


class FeedFull(Exception):  # noqa: N818 - a state of the feed, answered with 503
    """There are as many subscribers as the feed takes."""


class Feed:
    """Fans the node's snapshots out to subscribers.

    Args:
        source: Whose snapshots.

    Attributes:
        changed: Set, and replaced by a new one, when there is news.
        closed: No stream goes on, none begins.
        subscribers: How many streams are being read.
    """

    def __init__(self, source: SnapshotSource) -> None:
        self.changed = trio.Event()
        self.closed = False
        self.subscribers = 0
        self._source = source
        self._version = 0
        self._frame: bytes | None = None
        self._watching = trio.CancelScope()

    async def run(self) -> None:
        """Watch the source until closed; wakes subscribers at most each `COALESCE_S`."""
        with self._watching:
            while True:
                self._version = await self._source.wait_changed(self._version)
                self._wake()
                await trio.sleep(COALESCE_S)

    def subscribe(self) -> Subscription:
        """A new stream, whose first event is the snapshot of now.

        Raises:
            FeedFull: There are `SUBSCRIBERS_MAX` already.
        """
        if self.subscribers >= SUBSCRIBERS_MAX:
            raise FeedFull
        return Subscription(self)

    def close(self) -> None:
        """Stop watching, end every stream after what it is sending, and new ones at once."""
        self.closed = True
        self._watching.cancel()
        self._wake()

    def frame(self) -> bytes:
        """The newest snapshot as an event, encoded once for everybody who asks."""
        if self._frame is None:
            self._frame = self.fresh_frame()
        return self._frame

    def fresh_frame(self) -> bytes:
        """The snapshot of this moment as an event: what moves without a change is right too."""
        body = json.dumps(self._source.snapshot(), ensure_ascii=False, separators=(",", ":"))
        return f"id: {self._version}\nevent: snapshot\ndata: {body}\n\n".encode()

    def _wake(self) -> None:
        self._frame = None
        self.changed.set()
        self.changed = trio.Event()


class Subscription:
    """One browser's stream: an async iterator of Server-Sent Events as bytes.

    A class and not a generator: it holds no scope while its reader is busy, and leaves nothing
    to finalise when the reader is cancelled. `aclose` gives its place in the feed back.
    """

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._news: trio.Event | None = None  # what to wait for; None before the first event

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> bytes:
        """The next event: a snapshot when one is newer, a keep-alive when none comes.

        Raises:
            StopAsyncIteration: The feed was closed.
        """
        feed, first = self._feed, self._news is None
        if self._news is None:
            feed.subscribers += 1
            self._news = feed.changed
        else:
            with trio.move_on_after(KEEP_ALIVE_S):
                await self._news.wait()
        if feed.closed:
            raise StopAsyncIteration
        if first:
            return feed.fresh_frame()
        if not self._news.is_set():
            return KEEP_ALIVE
        self._news = feed.changed
        return feed.frame()

    async def aclose(self) -> None:
        """Leave the feed."""
        if self._news is not None:
            self._feed.subscribers -= 1
            self._news = None
