from __future__ import annotations

from dataclasses import replace

from p2pmesh.identity.keys import show_id
from p2pmesh.placement.explain import explain
from p2pmesh.placement.facts import NodeFacts, PlacementInputs, PlacementRequest, Resident
from p2pmesh.placement.plan import plan
from tests.placement.placement_strategies import (
    GIB,
    MIB,
    described,
    facts_of,
    model,
    node,
    only,
    want,
)
from tests.placement.split_world import engine, layered

A, B, C = node("a"), node("b"), node("c")
NAMES = {A: "attic", B: "bench", C: "cellar"}
BIG, SMALL = model("big"), model("small")


def test_no_holder() -> None:
    facts = facts_of({A: GIB}, [described(SMALL, GIB, B)], [want(SMALL), want(BIG)])
    result = plan(facts)
    assert explain(only(result, SMALL), NAMES.__getitem__) == "no live node holds the file"
    assert explain(only(result, BIG), NAMES.__getitem__) == "no live node holds the file"


def test_too_large_names_the_largest_budget_and_rounds_honestly() -> None:
    need = 41 * GIB + 100 * MIB
    facts = facts_of(
        {A: 4 * GIB, B: 16 * GIB - 1, C: 99 * GIB}, [described(BIG, need, A, B)], [want(BIG)]
    )
    assert explain(only(plan(facts), BIG), NAMES.__getitem__) == (
        "needs 41.1 GiB, the largest budget of a node that holds it is 15.9 GiB on bench: it"
        " takes more memory, a smaller quantisation or a shorter context"
    )
    assert show_id(B) in explain(only(plan(facts), BIG))


def test_too_few_copies() -> None:
    few = facts_of({A: GIB, B: GIB}, [described(SMALL, MIB, A)], [want(SMALL, 3)])
    assert (
        explain(only(plan(few), SMALL), NAMES.__getitem__)
        == "only 1 of 3 copies: 1 node holds the file"
    )
    little = facts_of(
        {A: 13 * MIB, B: 7 * MIB}, [described(SMALL, 8 * MIB + 1, A, B)], [want(SMALL, 3)]
    )
    assert explain(only(plan(little), SMALL), NAMES.__getitem__) == (
        "only 1 of 3 copies: 2 nodes hold the file, but bench has 7.0 MiB free and a copy needs"
        " 8.1 MiB"
    )


def why(*nodes: NodeFacts, split: int = 2, kept: bool = False, **changes: object) -> str:
    """The reason for a model that A holds, on these nodes."""
    wish = PlacementRequest(owner=A, digest=BIG, split=split)
    copy = Resident(digest=BIG, node=A, state="ready")
    facts = PlacementInputs(
        nodes=nodes,
        models=(replace(layered(BIG, A), **changes),),  # type: ignore[arg-type]
        wants=(wish,),
        residents=(copy,) if kept else (),
    )
    return explain(only(plan(facts), BIG), NAMES.__getitem__)


def test_a_pipeline_says_who_has_which_layers() -> None:
    assert why(engine(A, 9 * GIB), engine(B, 9 * GIB)) == (
        "split over 2 nodes: layers 1 to 4 on attic, 5 to 8 on bench"
    )
    assert why(engine(A, 2 * GIB), engine(B, 9 * GIB)) == (
        "split over 2 nodes: layers 1 on attic, 2 to 8 on bench"
    )


def test_a_split_that_is_refused_names_the_cause_and_the_command_that_helps() -> None:
    ninth = engine(A, 9 * GIB)
    few = "too few nodes are here: `p2pmesh invite` lets more in"
    assert why(ninth) == f"not split over 2 nodes: {few}"
    assert why(ninth, engine(B, 9 * GIB), split=8).endswith(few)
    for rpc in ("", "8.0.0"):
        assert why(ninth, engine(B, 9 * GIB, rpc=rpc)).endswith(
            "have engines with the same RPC: `p2pmesh engine install` on bench helps"
        )
    assert "install` on attic" in why(engine(A, 9 * GIB, rpc=""), engine(B, 9 * GIB))
    assert why(engine(A, 9 * GIB, may_head=False), engine(B, 9 * GIB)) == (
        "not split over 2 nodes: attic holds the file and may run stages only on nodes that confine"
        " them, which are too few: an admin can change that by `p2pmesh grant attic stage`"
    )
    assert why(ninth, engine(B, 9 * GIB), split=9).endswith("it has too few layers")
    assert why(ninth, holders=(), shapes=()) == "no live node holds the file"


def test_a_split_without_room_names_the_node_and_its_lack() -> None:
    assert why(engine(A, 3 * GIB), engine(B, 4 * GIB)) == (
        "not split over 2 nodes: bench would need 6.5 GiB for its stage, has 4.0 GiB"
    )
    assert why(engine(A, 2 * GIB - 1), engine(B, 64 * GIB)) == (
        "not split over 2 nodes: attic would need 2.0 GiB for its stage, has 1.9 GiB"
    )
    three = [engine(n, 4 * GIB) for n in (A, B, C)]
    assert why(*three[:2], engine(C, GIB), split=3).endswith(
        "cellar would need 2.5 GiB for its stage, has 1.0 GiB"
    )
    assert "split over 3 nodes: layers" in why(*three, split=3)


def test_what_runs_whole_is_said_to_stay() -> None:
    assert why(engine(A, 9 * GIB), kept=True).endswith("lets more in; it stays whole on attic")


def test_a_model_that_fits_on_no_node_says_so_and_why_it_is_not_split() -> None:
    two = engine(A, 6 * GIB), engine(B, 6 * GIB)
    assert why(*two, split=0) == (
        "it fits on no node: split over 2 nodes: layers 1 to 4 on attic, 5 to 8 on bench"
    )
    assert why(engine(A, 6 * GIB), split=0) == (
        "needs 9.0 GiB, the largest budget of a node that holds it is 6.0 GiB on attic: it takes"
        " more memory, a smaller quantisation or a shorter context; not split over several nodes"
        " either: too few nodes are here: `p2pmesh invite` lets more in"
    )
    assert why(two[0], engine(B, 6 * GIB, rpc=""), split=0).endswith(
        "have engines with the same RPC: `p2pmesh engine install` on bench helps"
    )
    assert why(engine(A, 6 * GIB, may_head=False), two[1], split=0).endswith(
        "an admin can change that by `p2pmesh grant attic stage`"
    )
    assert why(two[0], engine(B, 3 * GIB), split=0).endswith(
        "its layers need 8.0 GiB, all nodes that could share it have 7.5 GiB for them"
    )
