from __future__ import annotations

from dataclasses import replace

import pytest

from p2pmesh.config import Address
from p2pmesh.discovery.announcement import Announcement, Query
from p2pmesh.discovery.heard import (
    ADDRESSES_MAX,
    ANNOUNCE_INTERVAL_S,
    ANNOUNCEMENTS_MAX,
    HEARD_FOR_S,
    PER_HOST_MAX,
    QUERIES_MAX,
    QUERY_INTERVAL_S,
    WAITING_FOR_S,
    Heard,
)
from p2pmesh.identity.keys import MeshId, NodeId

FOUNDED = 1_800_000_000
HOME = MeshId(b"home".ljust(16))


def said(node: str = "pc", mesh: MeshId = HOME, **changes: object) -> Announcement:
    one = Announcement(NodeId(node.encode().ljust(16)), mesh, "home", FOUNDED, True, 9338, 2)
    return replace(one, **changes)  # type: ignore[arg-type]


def asked(node: str, mesh: MeshId | None = None) -> Query:
    return Query(NodeId(node.encode().ljust(16)), node, mesh, 9338)


def junk(n: int) -> Announcement:
    return said(f"junk{n}", MeshId(n.to_bytes(16, "big")), mesh_name=f"junk {n}", founded_at=n)


def test_a_mesh_is_heard_with_its_addresses() -> None:
    heard = Heard()
    assert heard.announced(said("pc"), "10.0.0.2", 0)
    assert heard.announced(said("laptop"), "fe80::1%eth0", 1)
    (mesh,) = heard.meshes(1)
    assert (mesh.id, mesh.name, mesh.founded_at, mesh.open) == (HOME, "home", FOUNDED, True)
    assert heard.addresses(HOME, 1) == [Address("10.0.0.2", 9338), Address("fe80::1%eth0", 9338)]
    assert heard.addresses(MeshId(b"?" * 16), 1) == []


def test_only_what_changes_is_news() -> None:
    heard = Heard()
    assert heard.announced(said(), "10.0.0.2", 0)
    assert not heard.announced(said(), "10.0.0.2", 2)
    assert heard.announced(said(mesh_name="casa"), "10.0.0.2", 4)
    assert [mesh.name for mesh in heard.meshes(4)] == ["casa"]
    assert heard.announced(said(mesh_name="casa"), "10.0.0.2", 100), "it was gone in between"


def test_a_mesh_that_falls_silent_is_forgotten_after_three_missed_announcements() -> None:
    heard = Heard()
    heard.announced(said(), "10.0.0.2", 0)
    assert heard.meshes(3 * ANNOUNCE_INTERVAL_S)
    assert not heard.meshes(HEARD_FOR_S + 0.01)
    assert not heard.addresses(HOME, HEARD_FOR_S + 0.01)


def test_waiting_nodes_are_shown_once_and_not_for_ever() -> None:
    heard = Heard()
    assert heard.queried(asked("tablet"), "10.0.0.7", 0)
    assert heard.queried(asked("tablet"), "fe80::7%eth0", 0.1)
    heard.queried(asked("settler", HOME), "10.0.0.8", 0.2)
    tablet, settler = heard.waiting(1)
    assert (tablet.name, tablet.address) == ("tablet", Address("10.0.0.7", 9338))
    assert (settler.name, settler.mesh) == ("settler", HOME)
    assert heard.newcomers(1) == [tablet.node]
    assert heard.waiting(3 * QUERY_INTERVAL_S)
    assert not heard.waiting(WAITING_FOR_S + 1)


def test_a_private_mesh_that_speaks_to_this_node_is_not_open() -> None:
    heard = Heard()
    heard.announced(said("pc", open=False), "10.0.0.2", 0)
    assert [mesh.open for mesh in heard.meshes(0)] == [False]
    heard.announced(said("laptop"), "10.0.0.3", 0)
    assert [mesh.open for mesh in heard.meshes(0)] == [True]


@pytest.mark.parametrize("hosts", [1, 3, pytest.param(200, marks=pytest.mark.full), 10_000])
def test_a_flood_pushes_out_no_mesh_that_is_heard_regularly(hosts: int) -> None:
    heard = Heard()
    heard.announced(said(), "10.0.0.2", -ANNOUNCE_INTERVAL_S)
    for second in range(10):
        heard.announced(said(), "10.0.0.2", second * ANNOUNCE_INTERVAL_S)
        for n in range(1000):
            number = second * 1000 + n
            now = second * ANNOUNCE_INTERVAL_S + n / 1000
            heard.announced(junk(number), f"10.1.{number % hosts}", now)
            heard.queried(asked(f"junk{number}"), f"10.1.{number % hosts}", now)
        meshes = heard.meshes(second * ANNOUNCE_INTERVAL_S + 1)
        assert len(meshes) <= min(ANNOUNCEMENTS_MAX, hosts * PER_HOST_MAX + 1)
        assert HOME in [mesh.id for mesh in meshes]
        assert len(heard.waiting(second * ANNOUNCE_INTERVAL_S + 1)) <= QUERIES_MAX


def test_a_flood_that_is_repeated_keeps_no_new_mesh_out() -> None:
    """Eight liars that each hold all they may have less room once an honest host speaks."""
    heard = Heard()
    for now in (0.0, 2.0, 4.0):
        for n in range(ANNOUNCEMENTS_MAX):
            heard.announced(junk(n), f"10.1.{n % (ANNOUNCEMENTS_MAX // PER_HOST_MAX)}", now)
    heard.announced(said(), "10.0.0.2", 4.5)
    for n in range(5000):
        heard.announced(junk(n), f"10.1.{n % (ANNOUNCEMENTS_MAX // PER_HOST_MAX)}", 5.0)
    assert HOME in [mesh.id for mesh in heard.meshes(5.0)]
    assert len(heard.meshes(5.0)) <= ANNOUNCEMENTS_MAX


def test_false_addresses_of_a_mesh_stand_behind_those_known_for_longer() -> None:
    heard = Heard()
    for now in (0.0, 2.0, 4.0):
        heard.announced(said(), "10.0.0.2", now)
        for n in range(100):
            fake = said(f"fake{n}", mesh_name="evil", founded_at=FOUNDED - 1)
            heard.announced(fake, f"10.1.{n}", now)
    addresses = heard.addresses(HOME, 4.0)
    assert addresses[0] == Address("10.0.0.2", 9338)
    assert len(addresses) == ADDRESSES_MAX
    assert [mesh.name for mesh in heard.meshes(4.0)] == ["home"]


def test_many_nodes_on_one_machine_are_heard() -> None:
    heard = Heard()
    for n in range(PER_HOST_MAX):
        heard.announced(said(f"n{n}", port=9000 + n), "10.0.0.2", 0)
    assert len(heard.addresses(HOME, 0)) == PER_HOST_MAX


def test_what_was_heard_elsewhere_is_forgotten() -> None:
    heard = Heard()
    heard.announced(said(), "10.0.0.2", 0)
    heard.queried(asked("tablet"), "10.0.0.7", 0)
    heard.forget()
    assert heard.meshes(0) == []
    assert heard.waiting(0) == []
    assert not heard.is_known("10.0.0.2")
    assert heard.announced(said(), "10.0.0.2", 0)
    assert heard.is_known("10.0.0.2")
