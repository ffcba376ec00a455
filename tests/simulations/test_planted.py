"""Known bugs are planted in the core, and the simulator has to find each within 200 seeds."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from p2pmesh.gossip import removal
from p2pmesh.gossip.antientropy import AntiEntropy
from p2pmesh.gossip.core import Core
from p2pmesh.gossip.events import PersistEpoch, SetTimer, StateChanged, TwinFound
from p2pmesh.gossip.membership import Gossip
from p2pmesh.gossip.overlay import RINGS
from p2pmesh.gossip.publisher import Publisher
from p2pmesh.gossip.ranges import Reply
from p2pmesh.gossip.receive import Receiver
from p2pmesh.gossip.removal import Removal
from p2pmesh.gossip.suspicion import Suspicion
from p2pmesh.identity.keys import NodeId
from p2pmesh.placement.facts import PlacementInputs
from p2pmesh.placement.inputs import facts_of
from p2pmesh.state import document, outcome, owner_records
from p2pmesh.state.document import Document, MergeOutcome, MergeResult
from p2pmesh.state.fingerprint import Fingerprint
from p2pmesh.state.owner_records import OwnerRecords
from p2pmesh.wire.facts import Fact
from p2pmesh.wire.records import Record
from simulations import cache, checkers
from simulations.runner import play
from simulations.scenario import Scenario, Step, load

SEEDS = range(1, 201)
QUIET = 2 if os.environ.get("P2PMESH_TESTS") == "full" else 1  # seeds in which nothing is found
QUICK = 5  # seeds within which the quick tier expects each of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Bug:
    """A bug: what it does to the core, where it shows, and what the simulator says then."""

    plant: Callable[[pytest.MonkeyPatch], None]
    scenario: Scenario
    found: str
    nodes: int = 5


def short(name: str, **changes: Any) -> Scenario:
    lengths: dict[str, Any] = {"safety_s": 30, "liveness_s": 15, "idle_s": 0}
    return replace(load(name), **{**lengths, **changes})


def once(fault: str, at_s: float, **arguments: Any) -> Step:
    return Step(fault=fault, at_s=at_s, arguments=arguments)


def lost_disk() -> Scenario:
    """A clock is set back, then a disk is lost: its node has an epoch from before."""
    steps = (
        once("clock", 12, seconds=-18, count=4),
        once("crash", 14, count=4, disk="lost", for_s=1.0),
    )
    return short("spread", steps=steps, limits={}, liveness_s=30)


def newcomer() -> Scenario:
    """Somebody comes who saw nothing of what was said before."""
    return short("spread", steps=(once("join", 20),), limits={})


def dropping() -> Scenario:
    """On the only link, more messages vanish than arrive."""
    return short("drop", steps=(once("knob", 10, name="drop", value=0.6),))


def old_pages() -> Scenario:
    """A hostile owner's pages are void once it has a new epoch, and come again."""
    steps = (
        once("exceed_quota", 12, count=10, size_bytes=10),
        Step(fault="equivocate", every_s=5),
        Step(fault="replay", every_s=1, arguments={"oldest": False, "count": 50}),
    )
    return short("attack", steps=steps)


def forging(kind: str) -> Scenario:
    """One kind of forgery, and nothing for which a peer is cut off."""
    return short("attack", steps=(Step(fault="forge", every_s=2, arguments={"kind": kind}),))


def hoarding() -> Scenario:
    """More than an owner may have, in the burst that others take."""
    return short("attack", steps=(once("exceed_quota", 15, count=20, size_bytes=15_000),))


def one_liar() -> Scenario:
    """One hostile node accuses living ones."""
    return short("liars", hostile=1, steps=(Step(fault="accuse", every_s=5),))


def conspiracy() -> Scenario:
    """One fewer than it takes accuse the same node, at a moment when some cannot answer."""
    steps = once("freeze", 15, count=4, for_s=5.0), once("accuse", 15.3)
    return short("liars", hostile=3, steps=steps)


def frozen() -> Scenario:
    """A process stands still for longer than it takes to be removed."""
    return short("churn", steps=(once("freeze", 15, for_s=14.0),))


