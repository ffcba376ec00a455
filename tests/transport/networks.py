"""Both transports, each as a way to make nodes that can reach each other."""

from __future__ import annotations

import trio

from p2pmesh.config import Address
from p2pmesh.identity.credentials import Role
from p2pmesh.identity.hello import LocalIdentity
from p2pmesh.identity.keys import MeshId, SigningKey
from p2pmesh.transport.base import Transport
from p2pmesh.transport.memory import MemoryNetwork, MemoryTransport
from p2pmesh.transport.tls import TlsTransport
from tests.identity import builders

MESH = builders.MESH


def someone(
    number: int,
    *,
    mesh: MeshId | None = MESH,
    instance: int = 1,
    role: Role = Role.SERVE,
) -> LocalIdentity:
    key = SigningKey(number.to_bytes(32, "big"))
    return LocalIdentity(
        key=key,
        instance=instance,
        mesh=mesh,
        mesh_name="home",
        credential=builders.credential(key, role).raw if mesh == MESH else b"",
    )


class MemoryNodes:
    def __init__(self) -> None:
        self.network = MemoryNetwork()
        self._port = 0

    async def add(self, me: LocalIdentity) -> Transport:
        self._port += 1
        return MemoryTransport(lambda: me, self.network, Address("memory", self._port))

    async def aclose(self) -> None:
        assert not self.network.listening


class TlsNodes:
    def __init__(self) -> None:
        self._listeners: list[trio.SocketListener] = []

    async def add(self, me: LocalIdentity) -> Transport:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self._listeners += listeners
        return TlsTransport(lambda: me, listeners)

    async def aclose(self) -> None:
        for listener in self._listeners:
            await listener.aclose()


Nodes = MemoryNodes | TlsNodes
