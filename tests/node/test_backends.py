from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from p2pmesh.errors import EngineError, LinkError
from p2pmesh.gateway.route import ServedModel, ShardsServed, rank_auto
from p2pmesh.models.catalogue import AmbiguousModel, UnknownModel
from p2pmesh.models.parts import (
    PartId,
    ShardKind,
    ShardQuality,
    StageName,
    StageRange,
    unit_id,
)
from p2pmesh.node.backends import MeshBackends
from p2pmesh.placement.inputs import CONTEXT_DEFAULT_MAX
from p2pmesh.state.registers import HeldModel, Served, ServeState
from tests.node.isolated_node import GIB, ME, SLOTS, Parts, serving, wanted
from tests.state.builders import NODES, card, digest, held

DEMO, ALPHA = digest(0), digest(1)


def listed(routes: MeshBackends, number: int) -> ServedModel:
    """One model of the list, by its number."""
    (model,) = (one for one in routes.models() if one.digest == digest(number))
    return model


def only(routes: MeshBackends) -> ServedModel:
    (model,) = routes.models()
    return model


def targets(parts: Parts, model: int = 1) -> list[str]:
    return [target.node_name for target in parts.routes.targets(digest(model))]


# Which models there are


async def test_before_the_first_plan_nothing_is_served(parts: Parts) -> None:
    assert parts.routes.models() == ()
    with pytest.raises(UnknownModel):
        parts.routes.catalogue().resolve("model-1")
    assert parts.routes.state(ALPHA) == "not served"
    assert parts.routes.reason(ALPHA) == "no node here has its file"


async def test_the_demo_model_is_served_while_nobody_wants_another(
    autojump_clock: MockClock, parts: Parts
) -> None:
    async with serving(parts):
        parts.engine(0).become("ready", port=81)
        model = only(parts.routes)
        assert (model.id, model.state, model.nodes) == ("model-0", "ready", ("me",))
        assert model.reason == "1 of 1 copy"
        assert parts.routes.catalogue().resolve("model-0") == DEMO
        parts.hearsay.want(1, wanted(1))
        await trio.sleep(1)
        assert only(parts.routes).digest == ALPHA
        assert parts.routes.reason(DEMO) == (
            "served only while no other model that is wanted has a place"
        )


async def test_a_model_says_what_the_gateway_needs(parts: Parts) -> None:
    parts.hearsay.want(1, wanted(1, context=1024))
    async with serving(parts):
        model = only(parts.routes)
        assert model == ServedModel(
            digest=ALPHA,
            id="model-1",
            gives=frozenset({"chat"}),
            state="loading",
            reason="1 of 1 copy",
            nodes=(),
            context_tokens=1024,
            size_bytes=3000,
            layout="whole",
        )


async def test_states_go_with_the_best_replica(parts: Parts) -> None:
    parts.hearsay.join(1, budget_bytes=8 * GIB)
    parts.hearsay.hold(1, held(1))
    parts.hearsay.want_copies(2, wanted(1))
    async with serving(parts):
        assert only(parts.routes).state == "loading"
        parts.engine(1).become("failed", "broken")
        parts.hearsay.serve(1, 1, "loading")
        assert only(parts.routes).state == "loading"
        parts.hearsay.serve(1, 1, "failed", "broken there too")
        assert only(parts.routes).state == "failed"
        reasons = only(parts.routes).reason.split("; ")
        assert sorted(reasons) == ["on me: broken", "on node-1: broken there too"]
        parts.hearsay.serve(1, 1, "ready")
        assert only(parts.routes).state == "ready"
        assert only(parts.routes).nodes == ("node-1",)
        assert [
            (node.member.name, one.state, one.detail) for node, one in parts.routes.replicas(ALPHA)
        ] == sorted(
            [("me", "failed", "broken"), ("node-1", "ready", "")],
            key=lambda row: {"me": ME, "node-1": NODES[1]}[row[0]],
        )


