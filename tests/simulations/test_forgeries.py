from __future__ import annotations

import pytest

from p2pmesh.errors import PeerError
from p2pmesh.wire.messages import Push, decode_message
from simulations.forgeries import FORGERIES, sealed
from simulations.node import Node
from tests.simulations.meshes import staged


@pytest.mark.parametrize("name", sorted(FORGERIES))
def test_no_forgery_changes_what_anybody_holds(name: str) -> None:
    stage = staged(hostile=1)
    liar = stage.world.nodes[3]
    before = {node.number: _owned(node) for node in stage.world.honest}
    for _ in range(3):
        forged = FORGERIES[name](stage, liar)
        for peer in sorted(liar.links.ends):
            liar.links.send(peer, forged)
        stage.world.run(2)
    assert {node.number: _owned(node) for node in stage.world.honest} == before


@pytest.mark.parametrize("name", ["junk", "cut_short", "deep"])
def test_what_does_not_decode_is_no_message(name: str) -> None:
    stage = staged(hostile=1)
    said = FORGERIES[name](stage, stage.world.nodes[3])
    assert isinstance(said, bytes)
    with pytest.raises(PeerError):
        decode_message(said)


@pytest.mark.parametrize("name", ["altered", "unsigned", "stranger"])
def test_forged_records_have_bad_signatures_or_keys(name: str) -> None:
    stage = staged(hostile=1)
    check = stage.world.memory.shared.check
    said = FORGERIES[name](stage, stage.world.nodes[3])
    assert isinstance(said, Push)
    for raw in said.records:
        try:
            assert not check.verify(check.parse(raw))
        except PeerError:
            assert name == "stranger"


def test_what_a_hostile_node_signs_itself_is_signed() -> None:
    stage = staged(hostile=1)
    check = stage.world.memory.shared.check
    assert check.verify(sealed(stage, stage.world.nodes[3]))


def _owned(node: Node) -> list[tuple[bytes, str, int]]:
    """What a node holds, whatever version: leases are renewed meanwhile."""
    assert node.core is not None
    return [(one.owner, one.register, one.epoch) for one in node.core.document.records()]
