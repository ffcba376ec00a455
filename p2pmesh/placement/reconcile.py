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

A pipeline is one unit, of which each node runs one stage by the name `stage-<unit>-<i>`:

- Its stages 1, 2, … are started as soon as their memory is free, and are `ready` once they can
  take their head's connections. The head, stage 0, is started once all of them have signed
  `ready`, and is `ready` once it has answered a token, as any engine.
- The head is stopped with `BROKEN` as soon as a stage of its unit does not say `ready` any more:
  at once, without draining, since its requests have lost their way. The plan still has it here,
  so that it is started again when all stages are ready. A stage that lives through this stays.
- When the plan has another unit or other copies, the unit stops as one: at once with `BROKEN`
  where a stage of it is gone, at once with `EVICTED` where another unit needs its nodes, else make
  before break. Its head proves a unit to others: only parts that take requests are asked.

What the actions ask of the caller: `Start(part, stages)` of a stage carries all stages of its
unit, the head first, with their nodes, layers and memory; `Served.stages` publishes them, by which
every node knows the unit again, also from one part of it. `Stop` of a stage 1, 2, … drains it as
long as its head has streams open, at most as long as any engine; `BROKEN` waits for nothing.

No two nodes wait for each other: a start waits only for the stop of something less important, or
for copies that are already being loaded. A failed process that the plan has here is left to its
own back-off. A node that the facts do not count as live may be cut off: it changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.parts import PartId, ReplicaKey
from p2pmesh.placement.facts import PlacementInputs
from p2pmesh.placement.pipeline import Stage
from p2pmesh.placement.plan import Plan


class StopReason(StrEnum):
    """Why a copy is stopped, in words for the log and the console."""

    UNWANTED = "nobody wants it"
    MOVED = "the nodes that the plan has it on are ready"
    FAILED = "it failed here and the plan has it elsewhere"
    EVICTED = "there is no room for it"
    BROKEN = "a stage of its pipeline is gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Load this part here.

    Attributes:
        stages: For a stage all stages of its unit, the head first.
    """

    part: PartId
    stages: tuple[Stage, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Drain and unload this part here."""

    part: PartId
    reason: StopReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Ask whether a replica really serves: its node says so, and a copy here may go for it."""

    replica: ReplicaKey


Action = Start | Stop | Check


def reconcile(
    *,
    me: NodeId,
    plan: Plan,
    facts: PlacementInputs,
    running: Mapping[PartId, str],
    proven: Collection[ReplicaKey],
) -> tuple[Action, ...]:
    """Return the starts and stops that are due; stops come first.

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
    needs = {PartId(model.digest): model.need_on(me) for model in facts.models}
    stops, checks = _stops(here, plan, facts, running, proven)
    staying = [part for part, state in running.items() if state != "stopping" and part not in stops]
    excess = sum(needs.get(part, 0) for part in staying) - budget
    order = {assignment.digest: place for place, assignment in enumerate(plan.assignments)}
    # The least important first; what the plan does not know at all was stopped above.
    for part in sorted(staying, key=lambda part: (order.get(part.digest, 0), part), reverse=True):
        if excess > 0 and part not in here:
            stops[part] = StopReason.EVICTED
            excess -= needs.get(part, 0)
    return (
        *(Stop(part=part, reason=reason) for part, reason in stops.items()),
        *_starts(here, budget, needs, running),
        *(Check(replica=one) for one in checks if one.part not in stops),
    )


def _stops(
    here: tuple[PartId, ...],
    plan: Plan,
    facts: PlacementInputs,
    running: Mapping[PartId, str],
    proven: Collection[ReplicaKey],
) -> tuple[dict[PartId, StopReason], list[ReplicaKey]]:
    """Return the stops that the plan asks for, and the replicas that must answer before more.

    Both in the order of the parts.
    """
    assignments = {assignment.digest: assignment for assignment in plan.assignments}
    ready = {ReplicaKey(one.node, one.part) for one in facts.residents if one.state == "ready"}
    stops: dict[PartId, StopReason] = {}
    checks: list[ReplicaKey] = []
    for part, state in sorted(running.items()):
        if state == "stopping" or part in here:
            continue
        assignment = assignments.get(part.digest)
        if assignment is None or assignment.copies == 0:
            stops[part] = StopReason.UNWANTED
        elif not assignment.nodes:
            stops[part] = StopReason.EVICTED
        elif state == "failed":
            stops[part] = StopReason.FAILED
        else:
            others = set(assignment.replicas())
            if others <= ready.intersection(proven):
                stops[part] = StopReason.MOVED
            elif others <= ready:
                checks += sorted(others.difference(proven))
    return stops, checks


def _starts(
    here: tuple[PartId, ...],
    budget_bytes: int,
    needs: Mapping[PartId, int],
    running: Mapping[PartId, str],
) -> list[Start]:
    """Return the starts that fit beside all that holds memory now, the most important first."""
    room = budget_bytes - sum(needs.get(part, 0) for part in running)
    starts = []
    for part in here:
        if part not in running and needs.get(part, 0) <= room:
            room -= needs.get(part, 0)
            starts.append(Start(part=part))
    return starts
