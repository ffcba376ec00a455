from __future__ import annotations

from typing import Any

import click
import pytest

from p2pmesh.commands.plan import screen

GIB = 2**30


def part(name: str, first: int, last: int, measured: float | None = None) -> dict[str, Any]:
    return {
        "node": name * 4,
        "name": name,
        "part": "stage-0011223344556677-0",
        "first_layer": first,
        "last_layer": last,
        "need_bytes": 4 * GIB,
        "experts": None,
        "read_us": 20_000,
        "measured_tokens_per_s": measured,
    }


def model(*parts: dict[str, Any], layout: str = "pipeline", **changes: Any) -> dict[str, Any]:
    return {
        "id": "big",
        "digest": "ab" * 32,
        "layout": layout,
        "reason": "placed",
        "sentence": "split over 2 nodes",
        "copies": 1,
        "split_nodes": 2,
        "need_bytes": 8 * GIB,
        "parts": list(parts),
        "link_us": 900,
        "token_us": 40_900,
        "predicted_tokens_per_s": 24.0,
        "predicted_tokens_per_s_min": 24.0,
        **changes,
    }


def node(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": name * 4,
        "name": name,
        "self": name == "anna",
        "imagined": False,
        "budget_bytes": 6 * GIB,
        "used_bytes": 4 * GIB,
        "memory_mib_per_s": 24_576,
        "rpc": "7.0.0",
        "may_head": True,
        "confined": False,
        "parts": [],
        **changes,
    }


SPLIT = model(part("anna", 0, 3, 21.0), part("bert", 4, 7))


def answer(**changes: Any) -> dict[str, Any]:
    plan = {"digest": "cd" * 16, "algorithm": 4, "agreed": True, "asked_nodes": 1, "same_nodes": 1}
    return {
        "plan": plan,
        "models": [SPLIT],
        "nodes": [
            node("bert", parts=[{"model": "big", **part("bert", 4, 7)}]),
            node("anna", parts=[{"model": "big", **part("anna", 0, 3)}]),
        ],
        "explained": None,
        "what_if": None,
        **changes,
    }


def shown(**changes: Any) -> list[str]:
    return [line.rstrip() for line in click.unstyle(screen(answer(**changes))).splitlines()]


def test_a_plan_is_shown() -> None:
    stages = "pipeline: layers 1 to 4 on anna (4.0 GiB), layers 5 to 8 on bert (4.0 GiB)"
    lines = shown()
    assert lines[0] == f"Plan {'cd' * 16} for 2 nodes: all of 1 linked node agree"
    assert lines[3].startswith(f"big    {stages}  about 24  21")
    assert lines[5:8] == [
        "NODE                     MEMORY       READS  PARTS",
        "anna (this)  4.0 GiB of 6.0 GiB  24.0 GiB/s  big (layers 1 to 4, 4.0 GiB)",
        "bert         4.0 GiB of 6.0 GiB  24.0 GiB/s  big (layers 5 to 8, 4.0 GiB)",
    ]
    assert not any("unknown" in line for line in lines)


def test_an_unknown_speed_is_said_to_be_assumed() -> None:
    lines = shown(nodes=[node("anna", memory_mib_per_s=0)])
    assert "unknown" in lines[6]
    assert lines[-1] == "A node whose memory speed is unknown counts as reading 19.5 GiB/s."


@pytest.mark.parametrize(
    ("same", "asked", "says"),
    [(0, 0, "no other node is linked"), (1, 3, "1 of 3 linked nodes agree")],
)
def test_agreement_is_told(same: int, asked: int, says: str) -> None:
    plan = {**answer()["plan"], "same_nodes": same, "asked_nodes": asked, "agreed": same == asked}
    assert says in shown(plan=plan)[0]


def test_a_mesh_without_models_says_how_to_get_one() -> None:
    assert "Nobody wants a model yet: p2pmesh up --model FILE.gguf" in shown(models=[])


def test_other_ways_to_serve_a_model_of_experts_are_told() -> None:
    others = {
        "experts": "expert shards, of 16 experts of a layer 11 on anna",
        "layers": "split over 2 nodes",
        "smaller": [],
        "fits": {"name": "bert", "size_bytes": 5 * GIB, "quantisation": "Q4_K_M"},
    }

    def lines(**changes: Any) -> str:
        explained = {**SPLIT, "candidates": [], "helps": []}
        alternatives = {**others, **changes}
        return "\n".join(shown(explained={**explained, "alternatives": alternatives}))

    assert "Shards    expert shards, of 16 experts of a layer 11 on anna" in lines()
    assert "Layers    split over 2 nodes" in lines()
    assert "Q4_K_M would fit whole on bert, where there is room for a file of 5.0 GiB" in lines()
    assert "no usual quantisation would fit" in lines(fits=None)
    assert "Smaller   in this mesh: big-q4" in lines(smaller=["big-q4"])


