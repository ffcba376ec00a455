"""The reasons of a plan as people read them. Pure."""

from __future__ import annotations

from collections.abc import Callable

from p2pmesh.identity.keys import NodeId, show_id
from p2pmesh.models.parts import ShardKind, ShardQuality
from p2pmesh.placement.assignment import Assignment, Reason, ShardRefusal
from p2pmesh.placement.layout import Experts, Pipeline
from p2pmesh.placement.pipeline import Stage
from p2pmesh.sharing import MILLION

MIB = 2**20
GIB = 2**30


def explain(assignment: Assignment, name_of: Callable[[NodeId], str] = show_id) -> str:
    """The reason for an assignment as a person reads it.

    Args:
        assignment: Any assignment of a plan.
        name_of: What a node is called.
    """
    a = assignment
    node = "" if a.roomiest is None else name_of(a.roomiest)
    need = _show_bytes(a.need_bytes, up=True)
    offer = _show_bytes(a.room_bytes)
    short = f"only {len(a.nodes)} of {a.copies} copies"
    have = "1 node holds" if a.holders == 1 else f"{a.holders} nodes hold"
    match a.reason:
        case Reason.PLACED if isinstance(a.layout, Pipeline):
            shares = ", ".join(
                f"{_show_layers(one)} on {name_of(one.node)}" for one in a.layout.stages
            )
            why = "" if a.split else "it fits on no node: "
            nor = _nor_sharded(a.shard_refusal)
            return f"{why}split over {len(a.nodes)} nodes: layers {shares}{nor}"
        case Reason.PLACED if isinstance(a.layout, Experts):
            return f"it fits on no node: {_show_shards(a.layout, name_of)}"
        case Reason.SMALLER:
            return (
                f"needs {need}, which is free on no node that holds it: a smaller quantisation of"
                " the same model answers for it, better than shards of that size in everything"
                " measured so far"
            )
        case Reason.PLACED:
            return f"{len(a.nodes)} of {a.copies} {'copy' if a.copies == 1 else 'copies'}"
        case Reason.UNWANTED:
            return "nobody wants it"
        case Reason.STANDBY:
            return "served only while no other model that is wanted has a place"
        case Reason.NO_HOLDER:
            return "no live node holds the file"
        case Reason.TOO_LARGE:
            return (
                f"needs {need}, the largest budget of a node that holds it is {offer} on {node}:"
                " it takes more memory, a smaller quantisation or a shorter context"
                f"{_nor_split(a, name_of)}{_nor_sharded(a.shard_refusal)}"
            )
        case Reason.NO_ROOM:
            return (
                f"needs {need}, the largest free budget of a node that holds it is {offer} on"
                f" {node}: the rest is taken by models that run there or have a higher priority"
                f"{_nor_split(a, name_of)}{_nor_sharded(a.shard_refusal)}"
            )
        case Reason.FEW_HOLDERS:
            return f"{short}: {have} the file"
        case Reason.LITTLE_ROOM:
            return f"{short}: {have} the file, but {node} has {offer} free and a copy needs {need}"
        case _:
            why = _why_not_split(
                a.reason, node, f"{node} would need {need} for its stage, has {offer}"
            )
            kept = ", ".join(name_of(one) for one in a.nodes)
            stays = f"; it stays whole on {kept}" if kept else ""
            return f"not split over {a.split} nodes: {why}{stays}"


def explain_shards(assignment: Assignment, name_of: Callable[[NodeId], str] = show_id) -> str:
    """How a model of experts is served in shards, or why it is not."""
    if isinstance(assignment.layout, Experts):
        return _show_shards(assignment.layout, name_of)
    return _nor_sharded(assignment.shard_refusal).removeprefix("; ") or "it is whole"


def explain_layers(assignment: Assignment, name_of: Callable[[NodeId], str] = show_id) -> str:
    """How a model is served as a pipeline, or why it is not."""
    if isinstance(assignment.layout, Pipeline):
        return explain(assignment, name_of)
    return _nor_split(assignment, name_of).removeprefix("; ") or "it is whole"