async def test_a_model_that_is_about_to_start_elsewhere_is_loading(parts: Parts) -> None:
    parts.hearsay.join(1, budget_bytes=8 * GIB)
    parts.hearsay.hold(1, held(5))
    parts.hearsay.want(1, wanted(5))
    async with serving(parts):
        assert only(parts.routes).state == "loading", "node-1 has yet to say so"
        assert targets(parts, 5) == []


async def test_a_wanted_model_whose_owner_died_stays_with_its_name(parts: Parts) -> None:
    parts.hearsay.join(1, budget_bytes=8 * GIB)
    parts.hearsay.hold(1, held(5))
    parts.hearsay.serve(1, 5)
    parts.hearsay.want(1, wanted(5))
    async with serving(parts):
        assert targets(parts, 5) == ["node-1"]
        parts.hearsay.kill(1)
        await wait_all_tasks_blocked()
        model = listed(parts.routes, 5)
        assert (model.id, model.state, model.nodes) == ("model-5", "not served", ())
        assert model.reason == "no live node holds the file"
        assert targets(parts, 5) == []
        assert parts.routes.catalogue().resolve("model-5") == digest(5)


async def test_a_wanted_model_that_nobody_ever_described_is_listed(parts: Parts) -> None:
    parts.hearsay.want(1, wanted(7))
    async with serving(parts):
        model = listed(parts.routes, 7)
        assert (model.id, model.state, model.placed) == ("model-7", "not served", False)
        assert (model.context_tokens, model.size_bytes) == (0, 0)


async def test_a_reason_names_nodes_as_people_do(parts: Parts) -> None:
    parts.hearsay.join(1, budget_bytes=1 * GIB)
    parts.hearsay.hold(1, held(5, card=card(size_bytes=20 * GIB)))
    parts.hearsay.want(1, wanted(5))
    async with serving(parts):
        assert listed(parts.routes, 5).state == "not served"
        assert "1.0 GiB on node-1" in listed(parts.routes, 5).reason


async def test_a_reason_is_that_of_the_newest_plan(parts: Parts) -> None:
    async with serving(parts):
        parts.hearsay.want(1, wanted(7))
        seen = parts.mesh.changes.count
        parts.routes.models()  # asked before the plan was made anew
        await wait_all_tasks_blocked()
        assert parts.mesh.changes.count > seen
        assert listed(parts.routes, 7).reason == "no live node holds the file"


async def test_one_stem_of_two_models_is_ambiguous_and_both_have_ids(parts: Parts) -> None:
    parts.hearsay.join(1, budget_bytes=8 * GIB)
    parts.hearsay.hold(1, held(9, stem="model-1"))
    parts.hearsay.want(1, wanted(1), wanted(9, stem="model-1"))
    async with serving(parts):
        ids = [model.id for model in parts.routes.models()]
        assert len(set(ids)) == 2
        assert all(one.startswith("model-1@") for one in ids)
        catalogue = parts.routes.catalogue()
        with pytest.raises(AmbiguousModel) as caught:
            catalogue.resolve("model-1")
        assert list(caught.value.choices) == sorted(ids)
        assert [catalogue.resolve(one) for one in ids] == [ALPHA, digest(9)]


async def test_what_others_only_claim_of_a_model_is_left_to_them_to_refuse(parts: Parts) -> None:
    for number, modality in ((1, "embedding"), (2, "chat")):
        parts.hearsay.join(number, budget_bytes=8 * GIB)
        parts.hearsay.hold(number, held(5, card=card(gives=frozenset({modality}))))
        parts.hearsay.serve(number, 5)
    parts.hearsay.want(1, wanted(5))
    async with serving(parts):
        model = listed(parts.routes, 5)
        assert not model.certain
        assert model.gives == {"chat", "embedding"}
        assert model.fit(("chat", "completion")) == 0