def test_shards_say_what_they_hold_and_how_good_they_are() -> None:
    parts = [
        {**part(name, 0, 7), "part": "shard-0011223344556677", "experts": held}
        for name, held in (
            ("anna", {"kind": "experts", "held": 11, "of": 16}),
            ("bert", {"kind": "thin", "held": 10, "of": 16}),
        )
    ]
    sharded = model(*parts, layout="experts", split_nodes=0)
    lines = shown(models=[sharded], nodes=[node("anna", parts=[{"model": "big", **parts[0]}])])
    whole = "\n".join(lines)
    assert "shards: 11/16 experts on anna (4.0 GiB), 10/16 of each expert on bert" in whole
    assert "big (11/16 experts, 4.0 GiB)" in whole


def test_copies_of_different_speed_have_a_range() -> None:
    whole = {**part("anna", 0, 7), "part": "whole"}
    lines = shown(models=[model(whole, layout="whole", predicted_tokens_per_s_min=8.5)])
    assert "about 8.5 to 24" in lines[3]


def explained(**changes: Any) -> list[str]:
    lacking = {
        "node": "c" * 4,
        "name": "cleo",
        "holds": True,
        "runs": False,
        "need_bytes": 3 * GIB,
        "free_bytes": GIB,
        "missing_bytes": 2 * GIB,
        "lacks": ["memory", "right", "engine", "file", "load"],
    }
    helps = [{"lack": lack, **lacking} for lack in lacking["lacks"]]  # type: ignore[attr-defined]
    return shown(
        explained={
            **SPLIT,
            "candidates": [lacking],
            "helps": helps,
            "alternatives": None,
            **changes,
        }
    )


def test_a_model_is_explained() -> None:
    lines = explained()
    assert lines[0] == f"big  sha256 {'ab' * 32}"
    assert lines[4] == (
        "  A token   41 ms: 20 ms to read layers 1 to 4 on anna, 20 ms to read layers 5 to 8 on"
        " bert, 0.9 ms between the nodes; about 24 tok/s"
    )
    assert lines[5] == "  Measured  21 tok/s over the latest answers"
    assert lines[6:11] == [
        "  Helps     2.0 GiB more on cleo: a larger --memory there, or fewer other models",
        "  Helps     p2pmesh grant cleo stage",
        "  Helps     p2pmesh engine install on cleo, which has 1.0 GiB free",
        "  Helps     the file of big on cleo, which has 1.0 GiB free",
        "  Helps     p2pmesh status says why it fails on cleo",
    ]
    assert lines[-1] == (
        "cleo  yes   3.0 GiB  1.0 GiB  2.0 GiB, the right stage, to be the head,"
        " an engine with the same RPC, the file, a load that does not fail"
    )


def test_a_model_of_unknown_cost_is_explained() -> None:
    lines = explained(token_us=0, predicted_tokens_per_s=None, predicted_tokens_per_s_min=None)
    assert lines[4] == "  A token   unknown: the model does not tell its layers"


def test_a_copy_of_a_tiny_model_is_explained() -> None:
    whole = {**part("anna", 0, 7), "part": "whole", "read_us": 70}
    other = {**whole, "name": "bert", "read_us": 700}
    lines = explained(layout="whole", parts=[whole, other], helps=[])
    assert lines[1] == "  Layout    whole on anna, bert"
    assert lines[4] == (
        "  A token   70 µs to read all layers on anna, or 0.7 ms to read all layers on bert;"
        " about 24 tok/s"
    )
    assert lines[5] == "  Measured  nothing yet; nodes tell it within a minute of longer answers"


def test_speeds_of_several_copies_are_a_range() -> None:
    parts = [part("anna", 0, 7, 31.0), part("bert", 0, 7), part("cleo", 0, 7, 9.5)]
    assert "9.5 to 31" in shown(models=[model(*parts, layout="whole")])[3]


def test_differences_are_shown() -> None:
    what_if = {
        "changes": ["without bert", "with another node of 64GiB"],
        "digest": "ef" * 16,
        "models": [{"id": "big", "digest": "ab" * 32, "before": SPLIT, "after": None}],
        "nodes": [
            {**node("imagined-1", imagined=True), "used_bytes_before": 0},
            {**node("anna"), "used_bytes_before": 5 * GIB},
        ],
    }
    lines = shown(what_if=what_if)
    assert lines[0] == (
        "The plan without bert and with another node of 64GiB; nothing was changed:"
    )
    assert "about 24, then -  no live node holds the file" in lines[3]
    assert lines[5:8] == [
        "NODE            NOW     THEN       OF",
        "anna        5.0 GiB  4.0 GiB  6.0 GiB",
        "imagined-1      0 B  4.0 GiB  6.0 GiB",
    ]
    assert "imagined node has every model's file" in lines[-1]


def test_changes_that_change_nothing_say_so() -> None:
    what_if = {"changes": ["without bert"], "digest": "ef" * 16, "models": [], "nodes": []}
    lines = shown(what_if=what_if)
    assert lines[1] == "Every model is served as it is now."
    assert lines[-1] == "No node is left."