def halved() -> Scenario:
    """Half of the nodes die at once, and with them most observers of somebody."""
    return short("half", steps=(once("crash", 20, how="power", share=0.7),))


# --- records --------------------------------------------------------------------------------------


def older_wins(patch: pytest.MonkeyPatch) -> None:
    def careless(record: Record, held: OwnerRecords, *arguments: Any) -> MergeOutcome:
        mine = held.records.get(record.register)
        older = mine is not None and record.version < mine.version
        return MergeOutcome.NEWS if older else outcome.judge(record, held, *arguments)

    patch.setattr(document, "judge", careless)
    patch.setattr(Document, "stale", lambda *_: False)


def expired_records_live_on(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(owner_records, "EXPIRY_GRACE_S", 10**6)
    patch.setattr(outcome, "EXPIRY_GRACE_S", 10**6)


def signatures_unchecked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cache, "verify_record", lambda record: True)


def far_epochs_believed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(outcome, "EPOCH_AHEAD_S_MAX", 10**9)


def one_owner_takes_all(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(owner_records, "OWNER_BYTES_MAX", 10**9)


def unknown_registers_dropped(patch: pytest.MonkeyPatch) -> None:
    take = Receiver._fact

    def careless(self: Receiver, node: NodeId, fact: Fact, *arguments: Any) -> None:
        if not isinstance(fact, Record) or fact.register != "future":
            take(self, node, fact, *arguments)

    patch.setattr(Receiver, "_fact", careless)


# --- repair ---------------------------------------------------------------------------------------


def repair_skips_the_first_leaf(patch: pytest.MonkeyPatch) -> None:
    build = Reply.__init__

    def careless(self: Reply, *arguments: Any, **named: Any) -> None:
        build(self, *arguments, **named)
        self.items = [one for one in self.items if one.lower]

    patch.setattr(Reply, "__init__", careless)


def never_repairs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AntiEntropy, "compare", lambda *_, **__: [])
    patch.setattr(AntiEntropy, "lacking", lambda *_, **__: [])


def fingerprint_keeps_the_dropped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Fingerprint, "remove", lambda *_: None)


# --- evidence -------------------------------------------------------------------------------------


def one_accuser_too_few(patch: pytest.MonkeyPatch) -> None:
    quorum = removal.quorum
    patch.setattr(removal, "quorum", lambda voters: max(1, quorum(voters) - 1))


def dies_with_its_observers(patch: pytest.MonkeyPatch) -> None:
    """The dead count as observers who have not accused yet."""
    patch.setattr(Removal, "_voters", lambda *_: RINGS)


def no_refutation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Publisher, "refute", lambda self: None)


def accuses_on_the_first_doubt(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Suspicion, "_is_due", lambda self, subject, *_: True)


def certificate_voided_by_an_update(patch: pytest.MonkeyPatch) -> None:
    merge = Document.merge

    def careless(self: Document, fact: Fact, now: float, *outcome: MergeOutcome) -> MergeResult:
        for one in self.certificates if isinstance(fact, Record) else ():
            if fact.owner in one.accusers:
                del self._certificates[one.subject]
                self._removed = None
                self._remove(one.id, one.issued_at, fact.issued_at)
        return merge(self, fact, now, *outcome)

    patch.setattr(Document, "merge", careless)
    learned = Core._learned

    def telling(self: Core, owners: Any, now: float) -> Any:
        return learned(self, {*owners, *self.document.owners}, now)

    patch.setattr(Core, "_learned", telling)


def forks_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Document, "_merge_fork", lambda *_: ())


def nobody_is_ever_accused(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Suspicion, "review", lambda *_: False)


# --- lives ----------------------------------------------------------------------------------------


def without_outs(patch: pytest.MonkeyPatch, kind: type) -> None:
    handle = Gossip.handle

    def careless(self: Gossip, event: Any, now: float) -> list[Any]:
        return [out for out in handle(self, event, now) if not isinstance(out, kind)]

    patch.setattr(Gossip, "handle", careless)


def epoch_not_on_disk(patch: pytest.MonkeyPatch) -> None:
    without_outs(patch, PersistEpoch)


def changes_are_not_told(patch: pytest.MonkeyPatch) -> None:
    without_outs(patch, StateChanged)


