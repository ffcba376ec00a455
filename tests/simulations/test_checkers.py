"""Known bugs are planted in the core, and the simulator has to find each within a few seeds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from p2pmesh.gossip import probe
from p2pmesh.gossip.events import PersistEpoch, SetTimer, StateChanged, TwinFound
from p2pmesh.gossip.membership import Gossip
from p2pmesh.gossip.probe import Prober
from p2pmesh.gossip.sync import Sync
from p2pmesh.placement.facts import Facts
from p2pmesh.placement.inputs import facts_of
from p2pmesh.state import document
from p2pmesh.state.document import Document, Verdict
from p2pmesh.wire.records import Record
from simulations import checkers, world
from simulations.scenario import Scenario, Step, load
from simulations.trial import play

SEEDS = range(1, 11)


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


def lost_disk() -> Scenario:
    """A clock is set back, then a disk is lost: its node has an epoch from before."""
    steps = (
        Step(fault="clock", at_s=12, arguments={"seconds": -18, "count": 4}),
        Step(fault="crash", at_s=14, arguments={"count": 4, "disk": "lost", "for_s": 1.0}),
    )
    return short("spread", steps=steps, limits={}, liveness_s=30)


def newcomer() -> Scenario:
    """Somebody comes who saw nothing of what was said before."""
    return short("spread", steps=(Step(fault="join", at_s=20),), limits={})


def dropping() -> Scenario:
    """On the only link, more messages vanish than arrive."""
    steps = (Step(fault="knob", at_s=10, arguments={"name": "drop", "value": 0.6}),)
    return short("drop", steps=steps)


def old_pages() -> Scenario:
    """A hostile owner's pages are void once it has a new epoch, and come again."""
    steps = (
        Step(fault="hoard", at_s=12, arguments={"count": 10, "size_bytes": 10}),
        Step(fault="equivocate", at_s=15),
        Step(fault="replay", every_s=1, arguments={"oldest": False, "count": 50}),
    )
    return short("attack", steps=steps)


def older_wins(patch: pytest.MonkeyPatch) -> None:
    judge = Document.judge

    def careless(self: Document, record: Record, now: float) -> Verdict:
        mine = self.get(record.owner, record.register)
        older = mine is not None and record.version < mine.version
        return Verdict.NEWS if older else judge(self, record, now)

    patch.setattr(Document, "judge", careless)


def expiry_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(document, "EXPIRY_GRACE_S", 10**6)


def signatures_unchecked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(world, "verify_record", lambda record: True)


def repair_skips_the_first(patch: pytest.MonkeyPatch) -> None:
    lacking = Document.lacking

    def careless(self: Document, versions: Any) -> Iterator[Record]:
        yield from list(lacking(self, versions))[1:]

    patch.setattr(Document, "lacking", careless)


def never_repairs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sync, "compare", lambda self, node, fingerprint: [])


def fingerprint_keeps_the_dropped(patch: pytest.MonkeyPatch) -> None:
    def careless(self: Document, record: Record) -> None:
        held = self._owners[record.owner]
        del held[record.register]
        if not held:
            del self._owners[record.owner]

    patch.setattr(Document, "_drop", careless)


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
    patch.setattr(Gossip, "_outrank", lambda self, record, now: [])


def old_epochs_return(patch: pytest.MonkeyPatch) -> None:
    judge = Document.judge

    def careless(self: Document, record: Record, now: float) -> Verdict:
        unheld = self.get(record.owner, record.register) is None
        verdict = judge(self, record, now)
        return Verdict.NEWS if unheld and verdict is Verdict.STALE else verdict

    patch.setattr(Document, "judge", careless)


def far_epochs_believed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(document, "EPOCH_AHEAD_S_MAX", 10**9)


def one_owner_takes_all(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(document, "OWNER_BYTES_MAX", 10**9)


def one_miss_is_death(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(probe, "MISSES_DEAD", 1)


def nobody_ever_dies(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Prober, "missed", lambda self, now: [])


def timers_beget_timers(patch: pytest.MonkeyPatch) -> None:
    tick = Gossip._tick

    def careless(self: Gossip, now: float) -> list[Any]:
        outs = tick(self, now)
        return [*outs, *(out for out in outs if isinstance(out, SetTimer))]

    patch.setattr(Gossip, "_tick", careless)


def plans_by_who_asks(patch: pytest.MonkeyPatch) -> None:
    asked = [0]

    def careless(*arguments: Any) -> Facts:
        asked[0] += 1
        facts = facts_of(*arguments)
        return replace(facts, nodes=facts.nodes[asked[0] % 2 :])

    patch.setattr(checkers, "facts_of", careless)


ATTACK = short("attack")
BUGS = [
    Bug(plant=older_wins, scenario=ATTACK, found="goes back to"),
    Bug(plant=expiry_ignored, scenario=ATTACK, found="never wrote|has run out"),
    Bug(plant=signatures_unchecked, scenario=ATTACK, found="never signed|nobody signed"),
    Bug(plant=far_epochs_believed, scenario=ATTACK, found="never wrote"),
    Bug(plant=one_owner_takes_all, scenario=ATTACK, found="of one owner"),
    Bug(plant=old_epochs_return, scenario=old_pages(), found="of an epoch that is over"),
    Bug(plant=epoch_not_on_disk, scenario=lost_disk(), found="before it is on disk"),
    Bug(plant=fingerprint_keeps_the_dropped, scenario=newcomer(), found="fingerprint"),
    Bug(plant=repair_skips_the_first, scenario=dropping(), nodes=2, found="fingerprints"),
    Bug(plant=never_repairs, scenario=dropping(), nodes=2, found="fingerprints"),
    Bug(plant=lost_epoch_not_learned, scenario=lost_disk(), found="does not know node"),
    Bug(plant=twins_live_on, scenario=short("clones"), found="two nodes run with one key"),
    Bug(
        plant=one_miss_is_death, scenario=short("loss", limits={"false_removals": 0}), found="false"
    ),
    Bug(plant=nobody_ever_dies, scenario=short("crash"), found="removals_pending|is gone"),
    Bug(plant=changes_are_not_told, scenario=short("spread"), found="without a word"),
    Bug(plant=timers_beget_timers, scenario=short("spread"), found="timers under way"),
    Bug(plant=plans_by_who_asks, scenario=short("spread"), found="plans differently"),
]


@pytest.mark.parametrize("bug", BUGS, ids=[bug.plant.__name__ for bug in BUGS])
def test_a_planted_bug_is_found(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    bug.plant(monkeypatch)
    said: list[str] = []
    for seed in SEEDS:
        missed = play(bug.scenario, seed, bug.nodes).missed
        if any(re.search(bug.found, what) for what in missed):
            return
        said += missed
    pytest.fail(f"not found; said {said}")


@pytest.mark.parametrize(
    "scenario", [old_pages(), lost_disk(), newcomer(), dropping()], ids=lambda s: str(len(s.steps))
)
def test_without_a_bug_nothing_is_found(scenario: Scenario) -> None:
    for seed in (1, 2):
        assert play(scenario, seed, 5).missed == []
