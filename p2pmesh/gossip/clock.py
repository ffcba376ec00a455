"""The time that records are stamped and judged with. Pure.

Mesh time is this node's clock plus the median of what the clocks of its peers showed last against
it, its own being one of them: as long as fewer than half lie, the median lies between what two
honest ones say. Compared are the clocks themselves, not what each has made of them: corrected
times that are corrected by each other could wander off together. No sample counts for more than
a minute, which is what `hello` lets in. The correction moves slowly, so mesh time never goes back
and never leaps; only the first estimate that a single liar cannot make may leap, and forward only.
"""

from __future__ import annotations

from statistics import median

from p2pmesh.identity.keys import NodeId

OFFSET_S_MAX = 60.0
SLEW = 0.1  # how much faster or slower than this node's clock mesh time runs until it is right
STEP_SAMPLES_MIN = 2  # with this node's own clock: one liar among three is outvoted
SAMPLES_MAX = 256  # more peers than that have nothing to add


class MeshClock:
    """Mesh time as one node makes it out."""

    __slots__ = ("_at", "_now", "_offset_s", "_samples", "_stepped", "_target_s")

    def __init__(self) -> None:
        self._samples: dict[NodeId, float] = {}
        self._target_s = self._offset_s = 0.0
        self._at: float | None = None
        self._now = 0.0
        self._stepped = False

    @property
    def offset_s(self) -> float:
        """Return the seconds that are added to this node's clock at present."""
        return self._offset_s

    def observe(self, node: NodeId, offset_s: float) -> None:
        """A peer's clock was seen; it replaces what was seen of it before.

        Args:
            node: The peer.
            offset_s: How much more the peer's own clock showed than this node's at that moment.
        """
        if node in self._samples or len(self._samples) < SAMPLES_MAX:
            self._samples[node] = _clamped(offset_s)
            self._aim()

    def forget(self, node: NodeId) -> None:
        """The peer is gone, and so is its vote."""
        if self._samples.pop(node, None) is not None:
            self._aim()

    def now(self, local: float) -> float:
        """Mesh time; never less than it said before.

        Args:
            local: This node's own clock in seconds.
        """
        if local == self._at and self._stepped:
            return self._now  # asked again within one event
        slew_s = SLEW * max(0.0, local - self._at) if self._at is not None else 0.0
        self._at = local if self._at is None else max(self._at, local)
        wanted = self._target_s - self._offset_s
        if not self._stepped and len(self._samples) >= STEP_SAMPLES_MIN:
            self._stepped = True
            slew_s = max(slew_s, wanted)
        self._offset_s += max(-slew_s, min(slew_s, wanted))
        self._now = max(self._now, local + self._offset_s)
        return self._now

    def _aim(self) -> None:
        self._target_s = median([0.0, *self._samples.values()])


def _clamped(offset_s: float) -> float:
    return max(-OFFSET_S_MAX, min(OFFSET_S_MAX, offset_s))