async def test_of_its_own_file_a_node_believes_itself(parts: Parts) -> None:
    for number in range(1, 5):
        parts.hearsay.join(number)
        parts.hearsay.hold(
            number, held(1, card=card(gives=frozenset({"embedding"}), size_bytes=2**62))
        )
        parts.hearsay.serve(number, 1)
    parts.hearsay.want(1, wanted(1))
    async with serving(parts):
        model = only(parts.routes)
        assert (model.certain, model.gives, model.size_bytes) == (True, frozenset({"chat"}), 3000)
        assert model.fit(("embedding",)) is None


async def test_what_runs_without_being_wanted_is_not_placed(parts: Parts) -> None:
    parts.hearsay.join(1, budget_bytes=2**63 - 1)
    parts.hearsay.hold(1, held(5, card=card(size_bytes=2**63 - 1)))
    parts.hearsay.serve(1, 5)
    async with serving(parts):
        parts.engine(0).become("ready", port=81)
        assert [m.id for m in rank_auto(parts.routes.models(), ("chat",))] == ["model-0"]


async def test_what_is_held_and_not_served_takes_nobodys_name(parts: Parts) -> None:
    parts.hearsay.join(1)
    parts.hearsay.hold(1, held(9, stem="model-1"))
    parts.hearsay.want(1, wanted(1))
    async with serving(parts):
        assert only(parts.routes).id == "model-1"
        assert parts.routes.catalogue().resolve("model-1") == ALPHA


# Where they are


async def three_replicas(parts: Parts) -> None:
    for number in (1, 2):
        parts.hearsay.join(number, budget_bytes=8 * GIB)
        parts.hearsay.hold(number, held(1))
        parts.hearsay.serve(number, 1)
    parts.hearsay.want_copies(3, wanted(1, slots=2))
    await wait_all_tasks_blocked()
    parts.engine(1).become("ready", port=81)


async def test_the_local_replica_comes_first(parts: Parts) -> None:
    async with serving(parts):
        await three_replicas(parts)
        found = parts.routes.targets(ALPHA)
        assert [target.local for target in found] == [True, False, False]
        assert [target.node for target in found] == [ME, *sorted(NODES[1:3])]
        assert {(t.part, t.model_id, t.slots) for t in found} == {(PartId(ALPHA), "model-1", 2)}


async def test_a_suspected_or_unlinked_node_is_left_out(parts: Parts) -> None:
    async with serving(parts):
        await three_replicas(parts)
        parts.hearsay.suspect(1)
        assert targets(parts) == ["me", "node-2"]
        assert set(only(parts.routes).nodes) == {"me", "node-2"}
        parts.hearsay.link(1)
        assert set(targets(parts)) == {"me", "node-1", "node-2"}
        parts.hearsay.kill(1)
        assert targets(parts) == ["me", "node-2"]
        assert set(only(parts.routes).nodes) == {"me", "node-2"}


async def test_a_model_whose_only_owner_does_not_answer_is_waited_for(parts: Parts) -> None:
    parts.hearsay.join(1, budget_bytes=8 * GIB)
    parts.hearsay.hold(1, held(5))
    parts.hearsay.serve(1, 5)
    parts.hearsay.want(1, wanted(5))
    async with serving(parts):
        assert listed(parts.routes, 5).state == "ready"
        parts.hearsay.suspect(1)
        model = listed(parts.routes, 5)
        assert (model.state, model.nodes) == ("loading", ())
        assert model.reason == "node-1 does not answer"


async def test_a_node_heard_of_and_not_linked_is_no_target(parts: Parts) -> None:
    parts.hearsay.join(1, budget_bytes=8 * GIB, linked=False)
    parts.hearsay.hold(1, held(5))
    parts.hearsay.serve(1, 5)
    async with serving(parts):
        assert targets(parts, 5) == []
        parts.hearsay.link(1)
        assert targets(parts, 5) == ["node-1"]


