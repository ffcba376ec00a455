"""A few cores: lives of one node that follow each other, twins, and leases that run out."""

from __future__ import annotations

import pytest

from p2pmesh.gossip.events import PersistEpoch, Publish, Received, Send, TwinFound
from p2pmesh.gossip.publisher import TWIN_SLACK_S
from p2pmesh.state.document import EXPIRY_GRACE_S
from p2pmesh.wire.messages import Push
from p2pmesh.wire.records import peek
from p2pmesh.wire.registers import CAPS, MEMBER, REGISTERS, WANTS
from tests.gossip.builders import facts
from tests.gossip.net import address, settled
from tests.state.builders import NODES, NOW, record

VALUE = {"value": 1}
LEASE_REFRESH_S = REGISTERS[MEMBER].refresh_s
LEASE_S = REGISTERS[MEMBER].ttl_s(1)


# Other lives


def test_a_restarted_node_is_back_with_what_it_says_now() -> None:
    net = settled(3)
    net.tell(2, Publish(register=CAPS, body=VALUE))
    net.run(1)
    net.kill(2)
    net.run(5)
    net.start(2, seeds=(address(0),), instance=33)
    net.run(15)
    assert net.agree()
    assert net.removed(0) == set()
    assert net.cores[0].document.get(NODES[2], CAPS) is None


def test_a_node_without_its_disk_learns_its_epoch_from_the_others() -> None:
    net = settled(3)
    old = net.cores[0].document.get(NODES[2], MEMBER)
    assert old is not None
    net.kill(2)
    net.run(1)
    net.start(2, epoch=1, instance=99, seeds=(address(0),))
    net.run(15)
    assert PersistEpoch(epoch=old.epoch + 1) in net.told[2]
    new = net.cores[0].document.get(NODES[2], MEMBER)
    assert new is not None
    assert (new.epoch, new.instance) == (old.epoch + 1, 99)
    assert net.agree()


def test_nothing_is_written_before_the_epoch_is_on_disk() -> None:
    net = settled(3)
    net.kill(2)
    net.run(1)
    net.start(2, epoch=1, instance=99, seeds=(address(0),))
    net.run(15)
    epoch = 1
    for out in net.told[2]:
        if isinstance(out, PersistEpoch):
            epoch = out.epoch
        if isinstance(out, Send) and isinstance(out.message, Push):
            heads = map(peek, out.message.records)
            assert all(head.epoch <= epoch for head in heads if head and head.owner == NODES[2])


@pytest.mark.parametrize(("instance", "gives_way"), [(1, True), (99, False)])
def test_of_two_nodes_with_one_key_the_smaller_instance_stays(
    instance: int, *, gives_way: bool
) -> None:
    net = settled(2)
    net.run(TWIN_SLACK_S)
    twin = record(1, MEMBER, epoch=NOW + 500, instance=instance, issued_at=int(net.now))
    outs = net.tell(1, Received(node=NODES[0], message=facts(twin)))
    assert (TwinFound() in outs) == gives_way
    assert (PersistEpoch(epoch=NOW + 501) in outs) != gives_way


# Leases


def test_leases_are_renewed_and_run_out_with_their_node() -> None:
    net = settled(2)
    net.tell(1, Publish(register=CAPS, body=VALUE))
    net.tell(1, Publish(register=WANTS, body=VALUE))
    net.run(3 * LEASE_S)
    held = net.cores[0].document.get(NODES[1], MEMBER)
    assert held is not None
    assert net.now - held.issued_at <= LEASE_REFRESH_S + 2
    net.kill(1)
    net.run(LEASE_S + EXPIRY_GRACE_S + 2)
    registers = [one.register for one in net.cores[0].document.registers(NODES[1])]
    assert registers == [WANTS]
