"""How much a peer may ask of this node for long, and how far ahead of that it may run. Pure."""

from __future__ import annotations

import math


class Pace:
    """A rate, with a burst that is free.

    Args:
        rate_per_s: Units each second.
        burst: Units beyond that, for a peer that asked for nothing before.
    """

    __slots__ = ("_burst_s", "_paid_until", "_rate_per_s")

    def __init__(self, rate_per_s: float, burst: float) -> None:
        self._rate_per_s, self._burst_s = rate_per_s, burst / rate_per_s
        self._paid_until = -math.inf

    def take(self, now: float, units: float = 1.0) -> float:
        """Take `units`; returns until when to wait, which is in the past while the burst lasts.

        Args:
            now: In seconds.
            units: How much was asked for.
        """
        begun = max(self._paid_until, now - self._burst_s)
        self._paid_until = begun + units / self._rate_per_s
        return self._paid_until
