from __future__ import annotations

import gc
from types import FunctionType, ModuleType

import pytest

from p2pmesh.gossip.buckets import Buckets
from p2pmesh.gossip.events import (
    Disconnect,
    Health,
    HealthChanged,
    LinkDown,
    LinkUp,
    Out,
    Publish,
    Received,
    Send,
    StateChanged,
)
from p2pmesh.gossip.membership import Gossip
from p2pmesh.gossip.probe import MUTE_S
from p2pmesh.gossip.removal import REFUTED_BURST
from p2pmesh.identity.keys import NodeId
from p2pmesh.wire.evidence import Accusation, accused_to_wire
from p2pmesh.wire.messages import ProbeReport, ProbeRequest, Push
from p2pmesh.wire.records import Record
from p2pmesh.wire.registers import ACCUSED, CAPS, MEMBER, WANTS
from tests.gossip.builders import facts, fork_of
from tests.gossip.net import LATENCY_S, SETTLED_S, settled
from tests.state.builders import KEYS, MESH, NODES, NOW, record

VALUE = {"value": 1}


def accuses(accuser: int, *members: Record, seq: int, at: float) -> Record:
    """An accusation of these `member` records, in the accuser's present life."""
    rows = [Accusation(one.owner, one.epoch, one.seq) for one in members]
    body = accused_to_wire(rows) if rows else {}
    return record(accuser, ACCUSED, epoch=NOW, seq=seq, body=body, issued_at=int(at))


def health_changes(outs: list[Out]) -> list[tuple[NodeId, Health]]:
    return [(out.node, out.health) for out in outs if isinstance(out, HealthChanged)]


