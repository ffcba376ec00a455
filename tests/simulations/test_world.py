from __future__ import annotations

from simulations.world import World, key_of
from tests.simulations.meshes import Steps, settled


def test_keys_follow_from_the_seed() -> None:
    assert key_of(1, 0).id == key_of(1, 0).id
    assert len({key_of(1, 0).id, key_of(1, 1).id, key_of(2, 0).id}) == 3


def test_nobody_gets_through_to_who_cannot_be_dialled() -> None:
    world = World(1, 2)
    world.nodes[1].dialable = False
    assert world.at(world.nodes[0].address) is world.nodes[0]
    assert world.at(world.nodes[1].address) is None


def test_nodes_that_cannot_be_dialled_take_part() -> None:
    world = World(1, 5)
    for node in world.nodes[3:]:
        node.dialable = False
    world.start_all()
    world.run(15)
    one, other = world.nodes[3:]
    assert one.core is not None
    assert set(one.links.ends) == {node.id for node in world.nodes[:3]}
    assert other.id in one.core.document


def test_readers_see_changes_only() -> None:
    world = settled()
    watcher, reader = Steps(), Steps()
    world.watchers.append(watcher)
    world.readers.append(reader)
    world.run(5)
    world.nodes[3].kill()
    world.run(5)
    assert 0 < len(reader.seen) < len(watcher.seen) / 2
    assert all(step.changed for step in reader.seen)


def test_who_went_down_is_down_until_it_comes_back() -> None:
    world = settled()
    node = world.nodes[3]
    node.kill()
    assert (world.went_down, world.down, world.running(node.id)) == ({3: 20}, [node], [])
    node.start()
    assert (world.went_down, world.down, world.running(node.id)) == ({}, [], [node])


def test_a_twin_keeps_a_key_in_use() -> None:
    world = settled()
    copy = world.add(twin_of=world.nodes[3])
    copy.start()
    world.nodes[3].kill()
    assert world.down == []
    assert world.running(copy.id) == [copy]


def test_who_was_touched_lately_could_not_talk_all_the_time() -> None:
    world = settled()
    one, other = world.nodes[:2]
    assert world.reach(one, other, since_s=10)
    one.freeze()
    assert not world.reach(one, other, since_s=10)
    one.resume()
    assert not world.reach(one, other, since_s=10)
    assert world.reach(one, other, since_s=20)
    world.run(1)
    world.disturbed()
    assert not world.reach(one, other, since_s=20)
