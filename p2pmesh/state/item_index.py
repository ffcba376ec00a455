"""The index of a document's items by id, and all ids in order.

Pure. Where an item is follows from what it is, so nodes that are simulated in one process may
share one map of homes, which then only grows. The sorted ids are made when repair asks for them,
kept in step while little changes, and let go when nobody asks any more.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable

from p2pmesh.identity.keys import NodeId

IDLE_S = 10.0  # longer than any pause within one repair
_STEP_SHARE = 16  # of the ids may change before sorting anew is cheaper


class ItemIndex:
    """Ids of items.

    Args:
        homes: Whose each item is; one that is given is shared, and nothing is taken out of it.
    """

    def __init__(self, homes: dict[bytes, NodeId] | None = None) -> None:
        self._homes: dict[bytes, NodeId] = {} if homes is None else homes
        self._is_shared = homes is not None
        self._sorted: list[bytes] | None = None
        self._changes: list[tuple[bytes, bool]] = []  # since it was sorted: came or went
        self._asked = False
        self._idle_since = 0.0

    def home(self, item: bytes) -> NodeId | None:
        """Return the owner of the item, if known; the item may be gone."""
        return self._homes.get(item)

    def add(self, item: bytes, owner: NodeId) -> None:
        """An item is there."""
        self._homes[item] = owner
        if self._sorted is not None:
            self._note(item, came=True)

    def drop(self, item: bytes) -> None:
        """An item is gone."""
        if not self._is_shared:
            del self._homes[item]
        if self._sorted is not None:
            self._note(item, came=False)

    def ids(self, everything: Callable[[], Iterable[bytes]]) -> list[bytes]:
        """All ids, sorted; the list is never changed afterwards.

        Args:
            everything: All ids in any order, asked only when they have to be sorted anew.
        """
        self._asked = True
        if self._sorted is None:
            self._sorted = sorted(everything())
        elif self._changes:
            self._sorted = self._stepped(self._sorted)
        self._changes = []
        return self._sorted

    def rest(self, now: float) -> None:
        """Let go of what was not asked for in a while."""
        if self._asked:
            self._asked, self._idle_since = False, now
        elif self._sorted is not None and now - self._idle_since >= IDLE_S:
            self._sorted, self._changes = None, []

    def _note(self, item: bytes, *, came: bool) -> None:
        assert self._sorted is not None
        self._changes.append((item, came))
        if len(self._changes) * _STEP_SHARE > len(self._sorted):
            self._sorted, self._changes = None, []

    def _stepped(self, before: list[bytes]) -> list[bytes]:
        ids = before.copy()
        for item, came in self._changes:
            if came:
                insort(ids, item)
            else:
                del ids[bisect_left(ids, item)]
        return ids
