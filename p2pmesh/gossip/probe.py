"""Watching neighbours: probes, round-trip times, and how often an answer is missing. Pure.

What is counted here is this node's own view. One missed answer or a broken link is enough for
routing to avoid a node; placement asks for more, see `suspicion`. How many misses in a row make a
suspicion grows with each that turned out to be false on a link that stayed, so a lossy path is
given more time than a good one (the idea of Lifeguard's awareness, per link).
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from p2pmesh.identity.keys import NodeId

PROBE_INTERVAL_S = 1.0
PROBE_TIMEOUT_S = 0.5
MISSES_MIN, MISSES_MAX = 3, 8  # in a row until a node is suspected
CALM_S = 60.0  # without a false alarm takes one miss off again
SILENCE_S = 1.75  # nothing from a node that should be probing this one
# A kernel sends again ever more rarely, so a link that was cut for long stays mute as long again;
# a new one is there as soon as packets pass.
MUTE_S = 5.0
# If none says anything it is this machine that came to another network, or lost it: its links are
# dead, and there is time to come back by new ones before the others agree that it is gone.
ALL_MUTE_S = 2.25
RTT_SMOOTHING = 0.25  # weight of the newest sample
DUE_SLACK_S = 1e-6  # of a timer that fires as asked, in floats


@dataclass(slots=True)
class _Watched:
    linked: bool = False
    heard_at: float | None = None
    missing_since: float | None = None  # not linked although it should be
    misses: int = 0
    miss_limit: int = MISSES_MIN
    alarm_at: float = 0.0
    asked: int | None = None  # token of the probe that is under way
    asked_at: float = 0.0
    rtt_s: float | None = None

    def silent_s(self, now: float) -> float:
        """Since when nothing came."""
        return now - (self.heard_at or 0.0)


class Prober:
    """The answers of the watched nodes: round trips, and how many in a row are missing."""

    def __init__(self) -> None:
        self._nodes: dict[NodeId, _Watched] = {}
        self._token = 0

    def misses(self, node: NodeId) -> int:
        """Answers missed in a row; seconds without a link count like answers."""
        watched = self._nodes.get(node)
        return watched.misses if watched else 0

    def miss_limit(self, node: NodeId) -> int:
        """How many misses make `node` suspect."""
        watched = self._nodes.get(node)
        return watched.miss_limit if watched else MISSES_MIN

    def doubts(self, node: NodeId) -> bool:
        """Whether one more miss makes `node` suspect."""
        return self.misses(node) >= self.miss_limit(node) - 1

    def heard_at(self, node: NodeId) -> float | None:
        """When anything last came from `node`; None: never."""
        watched = self._nodes.get(node)
        return watched.heard_at if watched else None

    def rtt_s(self, node: NodeId) -> float | None:
        """Smoothed round-trip time, None before the first answer."""
        watched = self._nodes.get(node)
        return watched.rtt_s if watched else None

    def answering(self, node: NodeId) -> bool:
        """Whether there is a link and nothing is missing on it."""
        watched = self._nodes.get(node)
        return watched is not None and watched.linked and not watched.misses

    def link_up(self, node: NodeId, now: float) -> None:
        """There is a link: proof of life."""
        watched = self._nodes.setdefault(node, _Watched())
        watched.linked, watched.asked, watched.misses = True, None, 0
        watched.heard_at, watched.missing_since = now, None

    def link_down(self, node: NodeId, now: float) -> None:
        """The link broke."""
        watched = self._nodes.setdefault(node, _Watched())
        watched.linked, watched.asked, watched.missing_since = False, None, now

    def nobody_there(self, node: NodeId) -> None:
        """Its machine says that it does not run: as good as all misses."""
        watched = self._nodes.setdefault(node, _Watched())
        if not watched.linked:
            watched.misses = max(watched.misses, watched.miss_limit)

    def heard(self, node: NodeId, now: float) -> None:
        """Anything came from `node` over its link."""
        watched = self._nodes.setdefault(node, _Watched())
        if watched.linked and watched.misses >= MISSES_MIN - 1:
            watched.miss_limit = min(watched.miss_limit + 1, MISSES_MAX)
            watched.alarm_at = now
        watched.heard_at, watched.misses = now, 0

    def quiet(self, node: NodeId, now: float) -> bool:
        """Whether a linked node has said nothing for longer than probes of its own take."""
        watched = self._nodes.get(node)
        return watched is not None and watched.silent_s(now) > SILENCE_S

    def unresponsive_links(self, now: float) -> list[NodeId]:
        """Linked nodes that have been silent for so long that the link is to blame.

        Args:
            now: In seconds.
        """
        linked = [(node, watched) for node, watched in self._nodes.items() if watched.linked]
        asked = [(node, watched) for node, watched in linked if watched.misses]
        if asked and all(watched.silent_s(now) >= ALL_MUTE_S for _, watched in linked):
            return sorted(node for node, _ in linked)
        return sorted(node for node, watched in asked if watched.silent_s(now) >= MUTE_S)

    def ask(self, node: NodeId, now: float) -> int | None:
        """The token of a probe to send now; None while one is under way."""
        watched = self._nodes[node]
        if watched.asked is not None:
            return None
        self._token += 1
        watched.asked, watched.asked_at = self._token, now
        return self._token

    def answered(self, node: NodeId, token: int, now: float) -> float | None:
        """The answer to a probe came; returns its round-trip time.

        None for an answer that nobody waits for any more: only a sign of life.
        """
        watched = self._nodes.get(node)
        if watched is None or watched.asked != token:
            return None
        watched.asked = None
        sample = now - watched.asked_at
        old = watched.rtt_s
        watched.rtt_s = sample if old is None else old + RTT_SMOOTHING * (sample - old)
        return sample

    def count(self, wanted: AbstractSet[NodeId], now: float) -> list[NodeId]:
        """Count what is missing now; returns the nodes whose count of misses grew.

        Args:
            wanted: Nodes that there should be a link to; each second without one is a miss.
            now: In seconds.
        """
        grew: list[NodeId] = []
        for node, watched in self._nodes.items():
            if (
                watched.asked is not None
                and now - watched.asked_at >= PROBE_TIMEOUT_S - DUE_SLACK_S
            ):
                watched.asked = None
                watched.misses += 1
                grew.append(node)
            if watched.miss_limit > MISSES_MIN and now - watched.alarm_at >= CALM_S:
                watched.miss_limit, watched.alarm_at = watched.miss_limit - 1, now
            if not watched.linked and node not in wanted:
                # Nothing is missing; when it is wanted again its time begins anew.
                watched.missing_since, watched.misses = None, 0
        for node in wanted:
            watched = self._nodes.setdefault(node, _Watched())
            if watched.linked:
                continue
            if watched.missing_since is None:
                watched.missing_since = now
            elif now - watched.missing_since >= PROBE_INTERVAL_S - DUE_SLACK_S:
                watched.missing_since += PROBE_INTERVAL_S
                watched.misses += 1
                grew.append(node)
        return grew

    def forgive(self, now: float) -> None:
        """This node itself was away: nobody is blamed for the silence meanwhile."""
        for watched in self._nodes.values():
            watched.asked, watched.misses = None, 0
            if watched.linked:
                watched.heard_at = now
            if watched.missing_since is not None:
                watched.missing_since = now

    def keep_only(self, nodes: Iterable[NodeId]) -> None:
        """Drop what is kept of nodes that are neither linked nor among `nodes`."""
        keep = set(nodes)
        for node in [n for n, w in self._nodes.items() if not w.linked and n not in keep]:
            del self._nodes[node]
