from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from random import Random
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmesh.identity.credentials import Credential
from p2pmesh.models.cards import need_bytes
from p2pmesh.models.parts import (
    UNMEASURED,
    Shard,
    ShardKind,
    ShardQuality,
    StageName,
    StageRange,
    shard_name,
    unit_id,
)
from p2pmesh.placement.distance import FARTHEST
from p2pmesh.placement.facts import (
    ModelFacts,
    NodeFacts,
    PlacementInputs,
    PlacementRequest,
    Resident,
)
from p2pmesh.placement.inputs import (
    CONTEXT_DEFAULT_MAX,
    CONTEXT_MIN,
    SLOTS_FOR_OTHERS_MAX,
    InputsReader,
    default_context,
    facts_of,
    launch_context,
    launch_slots,
    part_context,
    pipeline_context,
)
from p2pmesh.placement.shape import shape_of
from p2pmesh.sharing import DIVERGENCE_MAX, Sharing
from p2pmesh.state.document import Document
from p2pmesh.state.registers import (
    Caps,
    HeldModel,
    ModelRequest,
    Served,
    ServeState,
    held_pages,
    held_register,
    serves_to_wire,
    wants_to_wire,
)
from p2pmesh.state.views import MeshReader, MeshView, read
from p2pmesh.wire.facts import Fact
from p2pmesh.wire.registers import CAPS, MEMBER, SERVING, WANTS
from tests.state.builders import MESH, NODES, NOW, card, certificate, digest, held, member, record

A, B, C = NODES[:3]
ALPHA, BETA = digest(1), digest(2)
GIB = 2**30


def wanted(model: int = 1, **changes: object) -> ModelRequest:
    one = ModelRequest(
        digest=digest(model), stem=f"model-{model}", replicas=1, priority=0, context=0, slots=0
    )
    return replace(one, **changes)  # type: ignore[arg-type]  # the tests name fields of it


class World:
    """A document that nodes, by number, write into."""

    def __init__(self) -> None:
        self.document = Document(MESH)
        self._seq = 0

    def view(self) -> MeshView:
        return read(self.document, me=A)

    def say(self, owner: int, register: str, body: dict[str, object]) -> None:
        self._seq += 1
        one = record(owner, register, seq=self._seq, body=body)
        assert self.document.merge(one, NOW)

    def node(
        self,
        owner: int,
        *,
        budget_bytes: int | None = GIB,
        holds: Iterable[HeldModel] = (),
        serves: Iterable[Served] = (),
        wants: Iterable[ModelRequest] = (),
        left: bool = False,
    ) -> None:
        self.say(owner, MEMBER, member(f"node-{owner}", left=left).to_wire())
        if budget_bytes is not None:
            caps = Caps(budget_bytes=budget_bytes, engine="embedded", rpc="")
            self.say(owner, CAPS, caps.to_wire())
        for number, page in enumerate(held_pages(holds)):
            self.say(owner, held_register(number), page)
        self.say(owner, SERVING, serves_to_wire(serves))
        self.say(owner, WANTS, wants_to_wire(wants))


# Experts


def test_of_equal_shards_the_worse_that_two_holders_say_counts() -> None:
    quality = ShardQuality(ShardKind.EXPERTS, "ab" * 32, 16, 8, 50_000, 930_000)
    guess = quality._replace(divergence=UNMEASURED)
    worse = quality._replace(divergence=70_000, coverage=950_000)
    described = card(expert_bytes=1 << 20, size_bytes=4 << 20)
    world = World()
    world.node(0, holds=[held(1, card=described, qualities=(quality, guess))], wants=[wanted()])
    world.node(1, holds=[held(1, card=described, qualities=(worse,))])
    forged = replace(described, expert_bytes=1 << 60)
    world.node(2, holds=[held(1, card=forged)])
    [model] = facts_of(world.view(), ()).models
    assert model.qualities == (guess, quality._replace(divergence=70_000))
    assert dict(model.expert_bytes) == {A: 1 << 20, B: 1 << 20, C: 4 << 20}
    [want] = facts_of(world.view(), ()).wants
    assert (want.moe, want.divergence_max) == (Sharing.AUTO, DIVERGENCE_MAX)


