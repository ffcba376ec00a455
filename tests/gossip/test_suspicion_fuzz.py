"""Suspicion, whatever happens in whatever order."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from p2pmesh.gossip.probe import MISSES_MIN
from p2pmesh.gossip.suspicion import ASK_AGAIN_S, REST_FIRST_S, Question
from p2pmesh.identity.keys import NodeId
from tests.gossip.builders import STARTED, member_of
from tests.gossip.observer import HELPERS, SUBJECT, Observer


class Suspicions(RuleBasedStateMachine):
    """One subject, reached or not, and helpers that say this or that, or nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.observer = Observer()
        self.asked: list[Question] = []
        self.seq = 1
        self.vouched_at = -1e9
        self.denied = self.reached = False
        self.withdrawn_at: float | None = None

    @rule()
    def link_up(self) -> None:
        self.observer.link()
        self.denied, self.reached = False, True

    @rule()
    def link_down(self) -> None:
        self.observer.prober.link_down(SUBJECT, self.observer.now)

    @rule()
    def hear(self) -> None:
        if self.observer.prober.heard_at(SUBJECT) is not None:
            self.observer.hear()
            self.denied, self.reached = False, True

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 3.0]))
    def wait(self, seconds: float) -> None:
        if self.observer.prober.heard_at(SUBJECT) is not None:
            self.observer.prober.ask(SUBJECT, self.observer.now)
        self.observer.now += seconds
        self.observer.prober.count({SUBJECT}, self.observer.now)

    @rule()
    def ask(self) -> None:
        self.asked += self.observer.ask()

    @rule(alive=st.booleans(), which=st.integers(0, 99))
    def tell(self, which: int, *, alive: bool) -> None:
        if self.asked:
            self.observer.tell([self.asked[which % len(self.asked)]], alive=alive)
            self.denied |= not alive

    @rule(helper=st.sampled_from(HELPERS))
    def vouch_in_time(self, helper: NodeId) -> None:
        asked = self.observer.ask()
        self.asked += asked
        for one in asked:
            if one.helper == helper:
                self.observer.tell([one], alive=True)
                self.vouched_at = self.observer.now

    @rule()
    def refute(self) -> None:
        self.seq += 1
        self.observer.learn(member_of(1, self.seq))

    @rule()
    def review(self) -> None:
        before = self.observer.accuses
        changed = self.observer.review()
        assert changed == (before != self.observer.accuses) or before
        now = self.observer.now
        if self.observer.accuses and not before:
            assert now - self.vouched_at >= ASK_AGAIN_S, "somebody has just reached it"
            assert self.reached or self.denied, "nobody has ever said that it is not there"
            assert self.observer.prober.misses(SUBJECT) >= MISSES_MIN
            if self.withdrawn_at is not None:
                assert now - self.withdrawn_at >= REST_FIRST_S, "it was wrong a moment ago"
        elif before and not self.observer.accuses:
            self.withdrawn_at = now

    @invariant()
    def the_version_accused_was_the_one_that_stood(self) -> None:
        for row in self.observer.suspicion.accusations.values():
            assert row.subject == SUBJECT
            assert row.epoch == STARTED
            assert row.seq <= self.seq


TestSuspicions = Suspicions.TestCase
