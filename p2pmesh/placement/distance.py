"""How far nodes are from each other, in classes of round-trip times.

Pure. A pipeline waits for every stage once per token, so a stage across a VPN costs more than all
that it computes. Round trips move all the time and plans must not, so nodes tell classes: a link is
near, in the same town, in the same part of the world, or further away.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from p2pmesh.identity.keys import NodeId

NEAR, FARTHEST = 0, 3
# Of each class but the first the round trip from which on it is taken: a busy Wi-Fi takes 10 ms.
FROM_US = (15_000, 40_000, 150_000)
MARGIN_PERCENT = 125  # a link changes its class only when it is well within the other one
# From one machine to another, both ends of the tunnel included, which take nearly all of it between
# near ones; the middle of the class.
ONE_WAY_NS = (1_000_000, 12_000_000, 40_000_000, 120_000_000)
# The shortest of so many looks counts: a link that is full of weights answers late.
LOOKS = 12


def link_class(rtt_us: int, before: int | None = None) -> int:
    """The class of a link with this round trip.

    Args:
        rtt_us: As measured.
        before: The class that it was in, which it keeps close to a border; None for none.
    """
    if before is None:
        return sum(rtt_us >= border_us for border_us in FROM_US)
    least = sum(rtt_us * 100 >= border_us * MARGIN_PERCENT for border_us in FROM_US)
    most = sum(rtt_us * MARGIN_PERCENT >= border_us * 100 for border_us in FROM_US)
    return min(max(before, least), most)


class Link:
    """One link, as it is looked at again and again.

    Attributes:
        link_class: Its class; None before the first look.
    """

    def __init__(self) -> None:
        self.link_class: int | None = None
        self._latest_us: deque[int] = deque(maxlen=LOOKS)

    def look(self, rtt_us: int) -> None:
        """Take the round trip of one look."""
        self._latest_us.append(rtt_us)
        self.link_class = link_class(min(self._latest_us), self.link_class)


class Distances:
    """The classes between nodes, by what both ends say: the larger one counts.

    A node that exaggerates is left out of pipelines, which it can have more easily. Pairs of which
    nobody says anything are near.
    """

    def __init__(self, said: Iterable[tuple[NodeId, Sequence[tuple[NodeId, int]]]]) -> None:
        """Take each node with what it says of others."""
        self._of: Mapping[NodeId, Mapping[NodeId, int]] = {
            node: dict(far) for node, far in said if far
        }

    def between(self, one: NodeId, other: NodeId) -> int:
        """Return the class of the link between two nodes; of a node with itself NEAR."""
        if not self._of or one == other:
            return NEAR
        nothing: Mapping[NodeId, int] = {}
        there = self._of.get(one, nothing).get(other, NEAR)
        return max(there, self._of.get(other, nothing).get(one, NEAR))