def test_what_one_holder_of_several_says_of_shards_is_hearsay() -> None:
    quality = ShardQuality(ShardKind.EXPERTS, "ab" * 32, 16, 8, 50_000, 930_000)
    lie = ShardQuality(ShardKind.EXPERTS, "cd" * 32, 16, 8, 0, 1_000_000)
    described = card(expert_bytes=1 << 20, size_bytes=4 << 20)
    world = World()
    world.node(0, holds=[held(1, card=described, qualities=(quality,))], wants=[wanted()])
    [model] = facts_of(world.view(), ()).models
    assert (model.qualities, model.hearsay) == ((quality,), ()), "nobody else could know"
    world.node(1, holds=[held(1, card=described, qualities=(lie,))])
    [model] = facts_of(world.view(), ()).models
    assert (model.qualities, model.hearsay) == ((), (quality, lie))
    world.node(2, holds=[held(1, card=described, qualities=(quality,))])
    [model] = facts_of(world.view(), ()).models
    assert (model.qualities, model.hearsay) == ((quality,), (lie,))
    [model] = facts_of(world.view(), [C]).models
    assert model.qualities == (), "the dead say nothing"


def test_where_a_copy_failed_is_told_by_its_node_alone() -> None:
    world = World()
    states: tuple[ServeState, ...] = ("failed", "ready", "loading")
    for number, state in enumerate(states):
        served = Served(digest=ALPHA, state=state)
        world.node(number, holds=[held(1)], serves=[served])
    [model] = facts_of(world.view(), ()).models
    assert model.failing == (A,)
    stage = Served(digest=ALPHA, state="failed", name=str(StageName("0" * 16, 1)))
    world.node(0, holds=[held(1)], serves=[stage])
    [model] = facts_of(world.view(), ()).models
    assert model.failing == (), "a stage that failed is no copy"


def test_experts_are_looked_at_only_where_a_model_is_wanted_or_shared() -> None:
    quality = ShardQuality(ShardKind.EXPERTS, "ab" * 32, 16, 8, 50_000, 930_000)
    shard = Shard(ShardKind.EXPERTS, "ab" * 32, 16, 8, 0xFF)
    described = held(1, card=card(expert_bytes=1 << 20, size_bytes=4 << 20), qualities=(quality,))
    world = World()
    world.node(0, holds=[described])
    [model] = facts_of(world.view(), ()).models
    assert (model.expert_bytes, model.qualities) == ((), ())
    served = Served(digest=ALPHA, state="ready", name=shard_name(ALPHA, shard), shard=shard)
    world.node(1, serves=[served])
    facts = facts_of(world.view(), ())
    assert facts.models[0].qualities == (quality,)
    assert [one.shard for one in facts.residents] == [shard]


