"""Answers about the plan, from a node that hears of others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from p2pmesh.errors import ConfigError
from p2pmesh.identity.keys import show_id
from p2pmesh.node.plan_report import PlanReporter, parse_changes
from p2pmesh.placement.inputs import facts_of
from p2pmesh.placement.what_if import ImaginedNode, change, imagined_id
from p2pmesh.state.registers import Served
from tests.node.isolated_node import GIB, ME, Parts, serving, wanted
from tests.state.builders import NODES, digest, held

NAMES = {NODES[1]: "anna", NODES[2]: "bert"}


async def ask(
    parts: Parts, explained: str | None = None, what_if: Sequence[str] = ()
) -> dict[str, Any]:
    """As it arrives at whoever asks: through JSON."""
    reporter = PlanReporter(parts.mesh, parts.reconciler, parts.manager)
    made = await reporter.answer(explained=explained, what_if=what_if)
    arrived: dict[str, Any] = json.loads(json.dumps(made, allow_nan=False))
    assert arrived == made, "JSON values only: no tuples, no keys that are no text"
    return arrived


def of(answer: Mapping[str, Any], number: int) -> dict[str, Any]:
    [found] = (one for one in answer["models"] if one["digest"] == digest(number))
    assert isinstance(found, dict)
    return found


async def test_the_plan_is_told_with_reasons_and_figures(parts: Parts) -> None:
    parts.hearsay.join(1, budget_bytes=4 * GIB)
    parts.hearsay.want(1, wanted(1))
    async with serving(parts):
        answer = await ask(parts)
    assert answer["plan"]["digest"] == parts.reconciler.plan.digest.hex()
    assert (answer["explained"], answer["what_if"]) == (None, None)
    model = of(answer, 1)
    assert (model["id"], model["layout"], model["sentence"]) == ("model-1", "whole", "1 of 1 copy")
    [part] = model["parts"]
    assert (part["node"], part["part"]) == (show_id(ME), "whole")
    assert part["measured_tokens_per_s"] is None
    me, other = sorted(answer["nodes"], key=lambda one: not one["self"])
    assert (me["budget_bytes"], me["used_bytes"]) == (8 * GIB, part["need_bytes"])
    assert [one["model"] for one in me["parts"]] == ["model-1"]
    assert (other["name"], other["used_bytes"], other["parts"]) == ("node-1", 0, [])


async def test_the_others_agree_or_not(parts: Parts) -> None:
    async with serving(parts):
        alone = await ask(parts)
        parts.hearsay.join(1, budget_bytes=4 * GIB)
        beside = await ask(parts)
    assert alone["plan"]["asked_nodes"] == 0
    assert (beside["plan"]["asked_nodes"], beside["plan"]["agreed"]) == (1, False)


async def test_what_an_engine_measured_is_told(parts: Parts) -> None:
    parts.hearsay.want(1, wanted(1))
    parts.hearsay.join(1)
    async with serving(parts):
        [path] = [one.log_path for one in parts.engines]
        path.write_text("eval time = 1000.00 ms /  314 tokens (3 ms per token)\n")
        answer = await ask(parts)
    assert [part["measured_tokens_per_s"] for part in of(answer, 1)["parts"]] == [310.0]


async def test_what_other_nodes_measured_is_told(parts: Parts) -> None:
    parts.hearsay.join(1, budget_bytes=4 * GIB)
    parts.hearsay.hold(1, held(5))
    parts.hearsay.want(1, wanted(5))
    parts.hearsay.serve_parts(1, Served(digest=digest(5), state="ready", token_us=32_258))
    async with serving(parts):
        answer = await ask(parts)
    assert [part["measured_tokens_per_s"] for part in of(answer, 5)["parts"]] == [31.0]


async def test_a_model_is_explained_by_any_of_its_names(parts: Parts) -> None:
    parts.hearsay.join(1, budget_bytes=4 * GIB)
    parts.hearsay.want(1, wanted(1))
    async with serving(parts):
        by_id = (await ask(parts, "model-1"))["explained"]
        by_digest = (await ask(parts, digest(1)))["explained"]
    assert by_id == by_digest
    lacks = {one["name"]: (one["runs"], one["lacks"]) for one in by_id["candidates"]}
    assert lacks == {"me": (True, []), "node-1": (False, ["file"])}
    assert by_id["helps"] == []


async def test_a_model_that_fits_nowhere_says_what_helps(parts: Parts) -> None:
    parts.hearsay.give(2**20)
    parts.hearsay.join(1, budget_bytes=4 * GIB)
    parts.hearsay.want(1, wanted(1))
    async with serving(parts):
        explained = (await ask(parts, "model-1"))["explained"]
    helps = {one["lack"]: one["name"] for one in explained["helps"]}
    assert helps == {"memory": "me", "file": "node-1"}


async def test_a_what_if_is_told_as_differences_and_changes_nothing(parts: Parts) -> None:
    parts.hearsay.join(1, budget_bytes=4 * GIB)
    parts.hearsay.want(1, wanted(1))
    async with serving(parts):
        before = parts.reconciler.plan
        answer = await ask(parts, what_if=["remove=me", "add=64GiB"])
        assert parts.reconciler.plan is before
        again = await ask(parts, what_if=["add=64GiB", "remove=me"])
    what_if = answer["what_if"]
    assert what_if["changes"] == ["without me", "with another node of 64GiB"]
    [one] = (one for one in what_if["models"] if one["digest"] == digest(1))
    assert [part["name"] for part in one["before"]["parts"]] == ["me"]
    assert [part["name"] for part in one["after"]["parts"]] == ["imagined-1"]
    nodes = {node["name"]: node["imagined"] for node in what_if["nodes"]}
    assert nodes == {"node-1": False, "imagined-1": True}
    assert again["what_if"]["digest"] == what_if["digest"] != answer["plan"]["digest"]


async def test_a_removed_node_is_missed_like_a_dead_one(parts: Parts) -> None:
    hearsay = parts.hearsay
    for number in (1, 2, 3):
        hearsay.join(number, budget_bytes=number * GIB)
        hearsay.hold(number, held(1), held(number + 1))
        hearsay.want(number, wanted(number), wanted(1, split=2))
        hearsay.serve(number, number + 1)
    view = parts.mesh.view
    facts = facts_of(view, ())
    for gone in ([NODES[1]], [ME, NODES[3]], [*NODES[1:4]]):
        assert change(facts, removed=gone).encode() == facts_of(view, gone).encode()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("grow=3", "write remove=NODE, add=64GiB or add=64GiB:200GB/s"),
        ("add=much", "'much' is not a size"),
        ("add=64GiB:fast", "'fast' is no speed"),
        ("add=64GiB:1B/s", "no speed that memory can have"),
        ("remove=zoe", "there is no node in the plan 'zoe'"),
    ],
)
def test_a_what_if_that_means_nothing_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_changes([text], NAMES)


def test_a_node_is_removed_once() -> None:
    with pytest.raises(ConfigError, match="there is no node in the plan 'anna'"):
        parse_changes(["remove=anna", "remove=anna"], NAMES)


def test_what_ifs_are_read() -> None:
    read = parse_changes(["remove= bert", "add=64GiB:200GB/s", "add=8G"], NAMES)
    assert read.removed == (NODES[2],)
    assert read.added == (
        ImaginedNode(budget_bytes=64 * GIB, memory_mib_per_s=200 * 10**9 // 2**20),
        ImaginedNode(budget_bytes=8 * GIB),
    )


@pytest.mark.parametrize(
    ("text", "says"), [("nobody-knows", "the plan has .*model-1"), ("model", "the plan has")]
)
async def test_a_model_that_nobody_knows_is_refused(parts: Parts, text: str, says: str) -> None:
    parts.hearsay.join(1)
    parts.hearsay.want(1, wanted(1))
    async with serving(parts):
        with pytest.raises(ConfigError, match=says):
            await ask(parts, text)


def test_no_node_has_the_id_of_an_imagined_one() -> None:
    assert imagined_id(1) not in NODES
