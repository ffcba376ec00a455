"""How often somebody may do something: token buckets. Pure.

A bucket holds at most `burst` tokens and gains `rate_per_s` of them each second. What finds too
few is refused, not delayed.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

BUCKETS_MAX = 16 * 1024  # one for each owner that a document can hold


class Bucket:
    """Tokens of one kind; it begins full.

    Args:
        rate_per_s: Tokens gained each second.
        burst: How many it holds at most.
    """

    __slots__ = ("_at", "_burst", "_rate_per_s", "_tokens")

    def __init__(self, rate_per_s: float, burst: float) -> None:
        self._rate_per_s, self._burst = rate_per_s, burst
        self._tokens = burst
        self._at: float | None = None

    def take(self, now: float, n: float = 1) -> bool:
        """Take `n` tokens, if there are as many; otherwise none.

        Args:
            now: In seconds. Time that goes back is time that stands still.
            n: How many.
        """
        if n > self.tokens(now):
            return False
        self._tokens -= n
        return True

    def tokens(self, now: float) -> float:
        """How many tokens there are.

        Args:
            now: As for `take`.
        """
        if self._at is None:
            self._at = now
        elif now > self._at:
            self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate_per_s)
            self._at = now
        return self._tokens


class Buckets(Generic[Key]):
    """A bucket for each key, all alike.

    A full bucket is the same as none, so those are forgotten first when there are too many keys.
    If too few are full, the fullest quarter goes: so each new key costs little in the mean.

    Args:
        rate_per_s: As for `Bucket`.
        burst: As for `Bucket`.
        keys_max: How many keys are remembered at most.
    """

    __slots__ = ("_buckets", "_burst", "_keys_max", "_rate_per_s")

    def __init__(self, rate_per_s: float, burst: float, keys_max: int = BUCKETS_MAX) -> None:
        self._rate_per_s, self._burst, self._keys_max = rate_per_s, burst, keys_max
        self._buckets: dict[Key, Bucket] = {}

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, key: Key, now: float, n: float = 1) -> bool:
        """Take from the bucket of one key, as `Bucket.take`.

        Args:
            key: Whose bucket.
            now: In seconds.
            n: How many tokens.
        """
        bucket = self._buckets.get(key)
        if bucket is None:
            if len(self._buckets) >= self._keys_max:
                self._make_room(now)
            bucket = self._buckets[key] = Bucket(self._rate_per_s, self._burst)
        return bucket.take(now, n)

    def forget(self, key: Key) -> None:
        """Drop the bucket of one key."""
        self._buckets.pop(key, None)

    def _make_room(self, now: float) -> None:
        by_tokens = sorted(
            self._buckets.items(), key=lambda item: item[1].tokens(now), reverse=True
        )
        at_least = 1 + self._keys_max // 4
        for place, (key, bucket) in enumerate(by_tokens):
            if place >= at_least and bucket.tokens(now) < self._burst:
                break
            del self._buckets[key]