def test_smaller_quantisations_of_a_wanted_model_are_told() -> None:
    size = 4 << 30
    big = card(experts=16, experts_used=4, expert_bytes=size // 2, size_bytes=size)
    half, quarter = (replace(big, size_bytes=size // part) for part in (2, 4))
    other = replace(quarter, width=big.width + 1)
    finetune = replace(quarter, name="Some Model Coder")
    dense = replace(big, experts=0, size_bytes=size // 8)
    world = World()
    cards = [big, half, quarter, other, dense, finetune]
    world.node(0, holds=[held(n, card=one) for n, one in enumerate(cards, 1)], wants=[wanted(1)])
    found = {one.digest: one.smaller for one in facts_of(world.view(), ()).models}
    assert found == {**dict.fromkeys(map(digest, range(1, 7)), ()), digest(1): (BETA, digest(3))}
    world.node(0, holds=[held(n, card=one) for n, one in enumerate(cards, 1)], wants=[wanted(3)])
    assert not any(one.smaller for one in facts_of(world.view(), ()).models), "nothing is smaller"


# Context


@pytest.mark.parametrize(
    ("made_for", "given"),
    [(4096, 4096), (CONTEXT_DEFAULT_MAX, CONTEXT_DEFAULT_MAX), (10**6, CONTEXT_DEFAULT_MAX)],
)
def test_the_default_context_is_the_models_own_up_to_a_bound(made_for: int, given: int) -> None:
    assert default_context(card(context=made_for)) == given


def context(wish: int | None, *, made_for: int = 4096, budget_bytes: int = 64 * GIB) -> int:
    one = None if wish is None else wanted(context=wish)
    return launch_context(one, card(context=made_for), budget_bytes)


@pytest.mark.parametrize(
    ("wish", "given"),
    [(None, 4096), (0, 4096), (1000, 1000), (4096, 4096), (4_000_000, 4096), (1, CONTEXT_MIN)],
)
def test_an_engine_gets_the_context_that_was_asked_for_within_reason(
    wish: int | None, given: int
) -> None:
    assert context(wish) == given


def test_a_model_nobody_wants_gets_its_default_context() -> None:
    assert context(None, made_for=10**6) == context(0, made_for=10**6) == CONTEXT_DEFAULT_MAX


def test_no_wish_for_context_makes_a_model_too_large_for_a_node() -> None:
    need = need_bytes(card(context=10**6), context=100_000)
    assert context(100_000, made_for=10**6, budget_bytes=need) == 100_000
    assert context(100_000, made_for=10**6, budget_bytes=need - 1) == CONTEXT_DEFAULT_MAX
    assert context(2000, made_for=10**6, budget_bytes=0) == 2000, "less is never too large"


@pytest.mark.parametrize(
    ("asked", "own", "given"), [(0, 0, 4), (2, 0, 2), (64, 0, SLOTS_FOR_OTHERS_MAX), (64, 64, 64)]
)
def test_slots_for_others_are_bounded(asked: int, own: int, given: int) -> None:
    assert launch_slots(wanted(slots=asked), wanted(slots=own) if own else None, 4) == given
    assert launch_slots(None, None, 4) == 4


# Facts


def test_everything_that_is_said_becomes_facts() -> None:
    world = World()
    world.node(
        0,
        budget_bytes=2 * GIB,
        holds=[held(1), held(2, demo=True)],
        serves=[Served(digest=ALPHA, state="ready")],
    )
    world.node(
        1,
        budget_bytes=GIB,
        holds=[held(1)],
        serves=[Served(digest=ALPHA, state="loading", detail="30 %")],
        wants=[wanted(replicas=2, priority=1, context=1024, slots=4)],
    )
    shape = shape_of(card(), context=1024)
    assert facts_of(world.view(), ()) == PlacementInputs(
        nodes=(
            NodeFacts(node=A, budget_bytes=2 * GIB, may_head=True),
            NodeFacts(node=B, budget_bytes=GIB, may_head=True),
        ),
        models=(
            ModelFacts(
                digest=ALPHA,
                need_bytes=need_bytes(card(), context=1024),
                holders=(A, B),
                shapes=((A, shape), (B, shape)),
            ),
            ModelFacts(
                digest=BETA,
                need_bytes=need_bytes(card(), context=4096),
                holders=(A,),
                fallback=True,
            ),
        ),
        wants=(PlacementRequest(owner=B, digest=ALPHA, replicas=1, priority=0),),
        residents=(
            Resident(node=A, digest=ALPHA, state="ready"),
            Resident(node=B, digest=ALPHA, state="loading"),
        ),
    )


def test_what_a_pipeline_hangs_on_becomes_facts() -> None:
    world = World()
    world.node(0, holds=[held(1)], wants=[wanted(split=2, context=1024)])
    caps = Caps(budget_bytes=GIB, engine="b11434", rpc="7.0.0", memory_mib_per_s=30_000)
    world.say(1, MEMBER, member("node-1").to_wire())
    world.say(1, CAPS, caps.to_wire())
    stages = (StageRange(A, 0, 0), StageRange(B, 1, 1))
    name = str(StageName(unit_id(ALPHA, stages), 1))
    tail = Served(digest=ALPHA, state="ready", name=name, stages=stages)
    world.say(1, SERVING, serves_to_wire([tail]))
    facts = facts_of(world.view(), ())
    assert {(one.node, one.rpc, one.memory_mib_per_s) for one in facts.nodes} == {
        (A, "", 0),
        (B, "7.0.0", 30_000),
    }
    assert facts.wants == (PlacementRequest(digest=ALPHA, owner=A, split=2),)
    assert facts.models[0].shapes == ((A, shape_of(card(), context=1024)),)
    assert facts.residents == (
        Resident(digest=ALPHA, node=B, state="ready", name=name, stages=stages),
    )
    world.node(0, holds=[held(1)])
    world.say(0, WANTS, wants_to_wire([]))
    assert facts_of(world.view(), ()).models[0].shapes, "what still runs takes memory"
    world.say(1, SERVING, serves_to_wire([]))
    assert facts_of(world.view(), ()).models[0].shapes == ()


def test_distances_become_facts_in_classes_that_are_known() -> None:
    world = World()
    world.node(0)
    far = ((B, 1), (C, 99))
    caps = Caps(budget_bytes=GIB, engine="", rpc="", measured=False, far=far)
    world.say(0, CAPS, caps.to_wire())
    (facts,) = facts_of(world.view(), ()).nodes
    assert (facts.measured, facts.far) == (False, ((B, 1), (C, FARTHEST)))


@pytest.mark.parametrize("confined", [True, False])
def test_who_confines_stages_says_so_itself(confined: bool) -> None:  # noqa: FBT001
    world = World()
    world.node(0)
    world.say(0, CAPS, Caps(budget_bytes=GIB, engine="", rpc="", confined=confined).to_wire())
    (facts,) = facts_of(world.view(), ()).nodes
    assert facts.confined is confined


@pytest.mark.parametrize("stage", [True, False])
def test_only_who_has_the_right_may_head(stage: bool) -> None:  # noqa: FBT001
    world = World()
    world.node(0)
    view = world.view()
    given = Mock(spec=Credential, stage=stage)
    nodes = {A: replace(view.nodes[A], credential=given)}
    (facts,) = facts_of(replace(view, nodes=nodes), ()).nodes
    assert facts.may_head is stage


def test_no_wish_makes_a_pipelines_context_longer_than_the_default() -> None:
    long = card(context=10**6)
    assert pipeline_context(wanted(context=10**6), long) == CONTEXT_DEFAULT_MAX
    assert pipeline_context(wanted(context=1000), long) == 1000
    assert pipeline_context(None, long) == CONTEXT_DEFAULT_MAX
    wish = wanted(context=10**6)
    for name, tokens in (("whole", 10**6), (f"stage-{'0' * 16}-0", CONTEXT_DEFAULT_MAX)):
        assert part_context(name, wish, long, 2**62) == tokens


def test_dead_nodes_are_left_out_of_all_but_their_wishes() -> None:
    world = World()
    world.node(0, holds=[held(1)], serves=[Served(digest=ALPHA, state="ready")])
    world.node(
        1,
        holds=[held(1), held(2)],
        serves=[Served(digest=ALPHA, state="ready")],
        wants=[wanted()],
    )
    facts = facts_of(world.view(), {B})
    assert [part.node for part in facts.nodes] == [A]
    assert {model.digest: model.holders for model in facts.models} == {ALPHA: (A,)}
    assert facts.wants == (PlacementRequest(owner=B, digest=ALPHA),)
    assert [part.node for part in facts.residents] == [A]


def test_a_claim_about_a_model_counts_for_who_makes_it() -> None:
    world = World()
    for owner, size_bytes in enumerate((3000, 4000, 2**62)):
        world.node(owner, holds=[held(1, card=card(size_bytes=size_bytes))])
    (described,) = facts_of(world.view(), ()).models
    honest = [need_bytes(card(size_bytes=size), context=4096) for size in (3000, 4000, 2**62)]
    assert [described.need_on(n) for n in (A, B, C)] == honest
    assert described.need_bytes == honest[1], "no single one of three moves the figure for all"


@pytest.mark.parametrize(("owners", "copies"), [((0,), 1), ((0, 1), 2), ((0, 1, 2), 3)])
def test_one_owner_asks_for_one_copy(owners: Iterable[int], copies: int) -> None:
    world = World()
    for owner in owners:
        world.node(owner, holds=[held(1)], wants=[wanted(replicas=1024, priority=1000)])
    facts = facts_of(world.view(), ())
    assert {(want.replicas, want.priority) for want in facts.wants} == {(copies, 0)}


def test_who_is_dead_and_unknown_changes_nothing() -> None:
    world = World()
    world.node(0, holds=[held(1)])
    assert facts_of(world.view(), {C}) == facts_of(world.view(), ())


def test_a_node_gives_nothing_before_it_has_said_what() -> None:
    world = World()
    world.node(0, budget_bytes=None, holds=[held(1)])
    facts = facts_of(world.view(), ())
    assert facts.nodes == ()
    assert facts.models[0].holders == (A,)


@pytest.mark.parametrize("state", ["failed", "stopping"])
def test_what_failed_or_stops_is_no_resident(state: str) -> None:
    world = World()
    world.say(0, MEMBER, member().to_wire())
    world.say(0, SERVING, {"serves": [[ALPHA, "whole", state, ""], [BETA, "whole", "ready", ""]]})
    facts = facts_of(world.view(), ())
    assert facts.residents == (Resident(node=A, digest=BETA, state="ready"),)


def test_a_wish_that_its_owner_repeats_is_one_wish() -> None:
    world = World()
    world.node(0, holds=[held(1)], wants=[wanted(replicas=16)] * 16)
    view = world.view()
    assert [one.owner for one in view.models[ALPHA].wishes] == [A]
    assert facts_of(view, ()).wants == (PlacementRequest(digest=ALPHA, owner=A, replicas=1),)


def test_slots_share_one_cache() -> None:
    needs = []
    for slots in (1, 64):
        world = World()
        world.node(0, holds=[held(1)], wants=[wanted(context=2048, slots=slots)])
        needs.append(facts_of(world.view(), ()).models[0].need_bytes)
    assert needs[0] == needs[1] == need_bytes(card(), context=2048)


def test_a_longer_context_needs_more() -> None:
    needs = []
    for context in (1024, 8192):
        world = World()
        world.node(0, holds=[held(1)], wants=[wanted(context=context)])
        needs.append(facts_of(world.view(), ()).models[0].need_bytes)
    assert needs[0] < needs[1]


def test_what_did_not_change_is_not_made_anew() -> None:
    world = World()
    for owner in range(3):
        world.node(owner, holds=[held(1 + owner), held(5)], wants=[wanted(1 + owner)])
    reader, inputs = MeshReader(world.document, A), InputsReader()
    before = inputs.read(reader.view, ())
    caps = Caps(budget_bytes=7 * GIB, engine="embedded", rpc="")
    world.say(2, CAPS, caps.to_wire())
    assert reader.update([C])
    after = inputs.read(reader.view, ())
    assert after == facts_of(world.view(), ()) != before
    same = {id(part) for part in (*before.nodes, *before.models, *before.wants)}
    made = [part for part in (*after.nodes, *after.models, *after.wants) if id(part) not in same]
    assert {type(part).__name__ for part in made} == {"NodeFacts", "ModelFacts", "PlacementRequest"}
    assert len(made) == 1 + 2 + 1, "its budget, its models, and who wants those"
    assert inputs.read(reader.view, {C}) == facts_of(world.view(), {C})


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_inputs_kept_up_to_date_are_those_of_the_document(seed: int) -> None:
    rng, now = Random(seed), NOW
    document = Document(MESH)
    reader, inputs = MeshReader(document, A), InputsReader()
    for seq in range(1, 40):
        now += rng.choice([0, 0, 40])
        changed = set(document.expire(now))
        owner, model = rng.randrange(3), rng.randrange(1, 4)
        budget = Caps(budget_bytes=rng.randrange(3) * GIB, engine="e", rpc=rng.choice("78"))
        mine = held(model, card=card(context=rng.choice([512, 2048])), demo=rng.random() < 0.3)
        served = Served(digest=digest(model), state=rng.choice(["loading", "ready", "failed"]))
        numbers = {"context": rng.choice([0, 1024]), "split": rng.choice([0, 0, 2])}
        wish = wanted(model, replicas=rng.randrange(3), **numbers)
        bodies: dict[str, dict[str, object]] = {
            MEMBER: member(left=rng.random() < 0.2).to_wire(),
            CAPS: budget.to_wire(),
            held_register(0): held_pages([mine])[0],
            SERVING: serves_to_wire([served]),
            WANTS: wants_to_wire([wish] * rng.randrange(1, 3)),
        }
        if rng.random() < 0.1:
            one: Fact = certificate(owner, ((owner + 1) % 3,), seq=seq - 1, issued_at=now)
        else:
            register, body = rng.choice(list(bodies.items()))
            one = record(owner, register, seq=seq, body=body, issued_at=now)
        changed |= document.merge(one, now).owners
        reader.update(changed)
        dead = rng.sample(NODES[:3], rng.randrange(2))
        kept, anew = inputs.read(reader.view, dead), facts_of(read(document, me=A), dead)
        assert kept == anew
        canonical = PlacementInputs(
            nodes=anew.nodes, models=anew.models, wants=anew.wants, residents=anew.residents
        )
        assert canonical == anew


def test_equal_records_make_equal_facts_in_whatever_order_they_came() -> None:
    def facts(owners: Iterable[int]) -> PlacementInputs:
        world = World()
        for owner in owners:
            world.node(owner, holds=[held(1), held(2)], wants=[wanted(priority=owner)])
        return facts_of(world.view(), ())

    assert facts((0, 1, 2)).encode() == facts((2, 0, 1)).encode()
