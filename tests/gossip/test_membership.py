from __future__ import annotations

import pytest

from p2pmesh.gossip.events import (
    Disconnect,
    Health,
    LinkUp,
    PersistEpoch,
    Publish,
    Received,
    Rejected,
    Send,
    StateChanged,
    TwinFound,
)
from p2pmesh.gossip.membership import LEASE_REFRESH_S, LEASE_TTL_S, TWIN_SLACK_S, Gossip
from p2pmesh.state.document import EPOCH_AHEAD_S_MAX, EXPIRY_GRACE_S
from p2pmesh.wire.messages import Records, encode_message
from p2pmesh.wire.records import Record, RecordCheck, seal
from tests.gossip.cluster import Cluster, address, key, node
from tests.state.make import MESH, NODES, NOW, member, record

VALUE = {"value": 1}


def test_nodes_that_know_one_address_find_each_other() -> None:
    cluster = Cluster(5)
    cluster.run(4)
    assert cluster.agree()
    for core in cluster.cores.values():
        assert len(core.linked) == 4
        assert len(core.document.owners) == 5


def test_an_update_reaches_everybody_in_two_hops() -> None:
    cluster = Cluster(5)
    cluster.run(4)
    cluster.tell(3, Publish(register="caps", body=VALUE))
    cluster.run(0.021)
    assert cluster.agree()
    for core in cluster.cores.values():
        held = core.document.get(node(3), "caps")
        assert held is not None
        assert held.body == VALUE


def test_a_value_published_again_is_not_news() -> None:
    cluster = Cluster(2)
    cluster.run(4)
    cluster.tell(1, Publish(register="caps", body=VALUE))
    before = cluster.messages
    cluster.tell(1, Publish(register="caps", body=dict(VALUE)))
    assert cluster.messages == before
    cluster.tell(1, Publish(register="caps", body=None))
    held = cluster.cores[1].document.get(node(1), "caps")
    assert held is not None
    assert held.body == {}


def test_a_killed_node_is_dead_at_once() -> None:
    cluster = Cluster(3)
    cluster.run(4)
    cluster.crash(3)
    cluster.run(0.1)
    for number in (1, 2):
        assert cluster.health(number, of=3) is Health.DEAD
        assert cluster.health_changes(number)[-2:] == [
            (node(3), Health.SUSPECT),
            (node(3), Health.DEAD),
        ]


def test_a_stopped_node_is_suspect_after_a_probe_and_dead_after_three() -> None:
    cluster = Cluster(3)
    cluster.run(4.2)
    cluster.frozen.add(3)
    cluster.run(1.6)
    assert cluster.health(1, of=3) is Health.SUSPECT
    cluster.run(2)
    assert cluster.health(1, of=3) is Health.DEAD
    assert cluster.health(1, of=2) is Health.LIVE
    cluster.frozen.clear()
    cluster.run(35)
    assert cluster.health(1, of=3) is Health.LIVE
    assert cluster.health(3, of=1) is Health.LIVE
    assert cluster.agree()


def test_a_node_that_slept_blames_nobody() -> None:
    cluster = Cluster(3)
    cluster.run(4.2)
    cluster.frozen.add(3)
    cluster.run(600)
    cluster.frozen.clear()
    before = len(cluster.health_changes(3))
    cluster.run(1)
    assert Health.DEAD not in [health for _, health in cluster.health_changes(3)[before:]]


def test_a_restarted_node_is_back_with_what_it_says_now() -> None:
    cluster = Cluster(3)
    cluster.run(4)
    cluster.tell(3, Publish(register="caps", body=VALUE))
    cluster.crash(3)
    cluster.run(5)
    cluster.add(3, epoch=int(cluster.now), instance=33)
    cluster.run(40)
    assert cluster.agree()
    assert cluster.health(1, of=3) is Health.LIVE
    assert cluster.cores[1].document.get(node(3), "caps") is None


def test_a_node_without_its_disk_learns_its_epoch_from_the_others() -> None:
    cluster = Cluster(2)
    cluster.run(4)
    old = cluster.cores[2].document.get(node(2), "member")
    assert old is not None
    cluster.crash(2)
    cluster.run(2)
    cluster.add(2, epoch=1, instance=99, seeds=(address(1),))
    cluster.run(40)
    assert PersistEpoch(epoch=old.epoch + 1) in cluster.told[2]
    new = cluster.cores[1].document.get(node(2), "member")
    assert new is not None
    assert new.instance == 99
    assert cluster.agree()


@pytest.mark.parametrize("register", ["caps", "member"])
@pytest.mark.parametrize(("instance", "gives_way"), [(1, True), (99, False)])
def test_of_two_nodes_with_one_key_the_smaller_instance_stays(
    instance: int, register: str, *, gives_way: bool
) -> None:
    cluster = Cluster(2)
    cluster.run(TWIN_SLACK_S + 5)
    twin = record_of(2, register=register, epoch=NOW + 500, instance=instance, now=cluster.now)
    cluster.told[2].clear()
    cluster.tell(2, Received(node=node(1), message=twin))
    assert (TwinFound() in cluster.told[2]) == gives_way
    assert (PersistEpoch(epoch=NOW + 501) in cluster.told[2]) != gives_way


