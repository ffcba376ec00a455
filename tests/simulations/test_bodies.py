from __future__ import annotations

from p2pmesh.state.registers import Caps, held_from_wire, wants_from_wire
from p2pmesh.wire.registers import CAPS, WANTS
from simulations.bodies import GIB, bodies_of, caps


def test_nodes_say_what_they_can_give_and_what_they_want() -> None:
    said = dict(bodies_of(3, terse=False))
    assert Caps.from_wire(said[CAPS]).budget_bytes == 7 * GIB
    assert len(wants_from_wire(said[WANTS])) == 1
    held = [
        one
        for name, body in said.items()
        if name.startswith("models/") and name != "serving"
        for one in held_from_wire(body)
    ]
    assert len(held) == 2
    assert said != dict(bodies_of(4, terse=False))


def test_terse_nodes_say_nothing_of_models() -> None:
    assert [name for name, _ in bodies_of(3, terse=True)] == [CAPS]
    assert caps(2).body == Caps(budget_bytes=2 * GIB, engine="simulated", rpc="").to_wire()
