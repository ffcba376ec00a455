"""A digest of everything that happens in a run, and the last of it in words."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from functools import partial
from hashlib import blake2b

from p2pmesh.gossip.events import Event, Received, TimerFired
from simulations.node import Handled
from simulations.sizes import size_of
from simulations.world import World

TAIL = 20  # steps of the end of a run that are told when it fails

_STEP = struct.Struct("<dII")


class Trace:
    """A watcher that keeps account.

    Args:
        world: What is watched.
    """

    def __init__(self, world: World) -> None:
        self.steps = 0
        self._world = world
        self._hash = blake2b(digest_size=16)
        self._tail: deque[Callable[[], str]] = deque(maxlen=TAIL)

    @property
    def tail(self) -> list[str]:
        """The last things that happened."""
        return [line() for line in self._tail]

    def digest(self) -> str:
        """Equal for runs in which the same happened."""
        return self._hash.hexdigest()

    def note(self, what: str) -> None:
        """Something happened that no node was told."""
        now = self._world.schedule.now
        self._hash.update(what.encode())
        self._tail.append(lambda: f"{now:10.3f}  {what}")

    def handled(self, step: Handled) -> None:
        """See `Watcher`."""
        self.steps += 1
        event, now, number = step.event, self._world.schedule.now, step.node.number
        self._hash.update(_STEP.pack(now, number, len(step.outs)))
        if isinstance(event, Received):
            self._hash.update(event.node)
        elif isinstance(event, TimerFired):
            return
        self._tail.append(partial(_tell, now, number, event, len(step.outs)))


def _tell(now: float, number: int, event: Event | None, outs: int) -> str:
    if isinstance(event, Received):
        said = type(event.message).__name__
        what = f"{said} from {event.node.hex()[:8]}"
        if said != "Unknown":
            what = f"{said}, {size_of(event.message)} bytes, from {event.node.hex()[:8]}"
    else:
        what = repr(event)[:60]
    return f"{now:10.3f}  node {number}: {what}; {outs} outs"
