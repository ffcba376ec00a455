"""One node that observes another and may ask helpers, for tests."""

from __future__ import annotations

from dataclasses import dataclass, field

from p2pmesh.gossip.probe import MISSES_MIN, PROBE_TIMEOUT_S, Prober
from p2pmesh.gossip.suspicion import Question, Suspicion
from p2pmesh.identity.keys import NodeId
from p2pmesh.wire.records import Record
from tests.gossip.builders import View, mesh_of
from tests.state.builders import NODES

SUBJECT, HELPERS = NODES[1], list(NODES[2:5])


@dataclass
class Observer:
    """Node 0, which observes node 1 and may ask the others."""

    now: float = 0.0
    view: View = field(default_factory=lambda: mesh_of(5))
    prober: Prober = field(default_factory=Prober)
    helpers: list[NodeId] = field(default_factory=lambda: list(HELPERS))
    subjects: set[NodeId] = field(default_factory=lambda: {SUBJECT})

    def __post_init__(self) -> None:
        self.suspicion = Suspicion(self.view.members, self.prober)

    @property
    def accuses(self) -> bool:
        return SUBJECT in self.suspicion.accusations

    def link(self, node: NodeId = SUBJECT) -> None:
        self.prober.link_up(node, self.now)
        self.suspicion.heard(node)

    def hear(self) -> None:
        self.prober.heard(SUBJECT, self.now)
        self.suspicion.heard(SUBJECT)

    def miss(self, count: int, node: NodeId = SUBJECT) -> None:
        for _ in range(count):
            self.prober.ask(node, self.now)
            self.now += PROBE_TIMEOUT_S
            self.prober.count({node}, self.now)

    def ask(self) -> list[Question]:
        return self.suspicion.ask(self.subjects, lambda _subject, _turn: self.helpers, self.now)

    def tell(self, questions: list[Question], *, alive: bool) -> None:
        for one in questions:
            self.suspicion.told(one.helper, one.subject, one.token, alive=alive, now=self.now)

    def review(self) -> bool:
        return self.suspicion.review(self.subjects, self.view.document.removed, self.now)

    def learn(self, *facts: Record) -> None:
        self.view.learn(*facts)


def silent() -> Observer:
    """The subject was reached once and has missed enough answers; nobody was asked yet."""
    observer = Observer()
    observer.link()
    observer.miss(MISSES_MIN)
    return observer


def accusing() -> Observer:
    observer = silent()
    observer.tell(observer.ask(), alive=False)
    assert observer.review()
    assert observer.accuses
    return observer
