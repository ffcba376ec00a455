"""The bodies of simulated nodes: enough for plans in which nodes and wants compete."""

from __future__ import annotations

from collections.abc import Iterator

from p2pmesh.gossip.events import Publish
from p2pmesh.models.cards import Card, ModelDigest
from p2pmesh.state.registers import (
    Caps,
    HeldModel,
    ModelRequest,
    Served,
    held_pages,
    held_register,
    serves_to_wire,
    wants_to_wire,
)
from p2pmesh.wire.registers import CAPS, SERVING, WANTS

GIB = 1 << 30
MODELS = 4  # different ones in the whole mesh


def model(number: int) -> ModelDigest:
    """One of the models of the mesh."""
    return ModelDigest(f"{number:064x}")


def caps(budget_gib: int) -> Publish:
    """Return the `caps` body of a node with so much memory to give."""
    body = Caps(budget_bytes=budget_gib * GIB, engine="simulated", rpc="").to_wire()
    return Publish(register=CAPS, body=body)


def bodies_of(number: int, *, terse: bool) -> Iterator[tuple[str, dict[str, object]]]:
    """Return the bodies of a node that starts, by register.

    Args:
        number: Which node.
        terse: It has nothing to say of models.
    """
    yield CAPS, caps(4 + number % 5).body or {}
    if terse:
        return
    held = [
        HeldModel(digest=model(one), stem=f"model-{one}", card=card(one))
        for one in range(MODELS)
        if (number + one) % 3 == 0
    ]
    for page, body in enumerate(held_pages(held)):
        yield held_register(page), body
    wanted = ModelRequest(
        digest=model(number % MODELS),
        stem=f"model-{number % MODELS}",
        replicas=1 + number % 3,
        priority=number % 2,
        context=0,
        slots=4,
    )
    yield WANTS, wants_to_wire([wanted])
    if held and number % 2:
        yield SERVING, serves_to_wire([Served(digest=held[0].digest, state="ready")])


def card(number: int) -> Card:
    """A card of one of the models; the larger its number the larger it is."""
    size = (1 + number) * GIB
    return Card(
        architecture="llama",
        name=f"Model {number}",
        layers=2,
        layer_bytes=(size // 2, size // 2),
        other_bytes=0,
        size_bytes=size,
        kv_bytes_per_token=1024,
        experts=0,
        experts_used=0,
        context=4096,
        width=64,
        vocabulary=300,
        takes=frozenset({"text"}),
        gives=frozenset({"chat"}),
        chat_template=True,
        parameters=size,
        quantisation="Q8_0",
    )
