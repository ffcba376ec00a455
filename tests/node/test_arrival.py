"""Which mesh a node takes part in when it starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from p2pmesh.config import Address, Settings
from p2pmesh.discovery.choice import HeardMesh
from p2pmesh.errors import ConfigError, LinkError, LocalError
from p2pmesh.home import Home
from p2pmesh.identity.credentials import LAN_TTL_S
from p2pmesh.identity.hello import LocalIdentity, Peer, Purpose
from p2pmesh.identity.tokens import Token
from p2pmesh.node.arrival import check_settings, choose_entry
from p2pmesh.node.joining import Door, Entry, Joiner
from p2pmesh.node.keystore import MeshInfo, save_mesh
from p2pmesh.node.local_network import LocalNetwork
from p2pmesh.transport.base import Asked
from tests.identity.builders import MESH, credential
from tests.node.cards import card_of, founded
from tests.node.members import key_of
from tests.node.meshes import clock
from tests.state.builders import NOW

KEY = key_of(1)
HERE = founded(KEY, mesh=b"h", name="heard-here")
NEW = founded(KEY, mesh=b"n", name="new")
TOKEN = Token(mesh=MESH, seed=b"s" * 16, addresses=(Address("10.0.0.1", 9338),))


@dataclass
class World:
    """A node that starts, with what is around it and what it does."""

    home: Home
    heard: MeshInfo | None = None
    looks: int = 0
    asked: list[Address] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    founded: int = 0

    async def find(self, joiner: Joiner, is_wanted: Callable[[HeardMesh], bool]) -> Entry | None:
        await trio.lowlevel.checkpoint()
        self.looks += 1
        card = self.heard
        if card is None or not is_wanted(
            HeardMesh(id=card.id, name=card.name, founded_at=1, open=True, version=3)
        ):
            return None
        return Entry(card=card, is_new=True)

    async def introduce(self, address: Address) -> Peer:
        await trio.lowlevel.checkpoint()
        self.asked.append(address)
        raise LinkError(f"nobody answers at {address}")

    async def ask(self, address: Address, purpose: Purpose, me: LocalIdentity) -> Asked:
        await self.introduce(address)
        raise AssertionError

    async def identify(self, address: Address) -> str:
        await trio.lowlevel.checkpoint()
        return f"{address} is a web server"  # so that nobody waits for it

    def found(self) -> MeshInfo:
        self.founded += 1
        return NEW

    async def start(self, **settings: Any) -> Entry:
        me = LocalIdentity(key=KEY, instance=1, mesh=None)
        door = Door(introduce=self.introduce, ask=self.ask, identify=self.identify)
        joiner = Joiner(self.home, me, "anna", door, clock)
        network = cast("LocalNetwork", self)  # of which it uses `find` alone
        made = Settings(**settings)
        check_settings(made)
        return await choose_entry(made, joiner, network, self.found, self.notes.append)


@pytest.fixture
def world(tmp_path: Path) -> World:
    home = Home.at(tmp_path)
    home.create()
    return World(home)


def belong(world: World, *, is_over: bool = False) -> MeshInfo:
    own = credential(KEY, now=NOW - 100, ttl_s=100) if is_over else credential(KEY)
    card = card_of(own, "earlier")
    save_mesh(world.home, card)
    return card


# The first start


async def test_where_nothing_is_heard_a_mesh_is_founded(world: World) -> None:
    assert await world.start() == Entry(card=NEW, is_new=True)
    assert (world.looks, world.founded) == (1, 1)


async def test_an_open_mesh_that_is_heard_is_joined(world: World) -> None:
    world.heard = HERE
    assert await world.start() == Entry(card=HERE, is_new=True)
    assert world.founded == 0


async def test_who_wants_a_private_mesh_listens_to_nobody(world: World) -> None:
    world.heard = HERE
    assert await world.start(private=True) == Entry(card=NEW, is_new=True)
    assert world.looks == 0


async def test_who_wants_a_recovery_code_founds_a_mesh_that_stays(world: World) -> None:
    world.heard = HERE
    assert await world.start(recovery_code=True) == Entry(card=NEW, is_new=False)
    assert (world.looks, world.notes) == (0, [])
    with pytest.raises(ConfigError, match="--recovery-code founds a mesh; --join leads into one"):
        await world.start(recovery_code=True, join=(Address("10.0.0.1", 9338),))


async def test_a_mesh_that_was_founded_before_has_no_recovery_code(world: World) -> None:
    earlier = belong(world)
    assert await world.start(recovery_code=True) == Entry(card=earlier)
    assert world.notes == [
        "No recovery code: one is told only when a mesh is founded, as earlier was"
    ]


async def test_a_named_mesh_is_joined_where_it_is_heard_and_founded_where_it_is_not(
    world: World,
) -> None:
    world.heard = HERE
    assert (await world.start(mesh="heard-here")).card == HERE
    assert (await world.start(mesh="our-house")).card == NEW
    assert world.looks == 2


# Later starts


async def test_a_node_goes_back_to_its_mesh_and_listens_to_nobody(world: World) -> None:
    world.heard, earlier = HERE, belong(world)
    for settings in ({}, {"private": True}, {"open": True}, {"mesh": "earlier"}):
        assert await world.start(**settings) == Entry(card=earlier)
    assert (world.looks, world.founded) == (0, 0)


async def test_another_named_mesh_is_joined_or_said_not_to_be_here(world: World) -> None:
    world.heard = HERE
    belong(world)
    assert (await world.start(mesh="heard-here")).card == HERE
    with pytest.raises(LocalError) as caught:
        await world.start(mesh="our-house")
    assert str(caught.value) == (
        "No open mesh 'our-house' is heard on this network; without --mesh this node goes on in "
        "earlier"
    )
    assert world.founded == 0


async def test_a_membership_that_is_over_is_said_unless_its_mesh_is_open_here(
    world: World,
) -> None:
    belong(world, is_over=True)
    with pytest.raises(LocalError) as caught:
        await world.start()
    assert str(caught.value) == (
        "The membership of this node in earlier is over; ask a member for an invitation, then: "
        "p2pmesh join TOKEN. To go without: p2pmesh leave"
    )
    again = card_of(credential(KEY, basis="lan", now=NOW, ttl_s=LAN_TTL_S), "earlier")
    world.heard = again
    assert (await world.start()).card == again
    assert (world.looks, world.founded) == (2, 0)


async def test_another_mesh_of_that_name_is_not_the_one_whose_membership_is_over(
    world: World,
) -> None:
    belong(world, is_over=True)
    world.heard = founded(KEY, mesh=b"x", name="earlier")
    for settings in ({}, {"mesh": "earlier"}):
        with pytest.raises(LocalError, match="The membership of this node in earlier is over"):
            await world.start(**settings)


async def test_a_damaged_file_is_said_and_nothing_founded(world: World) -> None:
    world.home.mesh_file.write_text("junk")
    with pytest.raises(LocalError, match="is damaged"):
        await world.start()
    assert (world.looks, world.founded) == (0, 0)


# By name


async def test_an_invitation_goes_before_what_is_heard(world: World) -> None:
    world.heard = HERE
    with pytest.raises(LocalError, match=r"Cannot join: 10\.0\.0\.1:9338 is a web server"):
        await world.start(join=(str(TOKEN),))
    assert (world.looks, world.founded) == (0, 0)
    assert world.asked == [Address("10.0.0.1", 9338)]


async def test_who_is_named_and_does_not_answer_is_waited_for_in_the_earlier_mesh(
    world: World,
) -> None:
    earlier, anna = belong(world), Address("anna", 9338)
    assert await world.start(join=(anna,)) == Entry(card=earlier, seeds=(anna,))
    (note,) = world.notes
    assert note == (
        "Cannot join: anna:9338 is a web server. Check the address, and that `p2pmesh up` runs "
        "there. Going on in the mesh earlier, as before"
    )


# What cannot be meant


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"join": ("p2pmesh1-junk",)}, "this invitation is incomplete or misspelt"),
        ({"join": (str(TOKEN)[:-1],)}, "this invitation is incomplete or misspelt"),
        ({"join": ("p2pmesh2-abc",)}, "this invitation is of another version of p2pmesh"),
        ({"open": True, "private": True}, "--open and --private exclude each other"),
        ({"join": (str(TOKEN),), "mesh": "x"}, "--mesh names a mesh of this network"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_settings(Settings(**settings))


async def test_an_invitation_and_a_private_mesh_can_be_meant_together(world: World) -> None:
    with pytest.raises(LocalError, match="Cannot join"):
        await world.start(join=(str(TOKEN),), private=True)
    assert (await world.start(mesh="our-house", open=True)).card == NEW
