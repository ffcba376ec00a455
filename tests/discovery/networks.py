"""This machine's loopback as a network, and what is said on it."""

from __future__ import annotations

import socket
from ipaddress import ip_interface

from p2pmesh.discovery.announcement import Announcement, Query
from p2pmesh.discovery.onlink import Interface
from p2pmesh.identity.keys import MeshId, NodeId

LOOPBACK = Interface("lo", 1, addresses=(ip_interface("127.0.0.1/8"),))
TO_ALL = "127.255.255.255"


def node_id(name: str) -> NodeId:
    return NodeId(name.encode().ljust(16, b"_"))


def announcement(node: str, *, mesh: str = "home", is_open: bool = True) -> Announcement:
    mesh_id = MeshId(mesh.encode().ljust(16, b"m"))
    return Announcement(node_id(node), mesh_id, mesh, 1_800_000_000, is_open, 9338, 2)


def query(node: str, mesh: MeshId | None = None) -> Query:
    return Query(node_id(node), node, mesh, 9338)


def free_port() -> int:
    """A port where nothing of this machine hears datagrams."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as trial:
        trial.bind(("", 0))
        return int(trial.getsockname()[1])


def talker() -> socket.socket:
    """A socket that says anything to everybody."""
    opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    opened.bind(("127.0.0.1", 0))
    opened.settimeout(5)
    return opened