async def test_only_the_ready_are_targets(parts: Parts) -> None:
    async with serving(parts):
        await three_replicas(parts)
        parts.hearsay.serve(1, 1, "stopping")
        parts.hearsay.serve(2, 1, "failed")
        parts.engine(1).become("loading", "starting again")
        assert targets(parts) == []


async def test_of_a_pipeline_only_the_head_takes_requests(parts: Parts) -> None:
    stages = (StageRange(NODES[1], 0, 1), StageRange(NODES[2], 2, 3))
    head, tail = (StageName(unit_id(digest(5), stages), number) for number in range(2))

    def run(number: int, name: StageName, state: ServeState) -> None:
        one = Served(digest=digest(5), name=str(name), state=state, stages=stages, detail="lost")
        parts.hearsay.serve_parts(number, one)

    async with serving(parts):
        for number in (1, 2):
            parts.hearsay.join(number, budget_bytes=64 * GIB)
        parts.hearsay.hold(1, held(5, card=card(context=10**6)))
        parts.hearsay.want(2, wanted(5, context=10**6))
        run(2, tail, "ready")
        states: tuple[ServeState, ...] = ("loading", "failed", "ready")
        for state in states:
            run(1, head, state)
            assert listed(parts.routes, 5).state == state
            assert targets(parts, 5) == (["node-1"] if state == "ready" else [])
        (target,) = parts.routes.targets(digest(5))
        assert target.part == PartId(digest(5), str(head))
        assert listed(parts.routes, 5).context_tokens == CONTEXT_DEFAULT_MAX
        parts.hearsay.serve(1, 5)
        assert listed(parts.routes, 5).context_tokens == 10**6


async def test_slots_nobody_asked_for_are_the_nodes_own(parts: Parts) -> None:
    async with serving(parts):
        parts.engine(0).become("ready", port=81)
        (target,) = parts.routes.targets(DEMO)
        assert target.slots == SLOTS


async def test_an_unknown_model_has_no_target(parts: Parts) -> None:
    assert parts.routes.targets(digest(99)) == ()


# Caching


async def test_answers_are_made_once_per_change(parts: Parts) -> None:
    async with serving(parts):
        await three_replicas(parts)
        models, found = parts.routes.models(), parts.routes.targets(ALPHA)
        catalogue = parts.routes.catalogue()
        assert parts.routes.models() is models
        assert parts.routes.targets(ALPHA) is found
        assert parts.routes.catalogue() is catalogue
        parts.hearsay.serve(2, 1, "stopping")
        assert parts.routes.models() is not models
        assert parts.routes.targets(ALPHA) is not found


async def test_who_waits_for_a_change_is_woken(parts: Parts) -> None:
    woken: list[str] = []

    async def wait() -> None:
        while not parts.routes.targets(DEMO):
            await parts.routes.changed()
        woken.append("ready")

    async with serving(parts), trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        parts.engine(0).become("loading", "10 %")
        await wait_all_tasks_blocked()
        assert woken == []
        parts.engine(0).become("ready", port=81)
        await wait_all_tasks_blocked()
        assert woken == ["ready"]


# The way there


async def test_a_local_engine_is_reached_over_tcp_with_its_key(parts: Parts) -> None:
    async with serving(parts), trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")

        async def greet(stream: trio.SocketStream) -> None:
            await stream.send_all(b"engine")

        nursery.start_soon(trio.serve_listeners, greet, listeners)
        port = listeners[0].socket.getsockname()[1]
        parts.engine(0).become("ready", host="127.0.0.1", port=port)
        (target,) = parts.routes.targets(DEMO)
        async with await parts.routes.connect(target) as stream:
            assert await stream.receive_some() == b"engine"
        assert parts.routes.engine_key(PartId(DEMO)) == "secret"
        parts.engine(0).become("failed", "it died")
        with pytest.raises(EngineError, match="not running here any more"):
            await parts.routes.connect(target)
        nursery.cancel_scope.cancel()


