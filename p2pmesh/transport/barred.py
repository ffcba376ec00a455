"""Who broke the protocol and has to stay away for a while.

Pure. A hostile member would otherwise come straight back, and each hello costs both sides the
same. The pause doubles with each time and is forgotten after long good conduct, so that a peer
with a passing fault is back in a second.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from p2pmesh.identity.keys import NodeId

BAR_FIRST_S = 1.0
BAR_MAX_S = 60.0
GOOD_CONDUCT_S = 600.0  # after the last pause: then it starts from the first again
BARRED_MAX = 1024  # nodes remembered; beyond that the one that misbehaved longest ago is forgotten


@dataclass(slots=True)
class _Bar:
    until: float
    times: int


class Barred:
    """Pauses by node."""

    def __init__(self) -> None:
        self._bars: OrderedDict[NodeId, _Bar] = OrderedDict()

    def bar(self, node: NodeId, now: float) -> float:
        """Keep `node` away from now on; returns for how many seconds."""
        bar = self._bars.pop(node, None)
        if bar is None or now >= bar.until + GOOD_CONDUCT_S:
            bar = _Bar(until=now, times=0)
        pause_s: float = min(BAR_MAX_S, BAR_FIRST_S * 2.0**bar.times)
        if pause_s < BAR_MAX_S:
            bar.times += 1
        bar.until = now + pause_s
        self._bars[node] = bar
        if len(self._bars) > BARRED_MAX:
            self._bars.popitem(last=False)
        return pause_s

    def is_barred(self, node: NodeId, now: float) -> bool:
        """Whether it has to stay away still."""
        bar = self._bars.get(node)
        return bar is not None and now < bar.until
