"""A fingerprint of a set of items that can also be told as of a moment ago.

Pure. Each item has an id of 16 bytes, which is a digest of it; the fingerprint is the sum of the
ids as numbers, so that keeping it costs an addition and ranges of a set have fingerprints too.
Such sums can be forged on purpose by whoever may choose many items, which costs a forger's peers
no more than a missed repair until one of the items changes.

Two nodes whose records are still on their way to each other differ for a moment. So what changed
lately is kept by the second that it was signed to happen in: an item counts from its birth to its
death, and nodes compare what counted some seconds ago. Births and deaths are mesh time read from
the items themselves, never from a clock, so they are the same everywhere.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

FINGERPRINT_BYTES = 16
CUTOFFS_MAX = 16  # answers remembered: a link is compared thrice in a row at one cutoff
CHANGES_KEPT_S = 15  # probes ask for five seconds ago; clocks and queues get as much again

_MODULUS = 1 << (8 * FINGERPRINT_BYTES)


def term_of(item: bytes) -> int:
    """Return the term that one id adds to a fingerprint."""
    return int.from_bytes(item, "big")


def fingerprint_of(items: Sequence[bytes]) -> bytes:
    """The fingerprint of some ids, each of 16 bytes."""
    # Halves of ids are small enough to be added fast: ranges cover thousands.
    halves = struct.unpack(f">{2 * len(items)}Q", b"".join(items))
    return _shown((sum(halves[::2]) << 64) + sum(halves[1::2]))


class Fingerprint:
    """The sum of what is there, and of what changed in the last seconds."""

    def __init__(self) -> None:
        self._total = 0
        self._changes: dict[int, int] = {}  # by second; of seconds after the horizon
        self._horizon = 0
        self._told: dict[int, bytes] = {}  # what `at` said since the last change

    @property
    def value(self) -> bytes:
        """Of all that is there now."""
        return _shown(self._total)

    def at(self, cutoff_s: int) -> bytes | None:
        """Return the fingerprint at the end of that second; None when that is too long ago."""
        if cutoff_s < self._horizon:
            return None
        told = self._told.get(cutoff_s)
        if told is None:
            later = sum(change for second, change in self._changes.items() if second > cutoff_s)
            if len(self._told) >= CUTOFFS_MAX:
                self._told.clear()
            told = self._told[cutoff_s] = _shown(self._total - later)
        return told

    def add(self, item: bytes, at_s: int) -> None:
        """An item is there.

        Args:
            item: Its id.
            at_s: Since when it counts.
        """
        self._change(term_of(item), at_s)

    def remove(self, item: bytes, born_s: int, at_s: int) -> None:
        """An item is gone.

        Args:
            item: Its id.
            born_s: Since when it counted.
            at_s: From when on it does not; if that is before its birth it never did.
        """
        self._change(-term_of(item), max(born_s, at_s))

    def advance(self, now: float) -> None:
        """Time has passed: let go of what nobody will ask for."""
        horizon = int(now) - CHANGES_KEPT_S
        if horizon > self._horizon:
            self._horizon = horizon
            if self._changes and min(self._changes) <= horizon:
                self._changes = {s: c for s, c in self._changes.items() if s > horizon}

    def _change(self, change: int, at_s: int) -> None:
        self._told.clear()
        self._total += change
        if at_s > self._horizon:
            self._changes[at_s] = self._changes.get(at_s, 0) + change


def _shown(total: int) -> bytes:
    return (total % _MODULUS).to_bytes(FINGERPRINT_BYTES, "big")