def keeps(root: object, node: NodeId) -> bool:
    """Whether the id of `node` is anywhere below `root`, but for rates, whose number is bounded."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        one = waiting.pop()
        if one == node:
            return True
        if id(one) not in seen and not isinstance(one, type | ModuleType | FunctionType | Buckets):
            seen.add(id(one))
            waiting += gc.get_referents(one)
    return False


def test_nothing_is_kept_of_strangers_that_came_and_went() -> None:
    net, stranger = settled(3), NodeId(bytes(range(16)))
    core = net.cores[0]
    core.handle(LinkUp(node=stranger, version=2), net.now)
    core.handle(Received(node=stranger, message=Push(asked=True)), net.now)
    assert keeps(core, stranger)
    core.handle(LinkDown(node=stranger), net.now)
    assert not keeps(core, stranger)


# Coming together


def test_nodes_that_know_one_address_find_each_other() -> None:
    net = settled(4)
    for core in net.cores.values():
        assert len(core.linked) == 3
        assert len(core.document.owners) == 4
        assert core.joined
        assert not core.rejoining


def test_an_update_reaches_everybody_in_one_hop() -> None:
    net = settled(4)
    net.tell(2, Publish(register=CAPS, body=VALUE))
    net.run(1.1 * LATENCY_S)
    assert net.agree()
    for core in net.cores.values():
        assert core.document.get(NODES[2], CAPS) is not None


def test_an_update_is_passed_on_but_not_back() -> None:
    net = settled(3)
    outs = net.tell(0, Received(node=NODES[1], message=facts(record(1, CAPS, epoch=NOW))))
    sent = [out for out in outs if isinstance(out, Send)]
    assert [out.node for out in sent] == [NODES[2]]
    assert any(isinstance(out, StateChanged) for out in outs)


def test_what_was_lost_on_the_way_is_repaired() -> None:
    net = settled(2)
    lost = record(7, WANTS, epoch=NOW, issued_at=int(net.now))
    assert net.cores[0].document.merge(lost, net.now)
    assert not net.agree()
    net.run(10)
    assert net.agree()


def test_the_halves_of_a_mesh_find_each_other_again_after_any_time() -> None:
    net = settled(4)
    net.part({0, 1}, {2, 3})
    net.run(600)
    assert NODES[2] not in net.cores[0].document
    net.tell(3, Publish(register=CAPS, body=VALUE))
    net.part()
    net.run(10.5)
    assert net.agree()
    assert all(len(core.linked) == 3 for core in net.cores.values())


# Failing


def test_a_killed_node_is_removed_by_all_and_soon() -> None:
    net = settled(4)
    net.kill(3)
    net.run(4)
    assert all(net.removed(by) == {3} for by in range(3))
    assert net.agree()
    assert net.cores[0].health(NODES[3]) is Health.DEAD
    assert net.cores[0].out_of_placement(net.now) == {NODES[3]}


def test_routing_avoids_a_broken_link_at_once() -> None:
    net = settled(3)
    net.kill(2)
    net.told[0].clear()
    net.run(1.1 * LATENCY_S)
    assert health_changes(net.told[0]) == [(NODES[2], Health.SUSPECT)]


def test_a_frozen_node_is_suspect_then_removed_and_comes_back_by_itself() -> None:
    net = settled(4)
    net.asleep.add(3)
    net.run(2.5)
    assert net.cores[0].health(NODES[3]) is Health.SUSPECT
    net.run(5)
    assert all(net.removed(by) == {3} for by in range(3))
    net.asleep.clear()
    net.run(15)
    assert all(net.removed(by) == set() for by in range(4))
    assert net.agree()


def test_a_node_that_slept_blames_nobody() -> None:
    net = settled(4)
    net.asleep.add(3)
    net.run(600)
    net.asleep.clear()
    net.told[3].clear()
    net.run(30)
    accused = net.cores[3].document.get(NODES[3], ACCUSED)
    assert accused is None or accused.body == {}
    assert net.agree()
    assert not net.cores[3].rejoining


def test_two_of_two_do_not_remove_each_other_while_both_answer() -> None:
    net = settled(2)
    net.run(120)
    assert net.removed(0) == net.removed(1) == set()


def test_a_link_that_breaks_alone_removes_nobody() -> None:
    net = settled(4)
    net.part({0}, {3})
    net.run(60)
    assert all(net.removed(by) == set() for by in range(4))


@pytest.mark.parametrize("size", [2, 3])
def test_connections_that_die_alone_make_nobody_accuse(size: int) -> None:
    net = settled(size)
    last = size - 1
    net.lost = {frozenset({number, last}) for number in range(last)}
    net.run(10)
    assert all(core.document.get(core.me, ACCUSED) is None for core in net.cores.values())
    assert net.lost == set()


def test_half_of_the_nodes_gone_at_once_are_removed_by_the_rest() -> None:
    net = settled(8)
    for number in range(4, 8):
        net.kill(number)
    net.run(10)
    assert all(net.removed(by) == {4, 5, 6, 7} for by in range(4))


def test_who_is_cut_off_from_everybody_knows_it() -> None:
    net = settled(3)
    net.part({0}, {1, 2})
    net.run(2)
    assert net.cores[0].isolated
    assert not net.cores[1].isolated


def test_an_accusation_of_this_node_is_refuted_at_once() -> None:
    net = settled(3)
    mine = net.cores[0].document.get(NODES[0], MEMBER)
    assert mine is not None
    accused = accuses(1, mine, seq=99, at=net.now)
    net.tell(0, Received(node=NODES[1], message=facts(accused)))
    newer = net.cores[0].document.get(NODES[0], MEMBER)
    assert newer is not None
    assert (newer.epoch, newer.seq) > (mine.epoch, mine.seq)
    assert newer.body == mine.body


def test_an_accuser_that_nobody_joins_is_answered_ever_more_rarely() -> None:
    net = settled(4)
    answered = 0
    for seq in range(1, 20):
        before = net.cores[0].document.get(NODES[0], MEMBER)
        assert before is not None
        accused = accuses(1, before, seq=100 + seq, at=net.now)
        net.tell(0, Received(node=NODES[1], message=facts(accused)))
        answered += net.cores[0].document.get(NODES[0], MEMBER) != before
    assert answered == REFUTED_BURST
    net.run(5)
    assert net.removed(1) == net.removed(2) == net.removed(3) == set()


def test_what_was_said_before_the_link_broke_is_not_listened_to() -> None:
    net = settled(3)
    core, peer = net.cores[0], NODES[1]
    news = facts(record(1, CAPS, epoch=NOW, seq=50))
    net.tell(0, LinkDown(node=peer))
    assert net.tell(0, Received(node=peer, message=news)) == []
    assert core.document.get(peer, CAPS) is None
    net.tell(0, LinkUp(node=peer, version=1))
    net.tell(0, Received(node=peer, message=news))
    assert core.document.get(peer, CAPS) is not None


def test_a_member_that_is_gone_for_others_is_suspect_also_without_a_link() -> None:
    net = settled(4)
    member = net.cores[0].document.get(NODES[3], MEMBER)
    assert member is not None
    stranger = Gossip(key=KEYS[7], mesh=MESH, instance=9, epoch=NOW, seeds=())
    stranger.start(net.now)
    stranger.handle(LinkUp(node=NODES[0], version=1), net.now)
    everything = facts(*net.cores[0].document.records(), asked=True)
    stranger.handle(Received(node=NODES[0], message=everything), net.now)
    assert stranger.health(NODES[3]) is Health.LIVE
    accused = [accuses(one, member, seq=99, at=net.now) for one in (1, 2)]
    outs = stranger.handle(Received(node=NODES[0], message=facts(accused[0])), net.now)
    assert health_changes(outs) == [], "one alone could mean ill"
    outs = stranger.handle(Received(node=NODES[0], message=facts(accused[1])), net.now)
    assert (NODES[3], Health.SUSPECT) in health_changes(outs)
    withdrawn = record(1, ACCUSED, epoch=NOW, seq=100, body={}, issued_at=int(net.now))
    outs = stranger.handle(Received(node=NODES[0], message=facts(withdrawn)), net.now)
    assert (NODES[3], Health.LIVE) in health_changes(outs)


def test_asked_about_a_neighbour_it_asks_it_and_tells() -> None:
    net = settled(3)
    net.tell(0, Received(node=NODES[1], message=ProbeRequest(subject=NODES[2], token=77)))
    net.told[0].clear()
    net.run(0.7)
    told = [out.message for out in net.told[0] if isinstance(out, Send)]
    assert ProbeReport(subject=NODES[2], token=77, alive=True) in told


def test_asked_about_a_neighbour_that_misses_answers_it_tries_a_new_connection() -> None:
    net = settled(3)
    net.lost = {frozenset({0, 2})}
    net.run(2)
    net.told[0].clear()
    net.tell(0, Received(node=NODES[1], message=ProbeRequest(subject=NODES[2], token=77)))
    net.run(5 * LATENCY_S)
    told = [out.message for out in net.told[0] if isinstance(out, Send)]
    assert ProbeReport(subject=NODES[2], token=77, alive=True) in told


def test_asked_about_somebody_unknown_it_says_no() -> None:
    net = settled(2)
    outs = net.tell(0, Received(node=NODES[1], message=ProbeRequest(subject=NODES[7], token=5)))
    told = ProbeReport(subject=NODES[7], token=5, alive=False)
    assert Send(node=NODES[1], message=told) in outs


# What peers say


@pytest.mark.parametrize("bad", [b"junk", b"\1" + record(1, CAPS, epoch=NOW, seq=6).raw[1:]])
def test_what_is_forged_costs_the_link_and_what_came_before_it_stands(bad: bytes) -> None:
    net = settled(3)
    good = record(1, CAPS, epoch=NOW, seq=5)
    message = Push(records=(good.raw, bad))
    outs = net.tell(0, Received(node=NODES[1], message=message))
    assert [out.node for out in outs if isinstance(out, Disconnect)] == [NODES[1]]
    assert net.cores[0].document.get(NODES[1], CAPS) == good


def test_a_fork_keeps_its_owner_out_of_placement_everywhere() -> None:
    net = settled(3)
    fork = fork_of(7, issued_at=int(net.now))
    net.tell(0, Received(node=NODES[1], message=Push(forks=(fork.raw,))))
    net.run(1)
    for core in net.cores.values():
        assert core.out_of_placement(net.now) == {NODES[7]}


def test_the_same_story_always_ends_the_same() -> None:
    def story() -> list[list[Out]]:
        net = settled(4)
        net.kill(2)
        net.run(20)
        return [net.told[number] for number in (0, 1, 3)]

    assert story() == story()


def test_a_link_that_stays_silent_is_given_up_for_a_new_one() -> None:
    net = settled(2)
    net.asleep.add(1)  # its kernel keeps the link
    net.run(MUTE_S + 3)
    assert Disconnect(node=NODES[1], reason="silent") in net.told[0]
    net.asleep.clear()
    net.run(SETTLED_S)
    assert net.agree()
    assert net.cores[0].linked == {NODES[1]}


def test_who_believes_few_others_looks_for_itself_and_says_what_it_finds() -> None:
    net = settled(4)
    net.part({0}, {1, 2}, {3})
    net.run(20)
    net.kill(2)
    net.run(20)
    net.part()
    net.run(SETTLED_S + 20)
    assert net.agree()
    assert all(net.removed(number) == {2} for number in (0, 1, 3))
