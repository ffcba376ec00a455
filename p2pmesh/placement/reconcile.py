"""From the plan to this node's own actions: what to start and what to stop, now.

Pure. A node changes only its own processes, so a node with older facts than the others can make
a copy too many, never a wrong one. Four rules:

- What the plan has here and does not run is started, as soon as its memory is free.
- What the plan has elsewhere is stopped once every node that it names has signed `ready`: make
  before break. Of two copies too many, each sees the same plan, so exactly the right one goes.
- What has no place anywhere, or that nobody wants, is stopped at once.
- A node over its own budget stops, at once, what the plan does not have here, the least
  important first.

No two nodes wait for each other: a start waits only for the stop of something less important, or
for copies that are already being loaded. A failed process that the plan has here is left to its
own back-off. A node that the facts do not count as live may be cut off: it changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import ModelDigest
from p2pmesh.placement.facts import Facts
from p2pmesh.placement.plan import Assignment, Plan


class StopReason(StrEnum):
    """Why a copy is stopped, in words for the log and the console."""

    UNWANTED = "nobody wants it"
    MOVED = "the nodes that the plan has it on are ready"
    FAILED = "it failed here and the plan has it elsewhere"
    EVICTED = "there is no room for it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Load this model here."""

    digest: ModelDigest


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Drain and unload this model here."""

    digest: ModelDigest
    reason: StopReason


Action = Start | Stop


def reconcile(
    *, me: NodeId, plan: Plan, facts: Facts, running: Mapping[ModelDigest, str]
) -> tuple[Action, ...]:
    """What this node should do now; stops come first.

    Args:
        me: This node.
        plan: What `facts` lead to.
        facts: The same facts.
        running: The state of each of this node's processes (`loading`, `ready`, `failed` or
            `stopping`). A process holds its memory until it is no longer named here.
    """
    budget = next((part.budget_bytes for part in facts.nodes if part.node == me), None)
    if budget is None:
        return ()
    here = plan.on(me)
    needs = {model.digest: model.need_bytes for model in facts.models}
    stops = _stops(here, plan, facts, running)
    staying = [d for d, state in running.items() if state != "stopping" and d not in stops]
    excess = sum(needs.get(digest, 0) for digest in staying) - budget
    for assignment in reversed(plan.assignments):
        digest = assignment.digest
        if excess > 0 and digest in staying and digest not in here:
            stops[digest] = StopReason.EVICTED
            excess -= needs.get(digest, 0)
    return (
        *(Stop(digest=digest, reason=reason) for digest, reason in stops.items()),
        *_starts(here, budget, needs, running),
    )


def _stops(
    here: tuple[ModelDigest, ...], plan: Plan, facts: Facts, running: Mapping[ModelDigest, str]
) -> dict[ModelDigest, StopReason]:
    """What has to go for reasons of the plan, in the order of the digests."""
    assignments = {assignment.digest: assignment for assignment in plan.assignments}
    ready = {(part.digest, part.node) for part in facts.residents if part.state == "ready"}
    stops: dict[ModelDigest, StopReason] = {}
    for digest, state in sorted(running.items()):
        if state != "stopping" and digest not in here:
            reason = _stop_reason(assignments.get(digest), state, ready)
            if reason is not None:
                stops[digest] = reason
    return stops


def _stop_reason(
    assignment: Assignment | None, state: str, ready: set[tuple[ModelDigest, NodeId]]
) -> StopReason | None:
    """Why a copy that the plan does not have here may go now; None while it is still needed."""
    if assignment is None or assignment.copies == 0:
        return StopReason.UNWANTED
    if not assignment.nodes:
        return StopReason.EVICTED
    if state == "failed":
        return StopReason.FAILED
    if all((assignment.digest, node) in ready for node in assignment.nodes):
        return StopReason.MOVED
    return None


def _starts(
    here: tuple[ModelDigest, ...],
    budget_bytes: int,
    needs: Mapping[ModelDigest, int],
    running: Mapping[ModelDigest, str],
) -> list[Start]:
    """What can be loaded beside everything that holds memory now, the most important first."""
    room = budget_bytes - sum(needs.get(digest, 0) for digest in running)
    starts = []
    for digest in here:
        if digest not in running and needs.get(digest, 0) <= room:
            room -= needs.get(digest, 0)
            starts.append(Start(digest=digest))
    return starts
