"""From the plan to this node's own actions: what to start and what to stop, now.

Pure. A node changes only its own processes, so a node with older facts than the others can make
a copy too many, never a wrong one. Four rules:

- What the plan has here and does not run is started, as soon as its memory is free.
- What the plan has elsewhere is stopped once every node that it names has signed `ready` and has
  proved it to this node by answering: make before break. Of two copies too many, each sees the
  same plan, so exactly the right one goes.
- What has no place anywhere, or that nobody wants, is stopped at once.
- A node over its own budget stops, at once, what the plan does not have here, the least
  important first.

No two nodes wait for each other: a start waits only for the stop of something less important, or
for copies that are already being loaded. A failed process that the plan has here is left to its
own back-off. A node that the facts do not count as live may be cut off: it changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import ModelDigest
from p2pmesh.placement.facts import Facts
from p2pmesh.placement.plan import Plan


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Ask this node whether it really serves this model: it says so, and a copy here may go."""

    digest: ModelDigest
    node: NodeId


Action = Start | Stop | Check
Replica = tuple[ModelDigest, NodeId]


def reconcile(
    *,
    me: NodeId,
    plan: Plan,
    facts: Facts,
    running: Mapping[ModelDigest, str],
    proven: Collection[Replica],
) -> tuple[Action, ...]:
    """What this node should do now; stops come first.

    Args:
        me: This node.
        plan: What `facts` lead to.
        facts: The same facts.
        running: The state of each of this node's processes (`loading`, `ready`, `failed` or
            `stopping`). A process holds its memory until it is no longer named here.
        proven: The replicas of others that answered this node since they signed `ready`.
    """
    budget = next((part.budget_bytes for part in facts.nodes if part.node == me), None)
    if budget is None:
        return ()
    here = plan.on(me)
    needs = {model.digest: model.need_on(me) for model in facts.models}
    stops, checks = _stops(here, plan, facts, running, proven)
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
        *(Check(digest=digest, node=node) for digest, node in checks if digest not in stops),
    )


def _stops(
    here: tuple[ModelDigest, ...],
    plan: Plan,
    facts: Facts,
    running: Mapping[ModelDigest, str],
    proven: Collection[Replica],
) -> tuple[dict[ModelDigest, StopReason], list[Replica]]:
    """What has to go for reasons of the plan, and the replicas that must answer before more may.

    Both in the order of the digests.
    """
    assignments = {assignment.digest: assignment for assignment in plan.assignments}
    ready = {(part.digest, part.node) for part in facts.residents if part.state == "ready"}
    stops: dict[ModelDigest, StopReason] = {}
    checks: list[Replica] = []
    for digest, state in sorted(running.items()):
        if state == "stopping" or digest in here:
            continue
        assignment = assignments.get(digest)
        if assignment is None or assignment.copies == 0:
            stops[digest] = StopReason.UNWANTED
        elif not assignment.nodes:
            stops[digest] = StopReason.EVICTED
        elif state == "failed":
            stops[digest] = StopReason.FAILED
        else:
            others = {(digest, node) for node in assignment.nodes}
            if others <= ready.intersection(proven):
                stops[digest] = StopReason.MOVED
            elif others <= ready:
                checks += sorted(others.difference(proven))
    return stops, checks


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
