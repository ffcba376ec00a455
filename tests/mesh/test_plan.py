"""`p2pmesh plan` asks real nodes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from p2pmesh.identity.keys import ID_BYTES, parse_id, show_id
from tests.mesh.nodes import MEMORY_MIB_PER_S, Node, assert_sentence, cli, running, wait_until
from tests.mesh.test_failover import ask

MODEL = "p2pmesh-demo-tiny"
# Every key of the answer; what a program reads may get more, and loses none.
KEYS = {
    "plan": {"digest", "algorithm", "agreed", "asked_nodes", "same_nodes"},
    "models": {
        *("id", "digest", "layout", "reason", "sentence", "copies", "split_nodes", "need_bytes"),
        *("parts", "link_us", "token_us", "predicted_tokens_per_s", "predicted_tokens_per_s_min"),
    },
    "parts": {
        *("node", "name", "part", "first_layer", "last_layer", "need_bytes", "read_us"),
        *("experts", "measured_tokens_per_s"),
    },
    "nodes": {
        *("id", "name", "self", "imagined", "budget_bytes", "used_bytes", "memory_mib_per_s"),
        *("rpc", "may_head", "confined", "parts"),
    },
}


def asked(node: Node, *options: str) -> str:
    done = cli("plan", *options, "--home", node.me["home"])
    assert done.returncode == 0, done.stderr
    return done.stdout


def plan(node: Node, *options: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(asked(node, "--json", *options))
    return answer


def test_nodes_tell_their_plan(tmp_path: Path) -> None:
    with running(tmp_path, 2) as nodes:
        first, second = nodes
        wait_until(lambda: plan(first)["plan"]["same_nodes"] == 1, "both have one plan")
        _json_is_complete(plan(first))
        _texts_are_read(first)
        _an_answer_is_measured(first, second)
        _what_ifs_are_computed(first)
        _mistakes_are_sentences(first)


def _json_is_complete(answer: dict[str, Any]) -> None:
    assert set(answer) == {"plan", "models", "nodes", "explained", "what_if"}
    assert set(answer["plan"]) == KEYS["plan"]
    for model in answer["models"]:
        assert set(model) == KEYS["models"]
        for part in model["parts"]:
            assert set(part) == KEYS["parts"]
    for node in answer["nodes"]:
        assert set(node) == KEYS["nodes"]
        assert node["memory_mib_per_s"] == MEMORY_MIB_PER_S
        assert show_id(parse_id(node["id"])) == node["id"]
    assert len(answer["plan"]["digest"]) == 2 * ID_BYTES


def _texts_are_read(node: Node) -> None:
    text = asked(node)
    assert f"{MODEL}  whole on " in text
    assert "for 2 nodes: all of 1 linked node agree" in text
    assert "node-1 (this)" in text
    assert "24.0 GiB/s" in text
    explained = asked(node, "--explain", MODEL)
    assert "to read all layers on node-" in explained
    assert "1 of 1 copy" in explained


def _an_answer_is_measured(*nodes: Node) -> None:
    ask(nodes[0])
    host = next(
        node for node in nodes if plan(node)["models"][0]["parts"][0]["node"] == node.me["id"]
    )
    time.sleep(0.2)  # the engine logs once it has answered
    [part] = plan(host)["models"][0]["parts"]
    assert part["measured_tokens_per_s"] > 0


def _what_ifs_are_computed(node: Node) -> None:
    [part] = plan(node)["models"][0]["parts"]
    removed = f"remove={part['name']}"
    text = asked(node, "--what-if", removed, "--what-if", "add=64GiB:200GB/s")
    assert f"The plan without {part['name']} and with another node of 64GiB:200GB/s" in text
    assert f"whole on {part['name']}" in text
    answer = plan(node, "--what-if", removed)
    [moved] = answer["what_if"]["models"]
    assert moved["after"]["parts"][0]["node"] != part["node"]
    assert answer["models"][0]["parts"][0]["node"] == part["node"]


def _mistakes_are_sentences(node: Node) -> None:
    home = "--home", node.me["home"]
    for options, says in (
        (("--explain", "nope"), f"no model here is called 'nope'; the plan has {MODEL}"),
        (("--what-if", "grow=3"), "write remove=NODE, add=64GiB or add=64GiB:200GB/s"),
        (("--what-if", "add=much"), "'much' is not a size: write it like 8GiB"),
        (("--what-if", "add=64GiB:fast"), "'fast' is no speed"),
        (("--what-if", "remove=zoe"), "there is no node in the plan 'zoe'"),
    ):
        assert_sentence(cli("plan", *options, *home), 2, says)
    nowhere = Path(node.me["home"]) / "elsewhere"
    assert_sentence(cli("plan", f"--home={nowhere}"), 1, "No node is running here")
