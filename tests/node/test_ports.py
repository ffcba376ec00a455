from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio

from p2pmesh.config import PORT_MAX, Address
from p2pmesh.errors import LocalError
from p2pmesh.node import ports
from p2pmesh.node.ports import Listening, listen

HOST = "127.0.0.1"


def has_ipv6() -> bool:
    """Whether this machine's kernel goes with it, not only its Python."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")


@asynccontextmanager
async def listening(wanted: Address, *, exact: bool) -> AsyncIterator[Listening]:
    found = await listen("api", wanted, exact=exact)
    yield found
    for listener in found.listeners:
        await listener.aclose()


def refusing(number: int, text: str) -> object:
    """A system that refuses; only privileges and other systems would show the real thing."""

    async def refuse(port: int, *, host: str) -> list[trio.SocketListener]:
        raise OSError(number, text)

    return refuse


async def test_port_0_takes_a_free_one_and_says_which() -> None:
    async with listening(Address(HOST, 0), exact=True) as found:
        assert found.address.port > 0
        async with await trio.open_tcp_stream(HOST, found.address.port) as stream:
            assert stream.socket.getpeername() == (HOST, found.address.port)


async def test_a_port_that_was_lent_stays_open() -> None:
    async def greet(stream: trio.SocketStream) -> None:
        await stream.send_all(b"hello")

    async with listening(Address(HOST, 0), exact=True) as found:
        for _ in range(2):
            async with trio.open_nursery() as nursery:
                # Also the one that comes before anybody accepts is answered.
                async with await trio.open_tcp_stream(HOST, found.address.port) as stream:
                    nursery.start_soon(trio.serve_listeners, greet, found.lend())
                    assert await stream.receive_some() == b"hello"
                nursery.cancel_scope.cancel()
        found.close()
        with pytest.raises(OSError, match="all attempts to connect"):
            await trio.open_tcp_stream(HOST, found.address.port)


async def test_a_taken_default_moves_on_to_a_free_port() -> None:
    async with (
        listening(Address(HOST, 0), exact=True) as first,
        listening(first.address, exact=False) as second,
        listening(first.address, exact=False) as third,
    ):
        assert second.address.host == HOST
        assert 0 < second.address.port - first.address.port <= ports.NEIGHBOURS_MAX
        assert third.address.port > second.address.port


async def test_a_free_default_is_taken_as_it_is() -> None:
    async with listening(Address(HOST, 0), exact=True) as found:
        free = found.address
    async with listening(free, exact=False) as found:
        assert found.address == free


async def test_a_taken_port_that_was_asked_for_is_an_error_in_words() -> None:
    async with listening(Address(HOST, 0), exact=True) as first:
        with pytest.raises(LocalError) as caught:
            await listen("api", first.address, exact=True)
    assert str(caught.value) == (
        f"Cannot listen on {first.address} (another program listens there); "
        "choose another with --api HOST:PORT"
    )


async def test_the_search_for_a_free_port_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    async def taken(port: int, *, host: str) -> list[trio.SocketListener]:
        tried.append(port)
        raise OSError(errno.EADDRINUSE, "Address already in use")

    monkeypatch.setattr(trio, "open_tcp_listeners", taken)
    with pytest.raises(LocalError, match="another program listens there"):
        await listen("api", Address(HOST, 9337), exact=False)
    assert tried == list(range(9337, 9337 + ports.NEIGHBOURS_MAX + 1))

    tried.clear()
    with pytest.raises(LocalError, match="another program listens there"):
        await listen("api", Address(HOST, PORT_MAX - 1), exact=False)
    assert tried == [PORT_MAX - 1, PORT_MAX]


async def test_an_address_of_another_machine_is_an_error_in_words() -> None:
    with pytest.raises(LocalError) as caught:
        await listen("peer", Address("192.0.2.1", 9338), exact=False)
    assert str(caught.value) == (
        "Cannot listen on 192.0.2.1:9338 (this machine does not have that address); "
        "choose another with --peer HOST:PORT"
    )


async def test_a_name_that_nobody_knows_is_an_error_in_words() -> None:
    with pytest.raises(LocalError) as caught:
        await listen("console", Address("no-such-host.invalid", 3131), exact=True)
    assert str(caught.value) == (
        "Cannot listen on no-such-host.invalid:3131 (that host name cannot be resolved); "
        "choose another with --console HOST:PORT"
    )


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
async def test_a_port_for_administrators_is_an_error_in_words(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(trio, "open_tcp_listeners", refusing(number, "Permission denied"))
    with pytest.raises(LocalError) as caught:
        await listen("api", Address(HOST, 80), exact=False)
    assert str(caught.value) == (
        f"Cannot listen on {HOST}:80 (the system allows that port to administrators only); "
        "choose another with --api HOST:PORT"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow every port, or none")
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may")
async def test_the_system_refuses_low_ports_in_those_words() -> None:
    with pytest.raises(LocalError, match=r"(administrators only|another program)"):
        await listen("api", Address(HOST, 1), exact=True)


async def test_any_other_reason_is_the_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    system = refusing(errno.EMFILE, "Too many open files")
    monkeypatch.setattr(trio, "open_tcp_listeners", system)
    with pytest.raises(LocalError, match=r"\(Too many open files\)"):
        await listen("api", Address(HOST, 0), exact=True)


@needs_ipv6
async def test_both_families_have_one_port() -> None:
    async with listening(Address("::", 0), exact=True) as found:
        port = found.address.port
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            assert stream.socket.getpeername() == ("127.0.0.1", port)
        assert found.address == Address("::", port)
        async with await trio.open_tcp_stream("::1", port) as stream:
            assert stream.socket.getpeername()[:2] == ("::1", port)


@needs_ipv6
async def test_a_port_that_one_family_has_taken_is_not_half_taken() -> None:
    for host in ("127.0.0.1", "::1"):
        async with listening(Address(host, 0), exact=True) as other:
            port = other.address.port
            with pytest.raises(LocalError, match="another program listens there"):
                await listen("peer", Address("::", port), exact=True)
            async with listening(Address("::", port), exact=False) as found:
                assert 0 < found.address.port - port <= ports.NEIGHBOURS_MAX
                assert len(found.listeners) == 2
        async with listening(Address("::", port), exact=True) as found:
            assert found.address.port == port, "nothing of the first attempt is left"


@dataclass
class System:
    """Listens, except with the families that it lacks, and on ports that are taken."""

    real: Callable[..., Awaitable[list[trio.SocketListener]]]
    lacks: str = ""
    taken: int = 0
    reason: int = errno.EAFNOSUPPORT

    async def open(self, port: int, *, host: str) -> list[trio.SocketListener]:
        if host == self.lacks:
            raise OSError(self.reason, "no such family")
        if host == "::" and self.taken:
            self.taken -= 1
            raise OSError(errno.EADDRINUSE, "Address already in use")
        return await self.real(port, host=host)


@needs_ipv6
@pytest.mark.parametrize("reason", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
@pytest.mark.parametrize(("lacks", "left"), [("::", "0.0.0.0"), ("0.0.0.0", "::")])
async def test_a_machine_without_one_family_listens_on_the_other(
    monkeypatch: pytest.MonkeyPatch, lacks: str, left: str, reason: int
) -> None:
    system = System(trio.open_tcp_listeners, lacks=lacks, reason=reason)
    monkeypatch.setattr(trio, "open_tcp_listeners", system.open)
    async with listening(Address("::", 0), exact=True) as found:
        assert len(found.listeners) == 1
        assert found.address.host == left


@needs_ipv6
async def test_a_free_port_is_one_that_is_free_in_both(monkeypatch: pytest.MonkeyPatch) -> None:
    system = System(trio.open_tcp_listeners, taken=3)
    monkeypatch.setattr(trio, "open_tcp_listeners", system.open)
    async with listening(Address("::", 0), exact=True) as found:
        assert len(found.listeners) == 2
    system.taken = 2 * ports.FREE_TRIES
    with pytest.raises(LocalError, match="another program listens there"):
        await listen("peer", Address("::", 0), exact=True)
    assert system.taken == ports.FREE_TRIES


@needs_ipv6
async def test_one_address_of_ipv6_is_listened_on_alone() -> None:
    async with listening(Address("::1", 0), exact=True) as found:
        assert found.address.host == "::1"
        assert str(found.address) == f"[::1]:{found.address.port}"
        assert len(found.listeners) == 1
