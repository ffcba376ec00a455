from __future__ import annotations

from p2pmesh.gossip.events import Received
from p2pmesh.wire.messages import Push
from p2pmesh.wire.registers import ACCUSED
from simulations.attacks import (
    ATTACKS,
    HOUR_S,
    accuse,
    equivocate,
    exceed_quota,
    replay,
    replay_expired,
)
from simulations.faults import Stage
from simulations.machine import START_S
from tests.simulations.meshes import Steps, staged


def heard(stage: Stage) -> list[bytes]:
    """What the honest nodes are sent by the hostile one, in a moment."""
    steps = Steps()
    stage.world.watchers.append(steps)
    (liar,) = (node for node in stage.world.nodes if node.hostile)
    stage.world.run(0.3)
    stage.world.watchers.remove(steps)
    return [
        raw
        for step in steps.seen
        if isinstance(step.event, Received) and step.event.node == liar.id
        if isinstance(step.event.message, Push) and not step.event.message.asked
        for raw in step.event.message.records
    ]


def test_every_attack_has_its_name() -> None:
    assert set(ATTACKS) == {
        "replay",
        "replay_expired",
        "forge",
        "equivocate",
        "exceed_quota",
        "accuse",
    }


def test_what_was_said_is_said_again() -> None:
    stage = staged(hostile=1)
    oldest = stage.world.archive[:3]
    replay(stage, count=3)
    assert set(heard(stage)) >= set(oldest)


def test_what_was_said_hours_ago_is_said_again_with_a_good_signature() -> None:
    stage = staged(hostile=1)
    replay_expired(stage, hours=3)
    check = stage.world.memory.shared.check
    old = [check.parse(raw) for raw in heard(stage)]
    old = [record for record in old if record.issued_at == START_S - 3 * HOUR_S]
    assert old
    assert all(check.verify(record) for record in old)
    assert all(record.owner != stage.world.nodes[3].id for record in old)


def test_two_values_are_told_and_the_world_knows() -> None:
    stage = staged(hostile=1)
    equivocate(stage)
    assert set(stage.world.forked) == {stage.world.nodes[3].id}
    assert len(stage.world.signed) == 2
    stage.world.run(5)
    for node in stage.world.honest:
        assert node.core is not None
        assert node.core.document.forks(stage.world.nodes[3].id)


def test_an_excess_is_signed_in_many_pages() -> None:
    stage = staged(hostile=1)
    exceed_quota(stage, count=5, size_bytes=100)
    assert stage.world.signed <= set(heard(stage))
    assert len(stage.world.signed) == 5


def test_liars_accuse_those_who_cannot_answer_or_everybody() -> None:
    stage = staged(hostile=1)
    liar, victim = stage.world.nodes[3], stage.world.nodes[1]
    assert liar.core is not None
    victim.freeze()
    accuse(stage)
    record = liar.core.document.get(liar.id, ACCUSED)
    assert record is not None
    assert [row[0] for row in record.body["s"]] == [victim.id]
    accuse(stage, everybody=True)
    record = liar.core.document.get(liar.id, ACCUSED)
    assert record is not None
    assert {row[0] for row in record.body["s"]} == {node.id for node in stage.world.nodes[:3]}