def twins_live_on(patch: pytest.MonkeyPatch) -> None:
    without_outs(patch, TwinFound)


def lost_epoch_not_learned(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Publisher, "on_own_record", lambda *_: [])


def timers_beget_timers(patch: pytest.MonkeyPatch) -> None:
    tick = Core._tick

    def careless(self: Core, now: float) -> list[Any]:
        outs = tick(self, now)
        return [*outs, *(out for out in outs if isinstance(out, SetTimer))]

    patch.setattr(Core, "_tick", careless)


def plans_by_who_asks(patch: pytest.MonkeyPatch) -> None:
    asked = [0]

    def careless(*arguments: Any) -> PlacementInputs:
        asked[0] += 1
        facts = facts_of(*arguments)
        return replace(facts, nodes=facts.nodes[asked[0] % 2 :])

    patch.setattr(checkers, "facts_of", careless)


ATTACK = short("attack")
LOSS = short("loss-heavy", limits={"false_removals": 0})
BUGS = [
    Bug(plant=older_wins, scenario=ATTACK, found="goes back to"),
    Bug(
        plant=expired_records_live_on, scenario=forging("run_out"), found="never wrote|has run out"
    ),
    Bug(plant=signatures_unchecked, scenario=ATTACK, found="never signed|nobody signed"),
    Bug(plant=far_epochs_believed, scenario=forging("epoch_far_ahead"), found="never wrote"),
    Bug(plant=one_owner_takes_all, scenario=hoarding(), found="of one owner"),
    Bug(plant=unknown_registers_dropped, scenario=short("versions"), found="all that node"),
    Bug(plant=repair_skips_the_first_leaf, scenario=dropping(), nodes=2, found="fingerprints"),
    Bug(plant=never_repairs, scenario=dropping(), nodes=2, found="fingerprints"),
    Bug(plant=fingerprint_keeps_the_dropped, scenario=newcomer(), found="fingerprint"),
    Bug(plant=one_accuser_too_few, scenario=conspiracy(), nodes=10, found="on the word of"),
    Bug(plant=dies_with_its_observers, scenario=halved(), nodes=8, found="is gone|pending"),
    Bug(plant=no_refutation, scenario=frozen(), found="for dead"),
    Bug(plant=accuses_on_the_first_doubt, scenario=LOSS, found="false_removals|on the word of"),
    Bug(
        plant=certificate_voided_by_an_update,
        scenario=short("half", updates_per_s=2),
        found="takes back the removal",
    ),
    Bug(plant=forks_ignored, scenario=old_pages(), found="proof of a fork"),
    Bug(plant=nobody_is_ever_accused, scenario=short("crash", safety_s=50), found="is gone"),
    Bug(plant=epoch_not_on_disk, scenario=lost_disk(), found="before it is on disk"),
    Bug(plant=lost_epoch_not_learned, scenario=lost_disk(), found="does not know node"),
    Bug(plant=twins_live_on, scenario=short("clones"), found="two nodes run with one key"),
    Bug(plant=changes_are_not_told, scenario=short("spread"), found="without a word"),
    Bug(plant=timers_beget_timers, scenario=short("spread"), found="timers under way"),
    Bug(plant=plans_by_who_asks, scenario=short("spread"), found="plans differently"),
]


@pytest.mark.parametrize("bug", BUGS, ids=[bug.plant.__name__ for bug in BUGS])
def test_a_planted_bug_is_found(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    bug.plant(monkeypatch)
    said: list[str] = []

    def is_found() -> bool:
        return any(re.search(bug.found, what) for what in said)

    for seed in SEEDS[:QUICK]:
        said += play(bug.scenario, seed, bug.nodes).missed
        if is_found():
            break
    assert is_found(), said


@pytest.mark.parametrize(
    "scenario",
    [
        old_pages(),
        lost_disk(),
        newcomer(),
        dropping(),
        one_liar(),
        conspiracy(),
        frozen(),
        halved(),
    ],
    ids=lambda scenario: f"{scenario.name}-{len(scenario.steps)}",
)
def test_without_a_bug_nothing_is_found(scenario: Scenario) -> None:
    for seed in SEEDS[:QUIET]:
        assert play(scenario, seed, 10).missed == []
