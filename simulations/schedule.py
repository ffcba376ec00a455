"""Time and chance of a run: one heap of what happens next, and a tree of random numbers.

The seed decides everything; neither the wall clock nor the order of a set ever does.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from random import Random
from typing import Any


class ViolationError(AssertionError):
    """Something that must never happen did; it ends the run."""


def branch(seed: int, name: str) -> Random:
    """One branch of the tree of random numbers; what is drawn from one moves no other."""
    return Random(f"{seed}/{name}")


class Schedule:
    """The queue of coming events. Time is in seconds from the start of the run."""

    __slots__ = ("_heap", "_order", "now", "steps")

    def __init__(self) -> None:
        self.now = 0.0
        self.steps = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = 0

    def after(self, seconds: float, what: Callable[..., None], *arguments: Any) -> None:
        """Have `what(*arguments)` called so much later; equal times keep their order."""
        self._order += 1
        heapq.heappush(self._heap, (self.now + seconds, self._order, what, arguments))

    def run(self, until_s: float) -> None:
        """Let everything happen up to and including that moment."""
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= until_s:
            self.now, _, what, arguments = pop(heap)
            self.steps += 1
            what(*arguments)
        self.now = until_s
