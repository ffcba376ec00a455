"""Peers that broke the protocol and are refused for a while.

Pure. A hostile member would otherwise come straight back. A node's pause doubles with each time
and is forgotten after long good conduct, so that a peer with a passing fault is back in a second.
But a node is known only after TLS and hello, which cost milliseconds; so trouble is counted by
network too, and a network with too much of it is hung up on before.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from p2pmesh.identity.keys import NodeId

BAR_FIRST_S = 1.0
BAR_MAX_S = 60.0
GOOD_CONDUCT_S = 600.0  # after the last pause: then it starts from the first again
BARRED_MAX = 1024  # nodes remembered; beyond that the one that misbehaved longest ago is forgotten

TROUBLE_RATE_PER_S = 4.0  # hellos that come to nothing, from one network: 2 % of a core
TROUBLE_BURST = 128  # before that, as many machines may share one network
HOSTS_MAX = 1024  # networks remembered, as for nodes


@dataclass(slots=True)
class _Bar:
    until: float
    times: int


class Banlist:
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


class Troublesome:
    """How much trouble came from each network lately."""

    def __init__(self) -> None:
        self._paid_until: OrderedDict[str, float] = OrderedDict()

    def note(self, network: str, now: float) -> None:
        """One more connection from `network` came to nothing by its own fault."""
        paid_until = max(self._paid_until.pop(network, now), now) + 1 / TROUBLE_RATE_PER_S
        self._paid_until[network] = paid_until
        if len(self._paid_until) > HOSTS_MAX:
            self._paid_until.popitem(last=False)

    def is_too_much(self, network: str, now: float) -> bool:
        """Whether the next connection from `network` is not worth a hello."""
        return self._paid_until.get(network, now) - now > TROUBLE_BURST / TROUBLE_RATE_PER_S
