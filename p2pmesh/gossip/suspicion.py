"""From missed answers to an accusation: what this node does about the nodes that it observes. Pure.

A subject that misses answers is asked for through others first: up to three neighbours say whether
they can reach it, while the last of its probes is still under way. Only when it missed enough and
none of them can reach it does this node accuse it. A subject that it never reached itself is given
twice the time unless two others, or all there are, cannot reach it either, and needs somebody's
word of that. Whoever
was wrong about a subject waits before it accuses that one again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from heapq import nsmallest
from itertools import islice

from p2pmesh.gossip.members import Members
from p2pmesh.gossip.probe import Prober
from p2pmesh.identity.keys import NodeId
from p2pmesh.wire.evidence import ACCUSED_MAX, Accusation

HELPERS_MAX = 3
SUSPECTS_PER_TURN = 32  # asked about at once; in a mass crash a node observes about ten of them
TOLD_WITHIN_S = 1.0  # helpers that did not say by then do not count
ASK_AGAIN_S = 2.0  # what helpers said holds that long
REST_FIRST_S, REST_MAX_S = 2.0, 60.0  # before accusing again whom one was wrong about
KEPT_AFTER_REMOVAL_S = 60.0  # from then on an accusation makes room for others, if there is none
STRANGER_FACTOR = 2  # how much longer for a subject that was never reached
DENIERS_SURE = 2  # unless so many others, or all there are, cannot reach it either


@dataclass(slots=True)
class _Suspect:
    """This node's findings about one silent subject.

    Attributes:
        helpers: Whom it asked and who has not answered yet.
        epoch: The life of the subject that it is about.
        deniers: Who said that the subject cannot be reached.
        vouched_at: When somebody last said that it can.
    """

    token: int
    asked_at: float
    epoch: int
    helpers: set[NodeId] = field(default_factory=set)
    deniers: set[NodeId] = field(default_factory=set)
    vouched_at: float | None = None


@dataclass(slots=True)
class _Backoff:
    until: float
    rest_s: float


@dataclass(frozen=True, slots=True)
class Question:
    """Have `helper` asked whether it can reach `subject`."""

    helper: NodeId
    subject: NodeId
    token: int


class Suspicion:
    """This node's accusations and how it comes to them.

    Args:
        members: The members.
        prober: What was measured.
    """

    def __init__(self, members: Members, prober: Prober) -> None:
        self.accusations: dict[NodeId, Accusation] = {}
        self._members, self._prober = members, prober
        self._suspects: dict[NodeId, _Suspect] = {}
        self._rests: dict[NodeId, _Backoff] = {}
        self._reached: dict[NodeId, int] = {}
        self._removed_at: dict[NodeId, float] = {}
        self._token = 0

    def heard(self, node: NodeId) -> None:
        """Anything came from `node`: it is alive in its present epoch."""
        self._suspects.pop(node, None)
        known = self._members.known.get(node)
        if known is not None:
            self._reached[node] = known.epoch

    def told(self, helper: NodeId, subject: NodeId, token: int, *, alive: bool, now: float) -> None:
        """A helper said whether it can reach `subject`."""
        suspect = self._suspects.get(subject)
        if suspect is None or suspect.token != token or helper not in suspect.helpers:
            return
        suspect.helpers.discard(helper)
        if alive:
            suspect.vouched_at = now
            suspect.deniers.clear()
        else:
            suspect.deniers.add(helper)

    def ask(
        self,
        subjects: Iterable[NodeId],
        helpers: Callable[[NodeId, int], list[NodeId]],
        now: float,
    ) -> list[Question]:
        """Return probe requests about subjects that miss answers.

        Args:
            subjects: Whom this node observes.
            helpers: Neighbours to ask about a subject, best first; the number varies the choice.
            now: In seconds.
        """
        questions: list[Question] = []
        for subject in self._most_urgent(subjects, now):
            suspect, epoch = self._suspect(subject), self._epoch(subject)
            self._token += 1
            asked = helpers(subject, self._token)[:HELPERS_MAX]
            fresh = _Suspect(self._token, now, epoch, helpers=set(asked))
            if suspect is not None:
                fresh.deniers, fresh.vouched_at = suspect.deniers, suspect.vouched_at
            self._suspects[subject] = fresh
            questions += [Question(helper, subject, self._token) for helper in asked]
        return questions

    def review(self, subjects: Iterable[NodeId], removed: Iterable[NodeId], now: float) -> bool:
        """Accuse and withdraw; returns whether `accusations` changed.

        Args:
            subjects: Whom this node observes now.
            removed: Whom the mesh has removed.
            now: In seconds.
        """
        before = dict(self.accusations)
        self._withdraw(frozenset(removed), now)
        for subject in sorted(subjects, key=lambda one: (not self._was_reached(one), one)):
            known = self._members.known.get(subject)
            if known is None or known.left or subject in self.accusations:
                continue
            if self._has_row_for(subject) and self._is_due(subject, known.epoch, now):
                self._make_room()
                self.accusations[subject] = Accusation(subject, *known.version)
        return self.accusations != before

    def forgive(self) -> None:
        """This node itself was away: what it had found out means nothing."""
        self._suspects.clear()

    def _most_urgent(self, subjects: Iterable[NodeId], now: float) -> list[NodeId]:
        """Choose the subjects of this turn: those that this node once reached come first.

        Records of members that never were anywhere cost their owner nothing, and are many: what
        they take of this node's time is bounded, and nobody else waits behind them.
        """
        due: list[tuple[bool, float, NodeId]] = []
        for subject in subjects:
            if not self._prober.doubts(subject):
                continue
            suspect = self._suspect(subject)
            asked_at = -math.inf if suspect is None else suspect.asked_at
            if now - asked_at >= ASK_AGAIN_S:
                due.append((not self._was_reached(subject), asked_at, subject))
        return [subject for *_, subject in nsmallest(SUSPECTS_PER_TURN, due)]

    def _suspect(self, subject: NodeId) -> _Suspect | None:
        """Return the findings about the present version of `node`."""
        suspect = self._suspects.get(subject)
        return suspect if suspect is not None and suspect.epoch == self._epoch(subject) else None

    def _epoch(self, subject: NodeId) -> int:
        known = self._members.known.get(subject)
        return known.epoch if known is not None else 0

    def _was_reached(self, subject: NodeId) -> bool:
        return self._reached.get(subject) == self._epoch(subject)

    def _has_row_for(self, subject: NodeId) -> bool:
        # A stranger, whom this node never reached, gives way to a subject that was there.
        return len(self.accusations) < ACCUSED_MAX or (
            self._was_reached(subject) and not all(map(self._was_reached, self.accusations))
        )

    def _make_room(self) -> None:
        """Withdraw the accusation of a stranger, if there is no row left."""
        if len(self.accusations) >= ACCUSED_MAX:
            stranger = next(one for one in self.accusations if not self._was_reached(one))
            del self.accusations[stranger]
            self._removed_at.pop(stranger, None)

    def _is_due(self, subject: NodeId, epoch: int, now: float) -> bool:
        suspect, rest = self._suspects.get(subject), self._rests.get(subject)
        if suspect is None or suspect.epoch != epoch or (rest and now < rest.until):
            return False
        reached, others = self._was_reached(subject), self._count_others(subject)
        sure = reached or len(suspect.deniers) >= max(1, others)
        miss_limit = self._prober.miss_limit(subject) * (1 if sure else STRANGER_FACTOR)
        waiting = suspect.helpers and now - suspect.asked_at < TOLD_WITHIN_S
        vouched = suspect.vouched_at is not None and now - suspect.vouched_at < ASK_AGAIN_S
        return (
            self._prober.misses(subject) >= miss_limit
            and not waiting
            and not vouched
            and (reached or bool(suspect.deniers) or not others)
        )

    def _count_others(self, subject: NodeId) -> int:
        """How many else could know whether a node is there; as many as are asked for, at most."""
        known = {subject, self._members.me}
        others = (n for n in self._members.live if n not in known and n not in self.accusations)
        return sum(1 for _ in islice(others, DENIERS_SURE))

    def _withdraw(self, removed: frozenset[NodeId], now: float) -> None:
        for subject, accusation in list(self.accusations.items()):
            known = self._members.known.get(subject)
            if known is None or known.left:
                del self.accusations[subject]
            elif known.version != (accusation.epoch, accusation.seq):
                del self.accusations[subject]
                if known.epoch == accusation.epoch:
                    self._take_a_rest(subject, now)
            elif self._prober.answering(subject):
                del self.accusations[subject]
                self._take_a_rest(subject, now)
            elif subject in removed:
                # It stays, for parts of the mesh that come back later and count votes anew.
                since = self._removed_at.setdefault(subject, now)
                full = len(self.accusations) >= ACCUSED_MAX
                if full and now - since > KEPT_AFTER_REMOVAL_S:
                    del self.accusations[subject]
            if subject not in self.accusations:
                self._removed_at.pop(subject, None)
        for kept in (self._reached, self._suspects):
            for subject in kept.keys() - self._members.known.keys():
                del kept[subject]

    def _take_a_rest(self, subject: NodeId, now: float) -> None:
        rest = self._rests.get(subject)
        rest_s = REST_FIRST_S if rest is None else min(2 * rest.rest_s, REST_MAX_S)
        self._rests = {s: r for s, r in self._rests.items() if now - r.until < 10 * REST_MAX_S}
        self._rests[subject] = _Backoff(now + rest_s, rest_s)