def _nor_split(assignment: Assignment, name_of: Callable[[NodeId], str]) -> str:
    """Say why a model that fits on no node is not split either."""
    refusal = assignment.refusal
    if refusal is None:
        return ""
    node = "" if refusal.node is None else name_of(refusal.node)
    need, offer = _show_bytes(refusal.need_bytes, up=True), _show_bytes(refusal.room_bytes)
    lack = f"its layers need {need}, all nodes that could share it have {offer} for them"
    return f"; not split over several nodes either: {_why_not_split(refusal.reason, node, lack)}"


def _show_shards(layout: Experts, name_of: Callable[[NodeId], str]) -> str:
    """Say who holds which share of the experts, and how good that is."""
    shares = [f"{one.shard.size} on {name_of(one.node)}" for one in layout.shards]
    places = layout.quality.places
    if layout.quality.kind is ShardKind.THIN:
        what = f"thin shards, of {places} parts of each expert {', '.join(shares)}"
    else:
        what = f"expert shards, of {places} experts of a layer {', '.join(shares)}"
    return f"{what}; {quality(layout.quality)}"


def quality(known: ShardQuality) -> str:
    """How good shards are, as a person reads it."""
    if known.is_measured:
        return f"measured divergence {_millionths(known.divergence)}"
    return f"unmeasured, predicted to cover {known.coverage * 100 // MILLION} % of the importance"


def _nor_sharded(refusal: ShardRefusal | None) -> str:
    """Say why a model of experts is not in shards."""
    if refusal is None:
        return ""
    best, most = refusal.best, _millionths(refusal.divergence_max)
    if refusal.is_possible:
        return "; expert shards would be good enough: `--moe experts` asks for them in its place"
    if best is None:
        why = "nothing is known of their quality: `p2pmesh experts rank` and `measure` change that"
    elif refusal.is_hearsay:
        why = (
            "only one node says how good they are, and no other has got its ranking of the experts"
        )
    elif refusal.need_bytes:
        need, offer = _show_bytes(refusal.need_bytes, up=True), _show_bytes(refusal.room_bytes)
        why = (
            f"each takes {need} and more, {refusal.hosts} nodes with the file have room for one,"
            f" the largest room is {offer}"
        )
    elif not best.is_measured:
        why = f"{quality(best)}: `p2pmesh experts measure` may change that"
    elif best.divergence <= refusal.divergence_max:
        covers = best.coverage * 100 // MILLION
        why = f"what is said of them cannot be true, as they cover {covers} % of the importance"
    else:
        why = (
            f"{_millionths(best.divergence)} is their least measured divergence, more than the"
            f" {most} of `--moe-quality`"
        )
    return f"; not in expert shards: {why}"


def _millionths(number: int) -> str:
    """A number of millionths with three decimals."""
    return f"{number // MILLION}.{number % MILLION // 1000:03}"


def _why_not_split(reason: Reason, node: str, lack: str) -> str:
    """Say what is in the way of a pipeline, and the command that helps."""
    match reason:
        case Reason.FEW_LAYERS:
            return "it has too few layers"
        case Reason.NO_RIGHT:
            return (
                f"{node} holds the file and may run stages only on nodes that confine them, which"
                f" are too few: an admin can change that by `p2pmesh grant {node} stage`"
            )
        case Reason.NO_ENGINES if node:
            return (
                "too few nodes, one that holds the file among them, have engines with the same"
                f" RPC: `p2pmesh engine install` on {node} helps"
            )
        case Reason.NO_ENGINES:
            return "too few nodes are here: `p2pmesh invite` lets more in"
        case _:
            return lack


def _show_layers(stage: Stage) -> str:
    first, last = stage.first_layer + 1, stage.last_layer + 1
    return str(first) if first == last else f"{first} to {last}"


def _show_bytes(size_bytes: int, *, up: bool = False) -> str:
    """Bytes as GiB, or MiB below one, with one decimal; cut off, or rounded up where asked."""
    unit, name = (GIB, "GiB") if size_bytes >= GIB else (MIB, "MiB")
    tenths = (size_bytes * 10 + (unit - 1 if up else 0)) // unit
    return f"{tenths // 10}.{tenths % 10} {name}"
