"""Finding out for others whether a node can be reached. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from p2pmesh.gossip.buckets import Buckets
from p2pmesh.gossip.events import Send
from p2pmesh.gossip.probe import DUE_SLACK_S
from p2pmesh.identity.keys import NodeId
from p2pmesh.wire.messages import ProbeReport, ProbeRequest

ERRANDS_MAX = 256  # under way; in a mass crash each neighbour asks about five
ERRANDS_OF_ONE_MAX = 32  # of one asker: each may cost a dial, and others ask as well
ERRANDS_PER_S, ERRANDS_BURST = 20.0, 64  # of one asker; in a mass crash it asks about ten
ERRAND_S = 0.6  # a probe's time-out and a little more; askers wait longer


@dataclass(frozen=True, slots=True)
class _Errand:
    asker: NodeId
    ask: ProbeRequest
    until: float


class ProbeRelay:
    """The indirect probes that this node was asked for and has not answered yet."""

    def __init__(self) -> None:
        self._indirect: list[_Errand] = []
        self._askers: Buckets[NodeId] = Buckets(ERRANDS_PER_S, ERRANDS_BURST)

    def accept(self, asker: NodeId, ask: ProbeRequest, now: float) -> bool:
        """Take one on, unless there are too many."""
        of_one = sum(one.asker == asker for one in self._indirect)
        if len(self._indirect) >= ERRANDS_MAX or of_one >= ERRANDS_OF_ONE_MAX:
            return False
        if not self._askers.take(asker, now):
            return False
        self._indirect.append(_Errand(asker, ask, now + ERRAND_S))
        return True

    def found(self, subject: NodeId, *, alive: bool) -> list[Send]:
        """It is known now whether `subject` can be reached."""
        if not self._indirect:
            return []
        done = [one for one in self._indirect if one.ask.subject == subject]
        return self._report(done, alive=alive)

    def overdue(self, now: float) -> list[Send]:
        """Answer probes that ran out of time: their subjects count as not reached."""
        return self._report(
            [one for one in self._indirect if now >= one.until - DUE_SLACK_S], alive=False
        )

    def _report(self, done: list[_Errand], *, alive: bool) -> list[Send]:
        if not done:
            return []
        self._indirect = [one for one in self._indirect if one not in done]
        return [
            Send(
                node=one.asker,
                message=ProbeReport(subject=one.ask.subject, token=one.ask.token, alive=alive),
            )
            for one in done
        ]