async def test_a_model_that_vanished_while_a_request_was_under_way_has_no_replicas(
    autojump_clock: MockClock, parts: Parts
) -> None:
    parts.hearsay.join(1, budget_bytes=8 * GIB)
    parts.hearsay.hold(1, held(5))
    async with serving(parts):
        parts.hearsay.serve(1, 5)
        assert targets(parts, 5) == ["node-1"]
        parts.hearsay.hold(1, held(6))  # and it goes on saying that it serves the other
        assert digest(5) not in {model.digest for model in parts.routes.models()}
        assert targets(parts, 5) == []


async def test_a_request_that_waited_for_an_engine_has_its_key_while_it_is_drained(
    parts: Parts,
) -> None:
    async with serving(parts):
        parts.engine(0).become("ready", port=81)
        (target,) = parts.routes.targets(DEMO)
        parts.routes.begin(target.part)
        parts.manager.drain(target.part)
        with pytest.raises(EngineError, match="not running here any more"):
            await parts.routes.connect(target)
        assert parts.routes.engine_key(target.part) == "secret", "for a kept connection"
        parts.routes.end(target.part)


async def test_another_node_is_reached_through_the_mesh(parts: Parts) -> None:
    async with serving(parts):
        await three_replicas(parts)
        other = parts.routes.targets(ALPHA)[1]
        with pytest.raises(LinkError, match="has no address"):
            await parts.routes.connect(other)


async def test_another_node_is_lost_when_the_mesh_suspects_it(parts: Parts) -> None:
    async with serving(parts):
        await three_replicas(parts)
        other = next(t for t in parts.routes.targets(ALPHA) if t.node == NODES[1])
        with trio.move_on_after(0.05) as waiting:
            await parts.routes.lost(other)
        assert waiting.cancelled_caught
        parts.hearsay.suspect(1)
        with trio.fail_after(1):
            await parts.routes.lost(other)


# Models of experts that fit on no node


def moe(model: int, size_bytes: int) -> HeldModel:
    made = held(model)
    experts: dict[str, Any] = {"experts": 16, "experts_used": 4, "expert_bytes": size_bytes // 2}
    return replace(made, card=replace(made.card, size_bytes=size_bytes, **experts))


async def test_a_smaller_quantisation_answers_under_both_names(parts: Parts) -> None:
    for node in (1, 2):
        parts.hearsay.join(node, budget_bytes=8 * GIB)
    parts.hearsay.hold(1, moe(5, 20 * GIB), moe(6, 4 * GIB))
    parts.hearsay.want_copies(2, wanted(5))
    async with serving(parts):
        parts.hearsay.serve(1, 6, "ready")
        found = {one.id: one for one in parts.routes.models()}
        big, small = found["model-5"], found["model-6"]
        assert (big.state, big.layout, big.served_as) == ("ready", "quantisation", "model-6")
        assert (small.state, small.layout, small.served_as) == ("ready", "whole", "")
        assert big.nodes == ("node-1",)
        assert "a smaller quantisation of the same model answers" in big.reason
        [target] = parts.routes.targets(big.digest)
        assert (target.digest, target.node_name) == (small.digest, "node-1")
        assert parts.routes.targets(small.digest) == (target,)


async def test_a_model_says_what_its_shards_hold(parts: Parts) -> None:
    quality = ShardQuality(ShardKind.EXPERTS, "ab" * 32, 16, 8, 50_000, 930_000)
    described = replace(moe(5, 8 * GIB + GIB // 2), qualities=(quality,))
    for node in (1, 2):
        parts.hearsay.join(node, budget_bytes=8 * GIB)
        parts.hearsay.hold(node, described)
    parts.hearsay.want_copies(1, wanted(5))
    async with serving(parts):
        found = {one.id: one for one in parts.routes.models()}["model-5"]
        assert found.layout == "experts"
        assert found.shards == ShardsServed(
            experts=16, kept=(12, 12), divergence=0.05, coverage=0.93
        )
