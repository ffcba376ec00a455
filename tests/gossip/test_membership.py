from __future__ import annotations

from p2pmesh.config import Address
from p2pmesh.gossip.events import Health, LinkUp, Received
from p2pmesh.gossip.membership import Gossip
from p2pmesh.gossip.shared import Shared
from p2pmesh.wire.messages import Push
from p2pmesh.wire.records import Record, RecordCheck
from p2pmesh.wire.registers import CAPS
from tests.gossip.builders import THERE, fork_of
from tests.gossip.net import Net, address
from tests.state.builders import KEYS, MESH, NODES, NOW, record

SETTLED_S = 8.0


def gossip(*, seeds: tuple[Address, ...] = (), shared: Shared | None = None) -> Gossip:
    return Gossip(key=KEYS[0], mesh=MESH, instance=1, epoch=NOW, seeds=seeds, shared=shared)


def test_alone_a_node_is_up_to_date_and_writes_at_once() -> None:
    core = gossip()
    core.start(NOW)
    assert core.joined
    assert not core.rejoining
    assert not core.isolated
    assert core.removed == core.linked == frozenset()


def test_with_somebody_to_learn_from_it_waits() -> None:
    core = gossip(seeds=(address(1),))
    core.start(NOW)
    assert not core.joined
    assert core.rejoining


def test_what_others_read() -> None:
    net = Net(3)
    net.run(SETTLED_S)
    core = net.cores[0]
    assert core.me == NODES[0]
    assert core.linked == {NODES[1], NODES[2]}
    assert core.book == {NODES[1]: (address(1),), NODES[2]: (address(2),)}
    assert core.health(NODES[1]) is core.health(core.me) is Health.LIVE
    assert core.health(NODES[7]) is Health.SUSPECT
    assert core.rtt_s(NODES[7]) is None
    assert {net.cores[n].rtt_s(NODES[m]) is None for n in range(3) for m in range(3)} == {
        True,
        False,
    }
    assert abs(core.mesh_now(net.now) - net.now) < 1
    assert core.out_of_placement(net.now) == frozenset()


def test_plans_travel_with_signs_of_life() -> None:
    net = Net(2)
    net.cores[0].plan, net.cores[1].plan = b"a" * 16, b"b" * 16
    net.run(SETTLED_S)
    assert net.cores[0].plans == {NODES[1]: b"b" * 16}
    assert net.cores[1].plans == {NODES[0]: b"a" * 16}
    net.kill(1)
    net.run(1)
    assert net.cores[0].plans == {}


def test_the_book_outlives_leases_and_serves_the_next_start() -> None:
    net = Net(2)
    net.run(SETTLED_S)
    net.kill(1)
    net.run(1000)
    assert net.cores[0].book == {NODES[1]: (address(1),)}
    net.kill(0)
    net.start(1)
    net.start(0, seeds=(), book={NODES[1]: (address(1),), NODES[5]: (THERE,)})
    net.run(SETTLED_S)
    assert net.cores[0].linked == {NODES[1]}
    assert net.agree()


def test_who_is_held_for_a_fork_comes_back_after_a_while() -> None:
    core = gossip()
    core.start(NOW)
    core.handle(LinkUp(node=NODES[1], version=1), NOW)
    fork = fork_of(2)
    core.handle(Received(node=NODES[1], message=Push(forks=(fork.raw,))), NOW)
    assert core.out_of_placement(NOW + 29) == {NODES[2]}
    assert core.out_of_placement(NOW + 31) == frozenset()
    assert core.removed == frozenset()


def test_records_are_checked_as_the_core_was_told_to() -> None:
    seen: list[Record] = []

    def believe(one: Record) -> bool:
        seen.append(one)
        return True

    core = gossip(shared=Shared(check=RecordCheck(verify=believe)))
    core.start(NOW)
    core.handle(LinkUp(node=NODES[1], version=1), NOW)
    told = record(2, CAPS, epoch=NOW)
    forged = b"\0" * 64 + told.raw[64:]
    for _ in range(2):
        core.handle(Received(node=NODES[1], message=Push(records=(forged,))), NOW)
    assert [one.digest for one in seen] == [told.digest]