def test_an_epoch_that_could_not_be_outranked_waits() -> None:
    cluster = Cluster(2)
    cluster.run(4)
    ahead = int(cluster.now) + EPOCH_AHEAD_S_MAX
    past = record_of(2, register="caps", epoch=ahead, instance=1, now=cluster.now)
    cluster.told[2].clear()
    cluster.tell(2, Received(node=node(1), message=past))
    assert not any(isinstance(out, PersistEpoch) for out in cluster.told[2])
    cluster.run(2)
    cluster.tell(2, Received(node=node(1), message=past))
    assert PersistEpoch(epoch=ahead + 1) in cluster.told[2]


def record_of(owner: int, *, register: str, epoch: int, instance: int, now: float) -> bytes:
    sealed = seal(
        key(owner),
        mesh=MESH,
        register=register,
        epoch=epoch,
        seq=1,
        instance=instance,
        issued_at=int(now),
        ttl_s=240,
        body=member().to_wire(),
    )
    return encode_message(Records(records=(sealed.raw,)))


def test_a_forged_record_costs_the_link_and_is_not_passed_on() -> None:
    cluster = Cluster(3)
    cluster.run(4)
    forged = bytearray(record(0, epoch=NOW).raw)
    forged[0] ^= 1
    message = encode_message(Records(records=(bytes(forged),)))
    cluster.told[1].clear()
    cluster.tell(1, Received(node=node(2), message=message))
    assert [type(out) for out in cluster.told[1]] == [Disconnect]


def test_records_are_checked_as_the_core_was_told_to() -> None:
    seen: list[Record] = []

    def believe(record: Record) -> bool:
        seen.append(record)
        return True

    check = RecordCheck(verify=believe)
    core = Gossip(key=key(1), mesh=MESH, instance=1, epoch=NOW, check=check)
    told = record(0, epoch=NOW)
    message = encode_message(Records(records=(told.raw,)))
    for _ in range(2):
        core.handle(Received(node=node(2), message=message), NOW)
    assert seen == [told]


@pytest.mark.parametrize("bad", [b"junk", record(1).raw.replace(record(1).raw[:9], b"no sign??")])
def test_what_came_before_a_bad_record_is_told_and_passed_on(bad: bytes) -> None:
    cluster = Cluster(3)
    cluster.run(4)
    message = encode_message(Records(records=(record(0).raw, bad)))
    cluster.told[1].clear()
    cluster.tell(1, Received(node=node(2), message=message))
    assert StateChanged(owners=frozenset({NODES[0]})) in cluster.told[1]
    assert [type(out) for out in cluster.told[1]].count(Disconnect) == 1
    assert [out.node for out in cluster.told[1] if isinstance(out, Send)] == [node(3)]


def test_junk_costs_the_link() -> None:
    cluster = Cluster(2)
    cluster.run(4)
    cluster.told[1].clear()
    cluster.tell(1, Received(node=node(2), message=b"junk"))
    assert [type(out) for out in cluster.told[1]] == [Disconnect]


def test_an_owner_beyond_its_bounds_is_not_believed() -> None:
    cluster = Cluster(2)
    cluster.run(4)
    pages = [record(0, f"x/{n}", body={"x": "y" * 16_000}) for n in range(20)]
    for page in pages:
        cluster.tell(
            1, Received(node=node(2), message=encode_message(Records(records=(page.raw,))))
        )
    assert any(isinstance(out, Rejected) for out in cluster.told[1])


def test_what_was_lost_on_the_way_is_repaired() -> None:
    cluster = Cluster(2)
    cluster.run(4)
    # A record that reached node 1 only, as if the flood to node 2 had been lost.
    lost = record(0, epoch=NOW)
    assert cluster.cores[1].document.merge(lost, cluster.now)
    assert not cluster.agree()
    cluster.run(4)
    assert cluster.agree()


def test_leases_are_renewed_and_run_out_with_their_node() -> None:
    cluster = Cluster(2)
    cluster.run(4)
    cluster.tell(2, Publish(register="caps", body=VALUE))
    cluster.tell(2, Publish(register="wants", body=VALUE))
    cluster.run(3 * LEASE_TTL_S)
    held = cluster.cores[1].document.get(node(2), "member")
    assert held is not None
    assert cluster.now - held.issued_at <= LEASE_REFRESH_S + 2
    cluster.crash(2)
    cluster.run(LEASE_TTL_S + EXPIRY_GRACE_S + 2)
    registers = [one.register for one in cluster.cores[1].document.registers(node(2))]
    assert registers == ["wants"]


def test_a_new_peer_is_told_what_is_held_here() -> None:
    cluster = Cluster(1)
    cluster.told[1].clear()
    cluster.tell(1, LinkUp(node=node(9)))
    assert [type(out) for out in cluster.told[1]][-1] is Send


def test_the_same_story_always_ends_the_same() -> None:
    def story() -> list[object]:
        cluster = Cluster(4)
        cluster.run(5)
        cluster.crash(2)
        cluster.run(20)
        return [cluster.told[number] for number in (1, 3, 4)]

    assert story() == story()
