"""The allocation behind a plan: demands get their places by the rules of `plan.py`. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.parts import StageRange
from p2pmesh.placement.assignment import Assignment, Reason, Refusal, ShardRefusal
from p2pmesh.placement.demand import Demand
from p2pmesh.placement.experts import (
    Host,
    extended_set,
    good_enough,
    kept_set,
    new_set,
    why_no_set,
)
from p2pmesh.placement.facts import ModelFacts, PlacementInputs
from p2pmesh.placement.layout import Pipeline, Whole
from p2pmesh.placement.ledger import Ledger
from p2pmesh.placement.pipeline import (
    Candidate,
    Stage,
    choose,
    lacking,
    lacking_together,
    odd_one,
)
from p2pmesh.placement.rendezvous import rank
from p2pmesh.placement.running import Running, may_share
from p2pmesh.sharing import Sharing

# In the rank of a model more memory than this many of its copies take counts no more: nobody draws
# all models by claiming a huge budget.
WEIGHT_COPIES_MAX = 8
# A pipeline that works makes way for a copy which only fits instead of it, and needs time to load,
# where so much of its need is left over: budgets move with what else people do.
SLACK_SHARE = 8
MIB = 2**20


class Allocation:
    """The state of a plan in the making: the room left, and the places given."""

    def __init__(self, facts: PlacementInputs) -> None:
        self._nodes = {part.node: part for part in facts.nodes}
        self._budgets = {part.node: part.budget_bytes for part in facts.nodes}
        self._given = Ledger(self._budgets)
        self._running = Running(facts)
        self._models = {model.digest: model for model in facts.models}
        self._wanted = {want.digest for want in facts.wants}
        self._own_needs = {model.digest: dict(model.own_needs) for model in facts.models}

    def serve(self, demands: Iterable[Demand]) -> list[Assignment]:
        """Gives demands of one priority their places, in the order that the module has.

        When a copy finds one that is to replace a unit, all is done again as if it ran already:
        once it does, that is what is found.
        """
        equals = list(demands)
        for demand in equals:
            self.keep(demand)
        while True:
            kept, self._given = self._given, self._given.copy()
            replaced = self._place(equals)
            if replaced is None:
                return [self.assignment(demand) for demand in equals]
            demand, node = replaced
            self._given = kept
            kept.take_back(demand.model.digest)
            self._give(demand, [node])

    def _place(self, equals: Sequence[Demand]) -> tuple[Demand, NodeId] | None:
        """Give what does not run yet its places; stops at a copy that is to replace a unit."""
        for demand in equals:
            if demand.split:
                self.split(demand)
        for demand in equals:
            if not demand.split:
                if instead := self._instead(demand):
                    return demand, instead
                self.extend(demand)
        for demand in equals:
            if not demand.split and not self._given.places(demand.model.digest):
                self._share(demand)
        return None

    def _share(self, demand: Demand) -> None:
        """Have several nodes serve a model that is whole on none: in shards or as a pipeline."""
        digest = demand.model.digest
        if digest in self._given.stand_ins:
            self._extend_smaller(demand)
        elif digest in self._given.shards:
            self._extend_shards(demand)
        elif demand.sharing is Sharing.EXPERTS:
            _ = self._make_shards(demand) or self._make_shards(demand, measured=False)
        elif demand.sharing is Sharing.LAYERS or digest in self._given.pipelines:
            self.split(demand)
        elif not (self._find_smaller(demand) or self._make_shards(demand)):
            self.split(demand)
            if digest not in self._given.pipelines:
                self._make_shards(demand, measured=False)

    def keep(self, demand: Demand) -> None:
        """Gives what runs its place as far as it fits: copies or a unit, as it is wanted."""
        digest = demand.model.digest
        if not demand.split:
            self._keep_copies(demand)
        if self._given.places(digest) or self._keep_smaller(demand) or self._keep_shards(demand):
            return
        if demand.sharing is Sharing.EXPERTS and not demand.split:
            return  # nothing but shards will do
        if stages := self._unit(demand, demand.model.failing):
            self._given.give_stages(digest, stages)

    def _unit(self, demand: Demand, without: Collection[NodeId]) -> tuple[Stage, ...] | None:
        """The pipeline that runs and can go on, the readiest first, on none of some nodes."""
        for ranges in self._running.units(demand.model.digest):
            is_meant = all(one.node not in without for one in ranges)
            if is_meant and (stages := self._feasible(demand, ranges)):
                return stages
        return None

    def _of_smaller(self, demand: Demand) -> list[Demand]:
        """Return a demand for each smaller quantisation of its model, the largest first."""
        if demand.split or demand.sharing is not Sharing.AUTO:
            return []
        models = [self._models[one] for one in demand.model.smaller if one in self._models]
        return [Demand(model=one, copies=demand.copies, priority=demand.priority) for one in models]

    def _keep_smaller(self, demand: Demand) -> bool:
        """Give running copies of a smaller quantisation that stands in their places, if any."""
        for one in self._of_smaller(demand):
            digest = one.model.digest
            if digest not in self._wanted:
                self._keep_copies(one)
                if self._given.places(digest):
                    self._given.stand_ins[demand.model.digest] = digest
                    return True
        return False

    def _find_smaller(self, demand: Demand) -> bool:
        """Have a smaller quantisation stand in: one that is placed, or finds a place."""
        for one in self._of_smaller(demand):
            digest = one.model.digest
            if digest not in self._wanted:
                self.extend(one)
            if self._given.places(digest):
                self._given.stand_ins[demand.model.digest] = digest
                return True
        return False

    def _extend_smaller(self, demand: Demand) -> None:
        digest = self._given.stand_ins[demand.model.digest]
        for one in self._of_smaller(demand):
            if one.model.digest == digest and digest not in self._wanted:
                self.extend(one)

    def stand_ins(self, demands: Iterable[Demand]) -> list[Assignment]:
        """Return the assignments of models that nobody asks for and that stand in for others."""
        found = {}
        for demand in demands:
            for one in self._of_smaller(demand):
                digest = one.model.digest
                if self._given.stand_ins.get(demand.model.digest) == digest not in self._wanted:
                    found[digest] = self._of_copies(one)
        return list(found.values())

    def _keep_shards(self, demand: Demand) -> bool:
        """Give running shards their place, as far as they fit and are good enough.

        New ones go before a pipeline that runs where an owner asks for shards.
        """
        if demand.split or demand.sharing is Sharing.LAYERS:
            return False
        model, hosts = demand.model, self._hosts(demand)
        known = (model.qualities, model.hearsay)
        sets = (kept_set(model.digest, one, demand.divergence_max, hosts) for one in known)
        found = next(filter(None, sets), None)
        if (
            found is None
            and demand.sharing is Sharing.EXPERTS
            and self._running.units(model.digest)
        ):
            return self._make_shards(demand)
        if found is not None:
            self._given.give_shards(found)
        return found is not None

    def _make_shards(self, demand: Demand, *, measured: bool = True) -> bool:
        """Make a set of shards of which none runs; whether there is one."""
        model = demand.model
        good = good_enough(model.qualities, demand.divergence_max, measured=measured)
        found = new_set(model.digest, good, self._hosts(demand))
        if found is not None:
            self._given.give_shards(found)
        return found is not None

    def _extend_shards(self, demand: Demand) -> None:
        """Have further nodes join the shards that run, if they can make theirs."""
        kept = self._given.shards[demand.model.digest]
        if kept.quality in demand.model.qualities:
            self._given.take_back(demand.model.digest)
            self._given.give_shards(extended_set(kept, self._hosts(demand)))

    def _hosts(self, demand: Demand) -> list[Host]:
        """The nodes that have the file and say what its experts take, with their room.

        One where a shard failed lately is none, unless it runs one.
        """
        experts = dict(demand.model.expert_bytes)
        running = self._running.shards(demand.model.digest)
        hosts = []
        for node in self._holders(demand.model):
            one = running.get(node)
            if experts.get(node) and (one or node not in demand.model.failing):
                shard, is_ready = (one.shard, one.state == "ready") if one else (None, False)
                need_bytes = self._need(demand, node)
                hosts.append(
                    Host(node, self._given.room[node], need_bytes, experts[node], shard, is_ready)
                )
        return hosts

    def split(self, demand: Demand) -> None:
        """Make a pipeline of a demand of which no unit runs; if asked for, else keep what runs.

        Where a stage failed it is tried again only when there is none without that node.
        """
        if demand.model.digest in self._given.pipelines:
            return
        candidates, failing = self._candidates(demand), demand.model.failing
        sound = [one for one in candidates if one.node not in failing]
        stages = choose(sound, split=demand.split)
        if stages is None and failing:
            stages = self._unit(demand, ()) or choose(candidates, split=demand.split)
        if stages is not None:
            self._given.give_stages(demand.model.digest, stages)
        elif demand.split:
            self._keep_copies(demand)

    def extend(self, demand: Demand) -> None:
        """Gives the copies still missing a place among the nodes that have the file."""
        if len(self._given.places(demand.model.digest)) < demand.copies:
            self._give(demand, self._fitting(demand, self._given.room))

    def _instead(self, demand: Demand) -> NodeId | None:
        """The node for a copy instead of a unit or shards that run, if there is one.

        It fits beside them, which answer until the copy does, or without them and with room to
        spare.
        """
        held = self._given.held(demand.model.digest)
        if not held:
            return None
        without = dict(self._given.room)
        for node, need_bytes in held:
            without[node] += need_bytes
        fitting = self._fitting(demand, self._given.room)
        fitting += self._fitting(demand, without, slack_share=SLACK_SHARE)
        return next((node for node in fitting if node not in demand.model.failing), None)

    def _fitting(
        self, demand: Demand, room: Mapping[NodeId, int], *, slack_share: int = 0
    ) -> list[NodeId]:
        """The nodes with the file, no copy and the room for one, best first.

        Where a copy failed it is tried again only when it fits nowhere else.
        """

        def size(node: NodeId) -> int:
            need_bytes = self._need(demand, node)
            return need_bytes + (need_bytes // slack_share if slack_share else 0)

        ranked = self._rank(demand, [n for n in self._free(demand) if room[n] >= size(n)])
        return sorted(ranked, key=lambda node: node in demand.model.failing)

    def assignment(self, demand: Demand) -> Assignment:
        """Return the assignment of a demand, once all of its priority have been served."""
        if demand.split:
            return self._of_split(demand)
        if demand.model.digest in self._given.pipelines:
            return self._of_pipeline(demand)
        if demand.model.digest in self._given.shards:
            return self._of_shards(demand)
        if demand.model.digest in self._given.stand_ins:
            return replace(
                self._of_copies(demand),
                reason=Reason.SMALLER,
                instead=self._given.stand_ins[demand.model.digest],
            )
        return self._of_copies(demand)

    def _of_copies(self, demand: Demand) -> Assignment:
        places = self._given.places(demand.model.digest)
        holders = self._holders(demand.model)
        free = self._free(demand)
        reason = self._reason(demand, len(places), len(holders), free)
        offers = self._budgets if reason is Reason.TOO_LARGE else self._given.room
        short = len(places) < demand.copies
        roomiest = None
        if free and short:
            roomiest = min(free, key=lambda n: (self._need(demand, n) - offers[n], n))
        return Assignment(
            digest=demand.model.digest,
            layout=Whole(nodes=tuple(sorted(places))),
            reason=reason,
            copies=demand.copies,
            need_bytes=self._need(demand, roomiest),
            holders=len(holders),
            roomiest=roomiest,
            room_bytes=0 if roomiest is None else offers[roomiest],
            refusal=self._refusal(demand) if demand.model.shapes and not places else None,
            shard_refusal=None if places else self._shard_refusal(demand),
        )

    def _of_shards(self, demand: Demand) -> Assignment:
        layout = self._given.shards[demand.model.digest]
        return Assignment(
            digest=demand.model.digest,
            layout=layout,
            reason=Reason.PLACED,
            copies=1,
            need_bytes=sum(one.need_bytes for one in layout.shards),
            holders=len(self._holders(demand.model)),
        )

    def _shard_refusal(self, demand: Demand) -> ShardRefusal | None:
        """Why a model of experts is not in shards; None for others, and where nobody wants them."""
        model = demand.model
        if not model.expert_bytes or demand.split or demand.sharing is Sharing.LAYERS:
            return None
        if model.hearsay and not model.qualities:
            return ShardRefusal(model.hearsay[0], demand.divergence_max, is_hearsay=True)
        held = dict(self._given.held(model.digest))
        hosts = [
            one._replace(room_bytes=one.room_bytes + held.get(one.node, 0))
            for one in self._hosts(demand)
        ]
        return why_no_set(model.digest, model.qualities, demand.divergence_max, hosts)

    def _of_pipeline(self, demand: Demand) -> Assignment:
        digest = demand.model.digest
        stages = self._given.pipelines[digest]
        return Assignment(
            digest=digest,
            layout=Pipeline.of(digest, stages),
            reason=Reason.PLACED,
            copies=1,
            need_bytes=sum(stage.need_bytes for stage in stages),
            holders=len(self._holders(demand.model)),
            split=demand.split,
            shard_refusal=self._shard_refusal(demand),
        )

    def _of_split(self, demand: Demand) -> Assignment:
        """Return the pipeline that is asked for, or why there is none."""
        digest = demand.model.digest
        if digest in self._given.pipelines:
            return self._of_pipeline(demand)
        refusal = self._refusal(demand)
        return Assignment(
            digest=digest,
            layout=Whole(nodes=tuple(sorted(self._given.places(digest)))),
            reason=refusal.reason,
            copies=demand.copies,
            need_bytes=refusal.need_bytes,
            holders=len(self._holders(demand.model)),
            roomiest=refusal.node,
            room_bytes=refusal.room_bytes,
            split=demand.split,
        )

    def _refusal(self, demand: Demand) -> Refusal:
        """Why there is no pipeline, of as many nodes as are asked for or of any number."""
        candidates, need_bytes = self._candidates(demand), demand.model.need_bytes
        least = demand.split or 2
        holders = [one for one in candidates if one.holds]
        if not holders:
            return Refusal(Reason.NO_HOLDER, None, need_bytes)
        deep = [one for one in holders if one.heads and len(one.heads.layer_bytes) >= least]
        if not deep:
            return Refusal(Reason.FEW_LAYERS, None, need_bytes)
        alike = Counter(one.rpc for one in candidates if one.rpc)
        able = [one for one in deep if alike[one.rpc] >= least]
        if not able:
            return Refusal(Reason.NO_ENGINES, odd_one(deep, candidates), need_bytes)
        heads = [one for one in able if sum(map(one.may_use, candidates)) >= least - 1]
        if not heads:
            return Refusal(Reason.NO_RIGHT, able[0].node, need_bytes)
        if demand.split:
            return Refusal(Reason.NO_STAGE_ROOM, *lacking(heads, candidates, demand.split))
        return Refusal(Reason.NO_STAGE_ROOM, None, *lacking_together(heads, candidates))

    def _candidates(self, demand: Demand) -> list[Candidate]:
        """The nodes that may be in a new pipeline, as far as is known.

        The room is what is left beside a copy of the model that stays until the pipeline is there.
        """
        model = demand.model
        shapes = dict(model.shapes)
        copies = self._running.copies(model.digest, "ready") if demand.split else []
        beside = {node: self._need(demand, node) for node in copies}
        kept = self._given.places(model.digest)
        taken = self._given.taken_by_stages()
        candidates = []
        for node, facts in self._nodes.items():
            if not facts.measured:
                continue
            room = self._given.room[node] + (self._need(demand, node) if node in kept else 0)
            room = min(room, facts.budget_bytes - beside.get(node, 0))
            room = min(room, facts.stage_bytes - taken[node])
            candidates.append(
                Candidate(
                    node=node,
                    budget_bytes=min(facts.budget_bytes, facts.stage_bytes),
                    room_bytes=max(room, 0),
                    rpc=facts.rpc,
                    memory_mib_per_s=facts.memory_mib_per_s,
                    holds=node in shapes,
                    heads=shapes.get(node),
                    may_head=facts.may_head,
                    confined=facts.confined,
                    far=facts.far,
                )
            )
        return candidates

    def _feasible(self, demand: Demand, ranges: tuple[StageRange, ...]) -> tuple[Stage, ...] | None:
        """The stages of a running unit with what they take now; None when it cannot go on."""
        nodes = [self._nodes.get(one.node) for one in ranges]
        shape = dict(demand.model.shapes).get(ranges[0].node)
        if demand.split not in (0, len(ranges)) or shape is None or not may_share(nodes):
            return None
        if ranges[-1].last_layer != len(shape.layer_bytes) - 1:
            return None
        stages = tuple(Stage(*one, shape.need(one.first_layer, one.last_layer)) for one in ranges)
        taken = self._given.taken_by_stages()
        fits = (
            one.need_bytes
            <= min(self._given.room[one.node], self._nodes[one.node].stage_bytes - taken[one.node])
            for one in stages
        )
        return stages if all(fits) else None

    def left_out(self, model: ModelFacts) -> Assignment:
        """The assignment of a model that is not wanted: no place."""
        return Assignment(
            digest=model.digest,
            layout=Whole(nodes=()),
            reason=Reason.STANDBY if model.fallback else Reason.UNWANTED,
            copies=0,
            need_bytes=model.need_bytes,
            holders=len(self._holders(model)),
        )

    def _reason(self, demand: Demand, placed: int, holders: int, free: list[NodeId]) -> Reason:
        if placed >= demand.copies:
            return Reason.PLACED
        if placed:
            return Reason.LITTLE_ROOM if free else Reason.FEW_HOLDERS
        if not holders:
            return Reason.NO_HOLDER
        if all(self._budgets[node] < self._need(demand, node) for node in free):
            return Reason.TOO_LARGE
        return Reason.NO_ROOM

    def _keep_copies(self, demand: Demand) -> None:
        """Gives the running copies their places, ready ones first, as far as they fit."""
        digest = demand.model.digest
        ready, loading = (self._running.copies(digest, state) for state in ("ready", "loading"))
        self._give(demand, self._rank(demand, ready) + self._rank(demand, loading))

    def _give(self, demand: Demand, nodes: list[NodeId]) -> None:
        digest = demand.model.digest
        for node in nodes:
            need_bytes = self._need(demand, node)
            is_missing = len(self._given.places(digest)) < demand.copies
            if is_missing and self._given.room[node] >= need_bytes:
                self._given.give_copy(digest, node, need_bytes)

    def _holders(self, model: ModelFacts) -> list[NodeId]:
        return [node for node in model.holders if node in self._budgets]

    def _free(self, demand: Demand) -> list[NodeId]:
        places = self._given.places(demand.model.digest)
        return [node for node in self._holders(demand.model) if node not in places]

    def _need(self, demand: Demand, node: NodeId | None) -> int:
        """Return the bytes of a copy on `node`, as that node states them; anywhere, for None."""
        needs = self._own_needs.get(demand.model.digest, {})
        return demand.model.need_bytes if node is None else needs.get(node, demand.model.need_bytes)

    def _rank(self, demand: Demand, nodes: Sequence[NodeId]) -> list[NodeId]:
        most = WEIGHT_COPIES_MAX * demand.model.need_bytes
        weights = [(node, min(self._budgets[node], most) // MIB) for node in nodes]
        return rank(demand.model.digest, weights)
