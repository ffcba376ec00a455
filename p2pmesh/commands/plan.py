"""`p2pmesh plan`: what the mesh decided and why, and what other nodes would change."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from p2pmesh.commands import formatting
from p2pmesh.commands.table import Column, table
from p2pmesh.config import Settings
from p2pmesh.control import find_node
from p2pmesh.errors import LocalError
from p2pmesh.home import Home
from p2pmesh.placement.pipeline import MEMORY_MIB_PER_S

MIB = 2**20
US_PER_MS = 1000

_MODELS = (
    Column("MODEL"),
    Column("LAYOUT"),
    Column("TOK/S"),
    Column("MEASURED"),
    Column("WHY"),
)
_NODES = (
    Column("NODE"),
    Column("MEMORY", right=True),
    Column("READS", right=True),
    Column("PARTS"),
)
_CANDIDATES = (
    Column("NODE"),
    Column("FILE"),
    Column("NEEDS", right=True),
    Column("FREE", right=True),
    Column("LACKS"),
)
_CHANGES = (
    Column("MODEL"),
    Column("NOW"),
    Column("THEN"),
    Column("TOK/S"),
    Column("WHY"),
)
_NODE_CHANGES = (
    Column("NODE"),
    Column("NOW", right=True),
    Column("THEN", right=True),
    Column("OF", right=True),
)


@click.command()
@click.option("--explain", metavar="MODEL", help="Show everything about one model.")
@click.option(
    "--what-if",
    metavar="CHANGE",
    multiple=True,
    help="Compute the plan with remove=NODE, add=64GiB or add=64GiB:200GB/s; changes nothing.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def plan(
    settings: Settings, *, explain: str | None, what_if: tuple[str, ...], as_json: bool
) -> None:
    """Show what the mesh decided about its models, and why.

    Speeds are upper estimates: how long it takes to read the weights once per token.
    """
    values = {"explain": explain, "what_if": list(what_if)}
    answer = find_node(Home.of(settings)).order("plan", values)
    if as_json:
        click.echo(json.dumps(answer, ensure_ascii=False))
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    try:
        click.echo(screen(answer, width))
    except (KeyError, TypeError, AttributeError) as exc:
        raise LocalError(
            f"The running node's plan cannot be read (lacks {exc}); it may be another "
            "version of p2pmesh: restart it"
        ) from exc


def screen(answer: Mapping[str, Any], width: int = 0) -> str:
    """The plan as text, or the part of it that was asked for.

    Args:
        answer: As the node gives it, see `node/plan_report.py`.
        width: Characters in a line; 0 cuts nothing.
    """
    if answer["explained"] is not None or answer["what_if"] is not None:
        blocks = [
            *([_explained(answer["explained"], width)] if answer["explained"] else []),
            *([_what_if(answer["what_if"], width)] if answer["what_if"] else []),
        ]
        return "\n\n".join(blocks)
    nodes = sorted(answer["nodes"], key=_by_name)
    parts = [_head(answer["plan"], nodes), "", _models(answer["models"], width)]
    parts += ["", table(_NODES, [_node(one) for one in nodes], width=width)] if nodes else []
    return "\n".join([*parts, *_footnotes(nodes)])


def _by_name(node: Mapping[str, Any]) -> tuple[bool, str]:
    """This node first."""
    return not node["self"], node["name"]


def _head(plan: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]]) -> str:
    if not plan["asked_nodes"]:
        agreed = "no other node is linked"
    elif plan["agreed"]:
        agreed = f"all of {formatting.count(plan['asked_nodes'], 'linked node')} agree"
    else:
        agreed = (
            f"{plan['same_nodes']} of {formatting.count(plan['asked_nodes'], 'linked node')} agree"
        )
    digest = click.style(formatting.line(plan["digest"]), bold=True)
    return f"Plan {digest} for {formatting.count(len(nodes), 'node')}: {agreed}"


def _models(models: Sequence[Mapping[str, Any]], width: int) -> str:
    if not models:
        return "Nobody wants a model yet: p2pmesh up --model FILE.gguf"
    rows = [
        (one["id"], _layout(one), _predicted(one), _measured(one), one["sentence"])
        for one in models
    ]
    return table(_MODELS, rows, width=width)


def _layout(model: Mapping[str, Any]) -> str:
    """Say where a model is: whole on some nodes, or in stages of a pipeline."""
    match model["layout"]:
        case "whole":
            return f"whole on {', '.join(part['name'] for part in model['parts'])}"
        case "pipeline":
            stages = (
                f"{_layers(part)} on {part['name']} ({formatting.size(part['need_bytes'])})"
                for part in model["parts"]
            )
            return f"pipeline: {', '.join(stages)}"
        case "experts":
            shards = (
                f"{formatting.experts(part['experts'])} on {part['name']}"
                f" ({formatting.size(part['need_bytes'])})"
                for part in model["parts"]
            )
            return f"shards: {', '.join(shards)}"
        case _:
            return "-"


def _layers(part: Mapping[str, Any]) -> str:
    first, last = part["first_layer"] + 1, part["last_layer"] + 1
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def _predicted(model: Mapping[str, Any]) -> str:
    most, least = model["predicted_tokens_per_s"], model["predicted_tokens_per_s_min"]
    if most is None:
        return "-"
    return f"about {_rate(most)}" if most == least else f"about {_rate(least)} to {_rate(most)}"


def _measured(model: Mapping[str, Any]) -> str:
    """Return the speed of the engines, of the slowest and the fastest copy."""
    seen = [one["measured_tokens_per_s"] for one in model["parts"]]
    rates = {_rate(one): None for one in sorted(one for one in seen if one is not None)}
    return " to ".join(list(rates)[:: max(len(rates) - 1, 1)]) or "-"


def _rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:.0f}" if tokens_per_s >= 10 else f"{tokens_per_s:g}"


def _node(node: Mapping[str, Any]) -> tuple[str, ...]:
    parts = (f"{one['model']} ({_part(one)})" for one in node["parts"])
    return (
        f"{node['name']}{' (this)' if node['self'] else ''}",
        f"{formatting.size(node['used_bytes'])} of {formatting.size(node['budget_bytes'])}",
        _reads(node),
        ", ".join(parts) or "-",
    )


def _part(part: Mapping[str, Any]) -> str:
    size = formatting.size(part["need_bytes"])
    if part["experts"] is not None:
        return f"{formatting.experts(part['experts'])}, {size}"
    return size if part["part"] == "whole" else f"{_layers(part)}, {size}"


def _reads(node: Mapping[str, Any]) -> str:
    speed = node["memory_mib_per_s"]
    return f"{formatting.size(speed * MIB)}/s" if speed else "unknown"


def _footnotes(nodes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield ""
    yield "TOK/S is predicted, an upper estimate; MEASURED is that of the engines' latest answers."
    if any(not node["memory_mib_per_s"] for node in nodes):
        speed = formatting.size(MEMORY_MIB_PER_S * MIB)
        yield f"A node whose memory speed is unknown counts as reading {speed}/s."


# --- one model ----------------------------------------------------------------------------------


def _explained(model: Mapping[str, Any], width: int) -> str:
    facts = [
        ("Layout", _layout(model)),
        ("Why", model["sentence"]),
        ("Needs", formatting.size(model["need_bytes"])),
        ("A token", _cost(model)),
        ("Measured", _seen(model)),
        *(("Helps", _help(one, model)) for one in model["helps"]),
        *_alternatives(model["alternatives"]),
    ]
    name = click.style(formatting.line(model["id"]), bold=True)
    lines = [f"{name}  sha256 {formatting.line(model['digest'])}"]
    lines += [f"  {term:<8}  {formatting.line(text)}" for term, text in facts]
    rows = [_candidate(one) for one in model["candidates"]]
    return "\n".join([*lines, "", table(_CANDIDATES, rows, width=width)])


def _alternatives(others: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    """How else a model of experts could be served."""
    if others is None:
        return
    yield "Shards", others["experts"]
    yield "Layers", others["layers"]
    fits = others["fits"]
    if others["smaller"]:
        yield "Smaller", f"in this mesh: {', '.join(others['smaller'])}"
    elif fits is None:
        yield "Smaller", "no usual quantisation would fit whole on a node that has the file"
    else:
        said = (
            f"{fits['quantisation']} would fit whole on {fits['name']}, where there is room for a"
            f" file of {formatting.size(fits['size_bytes'])}: get that; at equal bytes it was"
            " better than shards in everything measured so far"
        )
        yield "Smaller", said


def _cost(model: Mapping[str, Any]) -> str:
    """Say what a token costs: all of it, then its parts."""
    if not model["token_us"]:
        return "unknown: the model does not tell its layers" if model["parts"] else "-"
    if model["layout"] != "pipeline":
        reads = (
            f"{_ms(part['read_us'])} to read all layers on {part['name']}"
            for part in model["parts"]
        )
        return f"{', or '.join(reads)}{_speed(model)}"
    reads = (
        f"{_ms(part['read_us'])} to read {_layers(part)} on {part['name']}"
        for part in model["parts"]
    )
    on_wire = f"{_ms(model['link_us'])} between the nodes"
    return f"{_ms(model['token_us'])}: {', '.join(reads)}, {on_wire}{_speed(model)}"


def _speed(model: Mapping[str, Any]) -> str:
    predicted = _predicted(model)
    return "" if predicted == "-" else f"; {predicted} tok/s"


def _seen(model: Mapping[str, Any]) -> str:
    measured = _measured(model)
    if measured == "-":
        return "nothing yet; nodes tell it within a minute of longer answers"
    return f"{measured} tok/s over the latest answers"


def _ms(microseconds: int) -> str:
    if microseconds < US_PER_MS // 10:  # of a tiny model, or of one layer
        return f"{microseconds} µs"
    return formatting.milliseconds(microseconds / US_PER_MS)


def _candidate(one: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        one["name"],
        "yes" if one["holds"] else "no",
        formatting.size(one["need_bytes"]),
        formatting.size(one["free_bytes"]),
        "runs it" if one["runs"] else ", ".join(_lack(lack, one) for lack in one["lacks"]) or "-",
    )


def _lack(lack: str, one: Mapping[str, Any]) -> str:
    match lack:
        case "memory":
            return formatting.size(one["missing_bytes"])
        case "file":
            return "the file"
        case "engine":
            return "an engine with the same RPC"
        case "right":
            return "the right stage, to be the head"
        case "load":
            return "a load that does not fail"
        case _:
            return lack


def _help(one: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """Say what a person can do about the one thing that a node lacks."""
    name = one["name"]
    match one["lack"]:
        case "memory":
            missing = formatting.size(one["missing_bytes"])
            return f"{missing} more on {name}: a larger --memory there, or fewer other models"
        case "file":
            return f"the file of {model['id']} on {name}, which has {_free(one)} free"
        case "engine":
            return f"p2pmesh engine install on {name}, which has {_free(one)} free"
        case "right":
            return f"p2pmesh grant {name} stage"
        case "load":
            return f"p2pmesh status says why it fails on {name}"
        case _:
            return f"{one['lack']} on {name}"


def _free(one: Mapping[str, Any]) -> str:
    return formatting.size(one["free_bytes"])


# --- other nodes --------------------------------------------------------------------------------


def _what_if(what_if: Mapping[str, Any], width: int) -> str:
    lines = [f"The plan {formatting.line(' and '.join(what_if['changes']))}; nothing was changed:"]
    if what_if["models"]:
        rows = [_difference(one) for one in what_if["models"]]
        lines += ["", table(_CHANGES, rows, width=width)]
    else:
        lines.append("Every model is served as it is now.")
    nodes = [_node_difference(one) for one in sorted(what_if["nodes"], key=_by_name)]
    lines += ["", table(_NODE_CHANGES, nodes, width=width)] if nodes else ["No node is left."]
    if any(one["imagined"] for one in what_if["nodes"]):
        lines += ["", "An imagined node has every model's file and the engine of most others."]
    return "\n".join(lines)


def _difference(one: Mapping[str, Any]) -> tuple[str, ...]:
    before, after = one["before"], one["after"]
    speeds = [_predicted(side) if side else "-" for side in (before, after)]
    return (
        one["id"],
        _layout(before) if before else "-",
        _layout(after) if after else "-",
        speeds[1] if speeds[0] == speeds[1] else f"{speeds[0]}, then {speeds[1]}",
        after["sentence"] if after else "no live node holds the file",
    )


def _node_difference(node: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        node["name"],
        formatting.size(node["used_bytes_before"]),
        formatting.size(node["used_bytes"]),
        formatting.size(node["budget_bytes"]),
    )
