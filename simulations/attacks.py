"""Hostile members: nodes that hold a key of the mesh and send what no core would.

They run the real core as well, so that they are linked like everybody else, and put messages of
their own on those links. Nothing that they say may stand in an honest node's document but what
their own keys signed, within the bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from p2pmesh.gossip.events import Publish
from p2pmesh.wire.evidence import ACCUSED_MAX, Accusation, accused_to_wire
from p2pmesh.wire.messages import Push
from p2pmesh.wire.records import seal
from p2pmesh.wire.registers import ACCUSED, CAPS, MEMBER
from simulations.bodies import caps
from simulations.faults import Stage
from simulations.forgeries import FORGERIES, sealed
from simulations.hosts import Payload
from simulations.machine import START_S
from simulations.node import Node
from simulations.world import MESH

HOUR_S = 3600


def hostile_nodes(stage: Stage) -> list[Node]:
    """The hostile nodes that run."""
    return [node for node in stage.world.nodes if node.hostile and node.core is not None]


def say(stage: Stage, node: Node, payload: Payload, *, links: int | None = None) -> None:
    """Send a message on all links of a hostile node, or on so many of them."""
    peers = sorted(node.links.ends)
    if links is not None:
        peers = stage.rng.sample(peers, min(links, len(peers)))
    for peer in peers:
        node.links.send(peer, payload)


def replay(stage: Stage, *, count: int = 20, oldest: bool = True) -> None:
    """Say again what was said before, the oldest first or anything."""
    archive = stage.world.archive
    for node in hostile_nodes(stage):
        some = archive[:count] if oldest else stage.rng.sample(archive, min(count, len(archive)))
        if some:
            say(stage, node, Push(records=tuple(some)))


def replay_expired(stage: Stage, *, hours: int = 2) -> None:
    """Say again what honest nodes signed hours before the run, in earlier lives of theirs."""
    at = START_S - hours * HOUR_S
    for node in hostile_nodes(stage):
        victim = stage.rng.choice(stage.world.honest)
        past = [
            seal(
                victim.key,
                mesh=MESH,
                register=register,
                epoch=at,
                seq=seq,
                instance=1,
                issued_at=at,
                ttl_s=240,
                body=body,
            )
            for seq, (register, body) in enumerate(victim.bodies.items(), 1)
        ]
        say(stage, node, Push(records=tuple(record.raw for record in past)))


def forge(stage: Stage, *, count: int = 1, kind: str = "any") -> None:
    """Send records that must not be believed; see `FORGERIES`."""
    for node in hostile_nodes(stage):
        for _ in range(count):
            name = stage.rng.choice(sorted(FORGERIES)) if kind == "any" else kind
            say(stage, node, FORGERIES[name](stage, node))


def equivocate(stage: Stage) -> None:
    """Sign two records of the same version and tell some nodes one and some the other."""
    for node in hostile_nodes(stage):
        assert node.core is not None
        mine = node.core.document.get(node.id, CAPS)
        if mine is None:
            continue
        stage.world.forked[node.id] = stage.world.schedule.now
        for budget_gib in (1, 2):
            record = sealed(
                stage,
                node,
                register=CAPS,
                seq=mine.seq + 1,
                epoch=mine.epoch,
                body=caps(budget_gib).body,
            )
            stage.world.signed.add(record.raw)
            say(stage, node, Push(records=(record.raw,)), links=(len(node.links.ends) + 1) // 2)


def exceed_quota(stage: Stage, *, count: int = 40, size_bytes: int = 12_000) -> None:
    """Sign more, and longer, than one owner may have."""
    for node in hostile_nodes(stage):
        assert node.core is not None
        mine = node.core.document.get(node.id, CAPS)
        epoch = mine.epoch if mine else int(node.clock())
        for page in range(count):
            record = sealed(
                stage, node, register=f"x/{page}", epoch=epoch, body={"x": "y" * size_bytes}
            )
            stage.world.signed.add(record.raw)
            say(stage, node, Push(records=(record.raw,)))


# --- lying observers ------------------------------------------------------------------------------


def accuse(stage: Stage, *, everybody: bool = False) -> None:
    """Accuse living nodes: all hostile ones the same one, or each of them everybody.

    Best one that cannot say at this moment that it lives.
    """
    honest = [node for node in stage.world.honest if not node.awake] or stage.world.honest
    if not honest:
        return
    victims = stage.world.honest if everybody else [stage.rng.choice(honest)]
    for node in hostile_nodes(stage):
        rows = [row for victim in victims if (row := _row(node, victim)) is not None]
        node.tell(Publish(register=ACCUSED, body=accused_to_wire(rows[:ACCUSED_MAX])))


def _row(node: Node, victim: Node) -> Accusation | None:
    assert node.core is not None
    member = node.core.document.get(victim.id, MEMBER)
    return Accusation(victim.id, member.epoch, member.seq) if member is not None else None


ATTACKS: Mapping[str, Callable[..., None]] = {
    attack.__name__: attack
    for attack in (replay, replay_expired, forge, equivocate, exceed_quota, accuse)
}
