"""The network around a node: where it speaks for its mesh, and which it joins or follows.

Interfaces, gateways and what is heard are the test's; everything in between is real.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from p2pmesh.config import Address
from p2pmesh.discovery import interfaces as interfaces_module
from p2pmesh.discovery.announcement import Announcement, Query
from p2pmesh.discovery.choice import FOLLOW_FOR_S, LISTEN_S, YIELD_S, HeardMesh
from p2pmesh.discovery.heard import Heard
from p2pmesh.discovery.onlink import Interface
from p2pmesh.errors import LocalError
from p2pmesh.home import Home
from p2pmesh.identity.credentials import Role
from p2pmesh.identity.keys import MeshId, NodeId, show_id
from p2pmesh.node import local_network as module
from p2pmesh.node.joining import Entry, Joiner
from p2pmesh.node.keystore import MeshInfo
from p2pmesh.node.local_network import LOOK_INTERVAL_S, NETWORKS_MAX, SETTLE_S, LocalNetwork
from p2pmesh.watchable import Watchable
from tests.identity.builders import FOUNDER, MESH, credential
from tests.node.cards import card_of, founded
from tests.node.members import NAME, Member, key_of, members
from tests.node.meshes import clock

HOME, CAFE = "aa:aa:aa:aa:aa:aa", "bb:bb:bb:bb:bb:bb"
ME = NodeId(FOUNDER.id)
LOWEST, HIGHEST = NodeId(bytes(16)), NodeId(b"\xff" * 16)


def interface(name: str, *addresses: str) -> Interface:
    return Interface(
        name=name,
        index=7,
        addresses=tuple(map(ipaddress.ip_interface, addresses)),
        mac="cc:cc:cc:cc:cc:cc",
    )


WIFI = interface("wlan0", "192.168.1.5/24", "fe80::5/64")
CABLE = interface("eth0", "10.0.0.5/8")


class FakeDiscovery:
    """Says nothing, and hears what the test says."""

    def __init__(self, me: NodeId, name: str, port: int, *, interfaces: Any) -> None:
        self.heard, self.changes = Heard(), Watchable()
        self.said: list[Announcement | None] = []
        self.admitted: list[NodeId] = []
        self.is_seeking = True
        self.anew = 0
        self.interfaces = interfaces

    def announce(self, said: Announcement | None) -> None:
        if not self.said or self.said[-1] != said:
            self.said.append(said)

    def seek(self, *, on: bool) -> None:
        self.is_seeking = on

    def admit(self, node: NodeId) -> None:
        self.admitted.append(node)

    def start_anew(self) -> None:
        self.anew += 1

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        await trio.sleep_forever()

    def hear(self, said: Announcement | Query, host: str = "192.168.1.9") -> None:
        now = trio.current_time()
        if isinstance(said, Query):
            self.heard.queried(said, host, now)
        else:
            self.heard.announced(said, host, now)
        self.changes.notify()


@dataclass
class Machine:
    """The networks that this machine is on."""

    usable: list[Interface] = field(default_factory=lambda: [WIFI])
    gateways: dict[str, str] = field(default_factory=lambda: {"wlan0": HOME})

    def interfaces(self) -> Sequence[Interface]:
        return self.usable

    async def network_ids(self) -> Mapping[str, str]:
        await trio.lowlevel.checkpoint()
        return self.gateways


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(interfaces_module, "usable_interfaces", machine.interfaces)
    monkeypatch.setattr(module, "network_ids", machine.network_ids)
    monkeypatch.setattr(module, "Discovery", FakeDiscovery)
    return machine


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home.at(tmp_path / "own")
    home.create()
    return home


def network_of(
    home: Home, *, me: NodeId = ME, wanted: str | None = None, is_welcome: bool = False
) -> LocalNetwork:
    return LocalNetwork(home, me, "anna", 9338, wanted=wanted, is_welcome=is_welcome, is_on=True)


def ears(network: LocalNetwork) -> FakeDiscovery:
    return cast("FakeDiscovery", network._discovery)


@asynccontextmanager
async def founder(
    tmp_path: Path, *, is_open: bool = True, joined_at: float | None = None
) -> AsyncIterator[tuple[Member, MeshInfo]]:
    """The founder of a mesh, and that mesh as it remembers it."""
    async with members(tmp_path, is_open=is_open) as made:
        member = await made.start("founder")
        at = int(clock() if joined_at is None else joined_at)
        yield (
            member,
            MeshInfo(
                id=MESH, name=NAME, founded_at=1000, credential=member.card.credential, joined_at=at
            ),
        )


def announced(network: LocalNetwork) -> bool:
    said = ears(network).said
    assert (said[-1] is not None) == network.announces
    return said[-1] is not None


def heard(
    number: int, name: str = "there", *, founded_at: int = 500, is_open: bool = True
) -> Announcement:
    return Announcement(
        node=NodeId(bytes([number]) * 16),
        mesh=MeshId(bytes([number]) * 16),
        mesh_name=name,
        founded_at=founded_at,
        open=is_open,
        port=9338,
        version=3,
    )


# Where this node speaks for its mesh


async def test_a_mesh_is_announced_where_it_was_founded(
    tmp_path: Path, home: Home, machine: Machine
) -> None:
    async with founder(tmp_path) as (member, card):
        network = network_of(home)
        await network.enter(card, member.mesh, is_new=True)
        (said,) = ears(network).said
        assert said == Announcement(
            node=ME, mesh=MESH, mesh_name=NAME, founded_at=1000, open=True, port=9338, version=3
        )
        assert json.loads(home.networks_file.read_text()) == {show_id(MESH): [HOME]}
        assert network.admits
        assert await network.refusal("192.168.1.77") == ""


async def test_a_laptop_carries_its_mesh_into_no_cafe(
    tmp_path: Path, home: Home, machine: Machine
) -> None:
    """The subnet of the café is that of its home, the gateway is another one."""
    async with founder(tmp_path) as (member, card):
        at_home = network_of(home)
        await at_home.enter(card, member.mesh, is_new=True)
        machine.gateways = {"wlan0": CAFE}
        in_cafe = network_of(home)
        await in_cafe.enter(card, member.mesh, is_new=False)
        assert not announced(in_cafe)
        assert not in_cafe.admits
        assert await in_cafe.refusal("192.168.1.77") == (
            "this mesh lets nobody in on this network, where it was not founded; ask a member for "
            "an invitation, or to run: p2pmesh up --open"
        )
        assert ears(in_cafe).interfaces() == []
        assert json.loads(home.networks_file.read_text()) == {show_id(MESH): [HOME]}
        machine.gateways = {"wlan0": HOME}
        back = network_of(home)
        await back.enter(card, member.mesh, is_new=False)
        assert announced(back)


async def test_it_notices_while_it_runs_that_it_was_carried_elsewhere(
    tmp_path: Path, home: Home, machine: Machine, autojump_clock: MockClock
) -> None:
    autojump_clock.autojump_threshold = 0.02  # there are threads
    async with founder(tmp_path) as (member, card), trio.open_nursery() as nursery:
        network = network_of(home)
        await nursery.start(network.run)
        await network.enter(card, member.mesh, is_new=True)
        assert announced(network)
        machine.gateways = {"wlan0": CAFE}
        await trio.sleep(LOOK_INTERVAL_S + 1)
        assert not announced(network)
        assert ears(network).anew == 1
        assert await network.refusal("192.168.1.77") != ""
        machine.gateways = {"wlan0": HOME}
        await trio.sleep(LOOK_INTERVAL_S + 1)
        assert announced(network)
        nursery.cancel_scope.cancel()


async def test_a_person_may_open_another_network(
    tmp_path: Path, home: Home, machine: Machine
) -> None:
    async with founder(tmp_path) as (member, card):
        network = network_of(home, is_welcome=True)
        await network.enter(card, member.mesh, is_new=False)
        assert announced(network)
        later = network_of(home)
        await later.enter(card, member.mesh, is_new=False)
        assert announced(later), "it was said once for all"


async def test_another_mesh_is_not_at_home_where_the_last_one_was(
    tmp_path: Path, home: Home, machine: Machine
) -> None:
    machine.gateways = {}
    async with founder(tmp_path) as (member, card):
        network = network_of(home)
        await network.enter(founded(FOUNDER), member.mesh, is_new=True)
        assert announced(network)
        await network.enter(card, member.mesh, is_new=False)  # by an invitation
        assert not announced(network)


async def test_each_mesh_has_networks_of_its_own(
    tmp_path: Path, home: Home, machine: Machine
) -> None:
    async with founder(tmp_path) as (member, card):
        await network_of(home).enter(founded(FOUNDER), member.mesh, is_new=True)
        network = network_of(home)
        await network.enter(card, member.mesh, is_new=False)
        assert not announced(network)


async def test_a_network_without_gateway_is_known_while_the_node_runs(
    tmp_path: Path, home: Home, machine: Machine
) -> None:
    machine.gateways = {}
    async with founder(tmp_path) as (member, card):
        network = network_of(home)
        await network.enter(card, member.mesh, is_new=True)
        assert announced(network)
        assert not home.networks_file.exists()
        later = network_of(home)
        await later.enter(card, member.mesh, is_new=False)
        assert not announced(later)


@pytest.mark.parametrize("has_gateway_first", [True, False])
async def test_a_mesh_founded_without_any_network_is_at_home_on_the_first_that_comes(
    tmp_path: Path,
    home: Home,
    machine: Machine,
    autojump_clock: MockClock,
    *,
    has_gateway_first: bool,
) -> None:
    """A laptop starts faster than its Wi-Fi, and may follow as if it had started now."""
    autojump_clock.autojump_threshold = 0.02  # there are threads
    machine.usable, machine.gateways = [], {}
    joined_at = clock() - FOLLOW_FOR_S - 1
    async with founder(tmp_path, joined_at=joined_at) as (member, card), trio.open_nursery() as n:
        network = network_of(home)
        await n.start(network.run)
        await network.enter(card, member.mesh, is_new=True)
        assert not announced(network)
        machine.usable = [WIFI]
        if not has_gateway_first:
            await trio.sleep(LOOK_INTERVAL_S + 1)
            assert announced(network)
        machine.gateways = {"wlan0": HOME}
        await trio.sleep(LOOK_INTERVAL_S + 1)
        assert announced(network)
        assert ears(network).is_seeking
        assert json.loads(home.networks_file.read_text()) == {show_id(MESH): [HOME]}
        machine.gateways = {"wlan0": CAFE}
        await trio.sleep(LOOK_INTERVAL_S + 1)
        assert not announced(network)
        n.cancel_scope.cancel()


@pytest.mark.parametrize("why", ["invited", "member", "bare"])
async def test_one_that_others_may_be_in_is_at_home_nowhere_by_itself(
    tmp_path: Path, home: Home, machine: Machine, autojump_clock: MockClock, why: str
) -> None:
    autojump_clock.autojump_threshold = 0.02  # there are threads
    machine.usable, machine.gateways = ([WIFI] if why == "bare" else []), {}
    async with founder(tmp_path) as (member, card), trio.open_nursery() as nursery:
        if why == "invited":  # over a VPN
            member.invite()
        network = network_of(home)
        await nursery.start(network.run)
        await network.enter(card, member.mesh, is_new=why != "member")
        if why == "bare":  # a network without gateway, and a café later
            await trio.sleep(SETTLE_S + LOOK_INTERVAL_S)
        machine.usable, machine.gateways = [WIFI], {"wlan0": CAFE}
        await trio.sleep(2 * LOOK_INTERVAL_S)
        assert not announced(network)
        assert not home.networks_file.exists()
        nursery.cancel_scope.cancel()


async def test_of_several_interfaces_only_the_known_ones_are_spoken_on(
    tmp_path: Path, home: Home, machine: Machine
) -> None:
    async with founder(tmp_path) as (member, card):
        network = network_of(home)
        await network.enter(card, member.mesh, is_new=True)
        machine.usable = [WIFI, CABLE]
        machine.gateways = {"wlan0": HOME, "eth0": CAFE}
        assert await network.refusal("192.168.1.77") == ""
        assert await network.refusal("10.1.2.3") != ""
        assert await network.refusal("8.8.8.8") != ""
        assert await network.refusal("no address") != ""
        assert await network.refusal("fe80::9%wlan0") == ""
        assert await network.refusal("fe80::9%eth0") != ""
        assert ears(network).interfaces() == [WIFI]


async def test_the_oldest_of_too_many_networks_is_forgotten(
    tmp_path: Path, home: Home, machine: Machine
) -> None:
    async with founder(tmp_path) as (member, card):
        for number in range(NETWORKS_MAX + 1):
            machine.gateways = {"wlan0": f"{number}"}
            await network_of(home).enter(card, member.mesh, is_new=True)
        kept = json.loads(home.networks_file.read_text())[show_id(MESH)]
        assert kept == [f"{number}" for number in range(1, NETWORKS_MAX + 1)]


@pytest.mark.parametrize("damaged", ["", "[]", "5", "[" * 100_000, '{"x": 5}', "\udcff"])
async def test_a_damaged_file_means_that_no_network_is_known(
    tmp_path: Path, home: Home, machine: Machine, damaged: str
) -> None:
    home.networks_file.write_text(damaged, "utf-8", errors="surrogateescape")
    async with founder(tmp_path) as (member, card):
        network = network_of(home)
        with capture_logs() as logs:
            await network.enter(card, member.mesh, is_new=False)
        assert "networks_unreadable" in [one["event"] for one in logs]
        assert not announced(network)


async def test_a_private_mesh_is_announced_as_such(
    tmp_path: Path, home: Home, machine: Machine
) -> None:
    async with founder(tmp_path, is_open=False) as (member, card):
        network = network_of(home)
        await network.enter(card, member.mesh, is_new=True)
        said = ears(network).said[-1]
        assert said is not None
        assert not said.open
        assert not network.admits


async def test_who_may_let_nobody_in_does_not_speak_for_its_mesh(
    tmp_path: Path, home: Home, machine: Machine
) -> None:
    last = credential(key_of(1), Role.INVITE)
    for number in (2, 3):
        last = credential(key_of(number), Role.INVITE, signer=key_of(number - 1), own=last)
    async with members(tmp_path) as made:
        member = await made.start("far", key=key_of(3), own=last)
        network = network_of(home)
        await network.enter(card_of(last, NAME), member.mesh, is_new=True)
        assert not announced(network)


async def test_where_discovery_is_off_nothing_is_said_or_heard(
    tmp_path: Path, home: Home, machine: Machine
) -> None:
    async with founder(tmp_path) as (member, card), trio.open_nursery() as nursery:
        network = LocalNetwork(home, ME, "anna", 9338, is_welcome=False, is_on=False)
        await nursery.start(network.run)
        assert await network.find(Finder(), any_mesh) is None
        await network.enter(card, member.mesh, is_new=True)
        assert (network.waiting, network.others, network.announces) == ([], [], False)
        network.admit(LOWEST)
        network.rest()
        nursery.start_soon(network.follow, Finder())
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


# Without a mesh


def any_mesh(_heard: HeardMesh) -> bool:
    return True


def named(name: str) -> Callable[[HeardMesh], bool]:
    return lambda mesh: mesh.name == name


class Finder(Joiner):
    """Gets into each mesh, except those that refuse it."""

    def __init__(self, *refusing: int) -> None:
        self.refusing = [MeshId(bytes([number]) * 16) for number in refusing]
        self.asked: list[tuple[MeshId, list[Address]]] = []

    async def over_network(self, mesh: MeshId, addresses: Any) -> Entry:
        await trio.lowlevel.checkpoint()
        self.asked.append((mesh, list(addresses)))
        if mesh in self.refusing:
            raise LocalError("Cannot join: too many joined from this network lately")
        own = founded(FOUNDER, name="joined")
        return Entry(card=own, is_new=True)


async def test_the_oldest_open_mesh_that_is_heard_is_joined(
    home: Home, machine: Machine, autojump_clock: MockClock
) -> None:
    network, joiner = network_of(home), Finder()
    ears(network).hear(heard(1, founded_at=300))
    ears(network).hear(heard(2, founded_at=200), "192.168.1.2")
    ears(network).hear(heard(3, founded_at=100, is_open=False))
    assert await network.find(joiner, any_mesh) is not None
    assert joiner.asked == [(MeshId(b"\x02" * 16), [Address("192.168.1.2", 9338)])]


async def test_one_that_refuses_is_passed_over(
    home: Home, machine: Machine, autojump_clock: MockClock
) -> None:
    network, joiner = network_of(home), Finder(2)
    ears(network).hear(heard(1, founded_at=300))
    ears(network).hear(heard(2, founded_at=200))
    assert await network.find(joiner, any_mesh) is not None
    assert [mesh[0] for mesh, _ in joiner.asked] == [2, 1]


async def test_only_the_named_mesh_will_do(
    home: Home, machine: Machine, autojump_clock: MockClock
) -> None:
    network, joiner = network_of(home), Finder()
    ears(network).hear(heard(1, "garden"))
    assert await network.find(joiner, named("house")) is None
    ears(network).hear(heard(2, "house"))
    assert await network.find(joiner, named("house")) is not None
    assert [mesh[0] for mesh, _ in joiner.asked] == [2]


@pytest.mark.parametrize(("other", "waits_s"), [(None, LISTEN_S), (LOWEST, LISTEN_S + YIELD_S)])
async def test_where_none_is_heard_for_a_while_there_is_none(
    home: Home,
    machine: Machine,
    autojump_clock: MockClock,
    other: NodeId | None,
    waits_s: float,
) -> None:
    network, began = network_of(home, me=HIGHEST), trio.current_time()
    if other is not None:
        ears(network).hear(Query(other, "bert", None, 9338))
    assert await network.find(Finder(), any_mesh) is None
    assert trio.current_time() - began == pytest.approx(waits_s)


async def test_one_that_is_heard_meanwhile_is_joined_at_once(
    home: Home, machine: Machine, autojump_clock: MockClock
) -> None:
    network, began = network_of(home), trio.current_time()

    async def speak_late() -> None:
        await trio.sleep(0.7)
        ears(network).hear(heard(1))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(speak_late)
        assert await network.find(Finder(), any_mesh) is not None
    assert trio.current_time() - began == pytest.approx(0.7)


# Following


@asynccontextmanager
async def following(network: LocalNetwork, joiner: Finder) -> AsyncIterator[list[Entry]]:
    """Collects where the node would go."""
    there: list[Entry] = []

    async def follow() -> None:
        there.append(await network.follow(joiner))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow)
        await wait_all_tasks_blocked()
        yield there
        nursery.cancel_scope.cancel()


async def test_a_new_mesh_gives_way_to_an_older_open_one(
    tmp_path: Path, home: Home, machine: Machine
) -> None:
    async with founder(tmp_path) as (member, card):
        network, joiner = network_of(home), Finder()
        await network.enter(card, member.mesh, is_new=True)
        assert ears(network).is_seeking
        async with following(network, joiner) as there:
            ears(network).hear(heard(1, founded_at=2000))
            ears(network).hear(heard(2, founded_at=500, is_open=False), "192.168.1.2")
            await wait_all_tasks_blocked()
            assert [mesh[0] for mesh, _ in joiner.asked] == [2], "a person let it in there"
            assert len(there) == 1


async def test_a_younger_mesh_is_not_followed_and_shown_instead(
    tmp_path: Path, home: Home, machine: Machine
) -> None:
    async with founder(tmp_path) as (member, card):
        network, joiner = network_of(home), Finder()
        await network.enter(card, member.mesh, is_new=True)
        async with following(network, joiner) as there:
            ears(network).hear(heard(1, "younger", founded_at=2000))
            await wait_all_tasks_blocked()
            assert (there, joiner.asked) == ([], [])
        assert network.others == ["younger"]


async def test_one_that_does_not_take_this_node_is_not_asked_again(
    tmp_path: Path, home: Home, machine: Machine
) -> None:
    async with founder(tmp_path) as (member, card):
        network, joiner = network_of(home), Finder(1)
        await network.enter(card, member.mesh, is_new=True)
        async with following(network, joiner) as there:
            for _ in range(3):
                ears(network).hear(heard(1, founded_at=500))
                await wait_all_tasks_blocked()
            assert (there, len(joiner.asked)) == ([], 1)


@pytest.mark.parametrize("why", ["old", "invited"])
async def test_a_mesh_that_somebody_counts_on_is_not_left(
    tmp_path: Path, home: Home, machine: Machine, why: str
) -> None:
    joined_at = clock() - FOLLOW_FOR_S - 1 if why == "old" else None
    async with founder(tmp_path, joined_at=joined_at) as (member, card):
        network, joiner = network_of(home), Finder()
        await network.enter(card, member.mesh, is_new=True)
        if why == "invited":
            member.invite()
        async with following(network, joiner) as there:
            ears(network).hear(heard(1, founded_at=500))
            await wait_all_tasks_blocked()
            assert (there, joiner.asked) == ([], [])
            assert not ears(network).is_seeking


@pytest.mark.parametrize("is_open", [True, False])
async def test_a_private_mesh_is_not_left_for_any_other(
    tmp_path: Path, home: Home, machine: Machine, *, is_open: bool
) -> None:
    async with founder(tmp_path, is_open=False) as (member, card):
        network, joiner = network_of(home), Finder()
        await network.enter(card, member.mesh, is_new=True)
        async with following(network, joiner) as there:
            ears(network).hear(heard(1, founded_at=500, is_open=is_open))
            await wait_all_tasks_blocked()
            assert (there, joiner.asked) == ([], [])
            assert not ears(network).is_seeking


async def test_a_mesh_that_the_user_named_is_left_only_for_one_of_that_name(
    tmp_path: Path, home: Home, machine: Machine
) -> None:
    async with founder(tmp_path) as (member, card):
        network, joiner = network_of(home, wanted=NAME), Finder()
        await network.enter(card, member.mesh, is_new=True)
        assert not ears(network).is_seeking, "nobody else is to let it in"
        async with following(network, joiner) as there:
            ears(network).hear(heard(1, founded_at=500))
            ears(network).hear(heard(2, founded_at=500, is_open=False), "192.168.1.2")
            await wait_all_tasks_blocked()
            assert (there, joiner.asked) == ([], [])
            ears(network).hear(heard(3, NAME, founded_at=501), "192.168.1.3")
            await wait_all_tasks_blocked()
            assert [mesh[0] for mesh, _ in joiner.asked] == [3]
        assert network.others == [NAME, "there"]


# People


async def test_who_waits_is_shown_and_told_when_it_was_let_in(
    tmp_path: Path, home: Home, machine: Machine
) -> None:
    async with founder(tmp_path, is_open=False) as (member, card):
        network = network_of(home)
        await network.enter(card, member.mesh, is_new=True)
        ears(network).hear(Query(LOWEST, "bert", None, 9338), "192.168.1.2")
        ears(network).hear(Query(HIGHEST, "cleo", MESH, 9338), "192.168.1.3")
        assert [one.name for one in network.waiting] == ["bert"]
        network.admit(LOWEST)
        assert ears(network).admitted == [LOWEST]


async def test_a_guest_asks_for_nothing(home: Home, machine: Machine) -> None:
    network = network_of(home)
    network.rest()
    assert not ears(network).is_seeking
