from __future__ import annotations

from p2pmesh.gossip.events import LinkUp
from p2pmesh.transport.banlist import BAR_FIRST_S
from tests.simulations.meshes import Steps, settled


def test_who_sends_junk_is_cut_off_for_a_while() -> None:
    world = settled()
    one, other = world.nodes[:2]
    one.links.send(other.id, b"junk")
    world.run(0.2)
    assert one.id not in other.links.ends
    assert other.id not in one.links.ends
    world.run(BAR_FIRST_S + 10)
    assert one.id in other.links.ends


def test_two_links_become_one_that_both_agree_on() -> None:
    world = settled(2)
    one, other = world.nodes
    steps = Steps()
    world.watchers.append(steps)
    one.links.dial(None, (other.address,))
    other.links.dial(None, (one.address,))
    world.run(1)
    (near,), (far,) = one.links.ends.values(), other.links.ends.values()
    assert near.far is far
    assert near.outgoing == (one.id < other.id)


def test_a_core_is_told_which_version_a_link_speaks() -> None:
    world = settled(2)
    steps = Steps()
    world.watchers.append(steps)
    for node in world.nodes:
        node.versions = (1, 2)
        node.kill()
    world.start_all()
    world.run(5)
    versions = [s.event.version for s in steps.seen if isinstance(s.event, LinkUp)]
    assert versions
    assert set(versions) == {2}
