from __future__ import annotations

import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from p2pmesh.config import Address
from p2pmesh.errors import LinkError, LocalError, PeerError
from p2pmesh.gossip.events import Health
from p2pmesh.gossip.membership import Gossip
from p2pmesh.home import Home
from p2pmesh.identity.hello import LocalIdentity, Peer, RefusedError
from p2pmesh.identity.keys import MeshId, NodeId, SigningKey
from p2pmesh.node.joining import JOIN_RETRY_S, JOIN_WAIT_S, choose_mesh, what_answers
from p2pmesh.node.keystore import MeshInfo, load_mesh, save_mesh
from p2pmesh.node.mesh import Mesh
from p2pmesh.transport.tls import TlsTransport

ANNA, BERT = Address("192.168.1.5", 9338), Address("kitchen-pc", 9338)
EARLIER = MeshInfo(id=MeshId(b"e" * 16), name="early-otter")
THERE = MeshInfo(id=MeshId(b"t" * 16), name="tidal-heron")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home.at(tmp_path)
    home.create()
    return home


def peer(mesh: MeshInfo = THERE, *, clock_ahead_s: int = 0) -> Peer:
    return Peer(
        node=NodeId(b"p" * 16),
        public=b"k" * 32,
        instance=1,
        mesh=mesh.id,
        mesh_name=mesh.name,
        purpose="gossip",
        clock_ahead_s=clock_ahead_s,
        version=1,
    )


class Network:
    """Who answers where, and who was asked when."""

    def __init__(self, **_: object) -> None:
        self.answers: dict[Address, Callable[[], Peer]] = {}
        self.asked: list[tuple[float, Address]] = []
        self._started = trio.current_time()

    async def introduce(self, address: Address) -> Peer:
        self.asked.append((trio.current_time() - self._started, address))
        await trio.lowlevel.checkpoint()
        if address not in self.answers:
            raise LinkError(f"nobody answers at {address}: nothing listens there")
        return self.answers[address]()


def unsaid(sentence: str) -> None:
    raise AssertionError(sentence)


async def nothing_known(address: Address) -> str:
    await trio.lowlevel.checkpoint()
    return ""


def no_node() -> Peer:
    raise PeerError(f"{BERT} does not speak TLS 1.3")


async def test_the_first_start_founds_a_mesh_and_asks_nobody(
    home: Home, autojump_clock: MockClock
) -> None:
    network = Network()
    card = await choose_mesh(home, (), network.introduce, unsaid, nothing_known)
    assert load_mesh(home) == card
    assert home.mesh_key.exists()
    assert network.asked == []


async def test_the_next_start_goes_back_to_the_same_mesh(
    home: Home, autojump_clock: MockClock
) -> None:
    first = await choose_mesh(home, (), Network().introduce, unsaid, nothing_known)
    assert await choose_mesh(home, (), Network().introduce, unsaid, nothing_known) == first


async def test_joining_takes_the_mesh_of_whoever_answers_and_remembers_it(
    home: Home, autojump_clock: MockClock
) -> None:
    network = Network()
    network.answers[ANNA] = peer
    assert await choose_mesh(home, (ANNA,), network.introduce, unsaid, nothing_known) == THERE
    assert load_mesh(home) == THERE
    assert not home.mesh_key.exists()


async def test_joining_leaves_an_earlier_mesh(home: Home, autojump_clock: MockClock) -> None:
    save_mesh(home, EARLIER)
    network = Network()
    network.answers[ANNA] = peer
    assert await choose_mesh(home, (ANNA,), network.introduce, unsaid, nothing_known) == THERE
    assert load_mesh(home) == THERE


async def test_any_one_that_answers_will_do(home: Home, autojump_clock: MockClock) -> None:
    network = Network()
    network.answers[BERT] = peer
    assert await choose_mesh(home, (ANNA, BERT), network.introduce, unsaid, nothing_known) == THERE
    assert [address for _, address in network.asked] == [ANNA, BERT]
    assert autojump_clock.current_time() == network.asked[0][0]


async def test_a_node_that_starts_at_the_same_moment_is_waited_for(
    home: Home, autojump_clock: MockClock
) -> None:
    network = Network()

    async def start_late() -> None:
        await trio.sleep(3.1)
        network.answers[ANNA] = peer

    async with trio.open_nursery() as nursery:
        nursery.start_soon(start_late)
        assert await choose_mesh(home, (ANNA,), network.introduce, unsaid, nothing_known) == THERE
    assert network.asked[-1][0] == pytest.approx(3.25)


async def test_when_nobody_answers_the_sentence_names_each_reason(
    home: Home, autojump_clock: MockClock
) -> None:
    network = Network()
    network.answers[BERT] = no_node
    with pytest.raises(LocalError) as caught:
        await choose_mesh(home, (ANNA, BERT), network.introduce, unsaid, nothing_known)
    assert str(caught.value) == (
        "Cannot join: nobody answers at 192.168.1.5:9338: nothing listens there; "
        "kitchen-pc:9338 does not speak TLS 1.3. "
        "Check the address, and that `p2pmesh up` runs there"
    )
    assert network.asked[-1][0] == pytest.approx(JOIN_WAIT_S)
    assert len(network.asked) == 2 * (int(JOIN_WAIT_S / JOIN_RETRY_S) + 1)
    assert load_mesh(home) is None


async def test_when_nobody_answers_an_earlier_mesh_is_waited_for(
    home: Home, autojump_clock: MockClock
) -> None:
    save_mesh(home, EARLIER)
    notes: list[str] = []
    assert (
        await choose_mesh(home, (ANNA,), Network().introduce, notes.append, nothing_known)
        == EARLIER
    )
    (note,) = notes
    assert note == (
        "Cannot join: nobody answers at 192.168.1.5:9338: nothing listens there. "
        "Check the address, and that `p2pmesh up` runs there. "
        "Going on in the mesh early-otter, as before"
    )


async def test_what_is_no_peer_port_is_not_waited_for(
    home: Home, autojump_clock: MockClock
) -> None:
    network = Network()
    network.answers[BERT] = no_node
    identified: list[Address] = []

    async def identify(address: Address) -> str:
        identified.append(address)
        await trio.lowlevel.checkpoint()
        return f"{address} is a web server" if address == BERT else ""

    with pytest.raises(LocalError, match="Cannot join: kitchen-pc:9338 is a web server"):
        await choose_mesh(home, (BERT,), network.introduce, unsaid, identify)
    assert [when for when, _ in network.asked] == [0]
    with pytest.raises(LocalError, match="nothing listens there; kitchen-pc:9338 is a web server"):
        await choose_mesh(home, (ANNA, BERT), network.introduce, unsaid, identify)
    assert [address for _, address in network.asked].count(BERT) == 2
    assert identified == [BERT, ANNA, BERT]


async def test_a_refusal_is_not_waited_for(home: Home, autojump_clock: MockClock) -> None:
    def refuse() -> Peer:
        raise RefusedError("that address is this node's own")

    network = Network()
    network.answers[ANNA] = refuse
    with pytest.raises(LocalError, match=r"192\.168\.1\.5:9338: that address is this node's own"):
        await choose_mesh(home, (ANNA,), network.introduce, unsaid, nothing_known)
    assert len(network.asked) == 1


MODELS = b'HTTP/1.1 200 OK\r\n\r\n{"data": [{"owned_by": "p2pmesh"}]}'


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (MODELS, " is the API of a node and no peer port; that of a node is 9338 unless"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", " is a web server and no peer port; that of a node"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "another program answers at "),
        (b"\x15\x03\x01\x00\x02\x02\x46", ""),  # an alert of TLS
        (b"", ""),
    ],
    ids=["api", "web", "ssh", "tls", "hangs up"],
)
async def test_what_answers_is_told_from_a_peer_port(answer: bytes, said: str) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            asked = b""
            while b"\r\n\r\n" not in asked:
                asked += await stream.receive_some()
            await stream.send_all(answer)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        address = Address(*listeners[0].socket.getsockname())
        sentence = await what_answers(address)
        nursery.cancel_scope.cancel()
    assert said in sentence
    assert bool(said) is bool(sentence)
    assert (str(address) in sentence) is bool(said)


async def test_silence_and_nobody_are_not_known(autojump_clock: MockClock) -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = Address(*listeners[0].socket.getsockname())
    assert await what_answers(address) == ""  # it accepts, and says nothing
    await listeners[0].aclose()
    assert await what_answers(address) == ""


async def test_a_damaged_mesh_file_is_said_before_anybody_is_asked(
    home: Home, autojump_clock: MockClock
) -> None:
    home.mesh_file.write_text("junk", "utf-8")
    network = Network()
    network.answers[ANNA] = peer
    with pytest.raises(LocalError, match="is damaged"):
        await choose_mesh(home, (ANNA,), network.introduce, unsaid, nothing_known)
    assert network.asked == []


async def test_with_a_wrong_clock_nothing_is_joined(home: Home, autojump_clock: MockClock) -> None:
    network = Network()
    network.answers[ANNA] = lambda: peer(clock_ahead_s=3600)
    with pytest.raises(LocalError, match="This clock is 1 h 00 min behind the mesh"):
        await choose_mesh(home, (ANNA,), network.introduce, unsaid, nothing_known)
    assert load_mesh(home) is None
    assert len(network.asked) == 1, "waiting does not set a clock"


async def test_a_difference_that_others_named_do_not_see_is_none(
    home: Home, autojump_clock: MockClock
) -> None:
    network = Network()
    network.answers[ANNA] = lambda: peer(clock_ahead_s=3600)
    network.answers[BERT] = peer
    assert await choose_mesh(home, (ANNA, BERT), network.introduce, unsaid, nothing_known) == THERE
    assert [address for _, address in network.asked] == [ANNA, BERT]


async def test_one_that_nobody_else_named_can_confirm_counts(
    home: Home, autojump_clock: MockClock
) -> None:
    network = Network()
    network.answers[BERT] = lambda: peer(clock_ahead_s=3600)
    with pytest.raises(LocalError, match="This clock is 1 h 00 min behind the mesh"):
        await choose_mesh(home, (ANNA, BERT), network.introduce, unsaid, nothing_known)
    assert [address for _, address in network.asked] == [ANNA, BERT, ANNA]


class Resolver(trio.abc.HostnameResolver):
    """Resolves `kitchen-pc`, which moves from one address to the next."""

    def __init__(self, *hosts: str) -> None:
        self.left = list(hosts)

    async def getaddrinfo(
        self, host: bytes | None, port: object, *_: object, **__: object
    ) -> list[Any]:
        await trio.lowlevel.checkpoint()
        assert host == b"kitchen-pc"
        address = self.left.pop(0) if len(self.left) > 1 else self.left[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    async def getnameinfo(self, sockaddr: object, flags: int) -> tuple[str, str]:
        raise AssertionError("nobody asks for the name of an address")


@asynccontextmanager
async def meshes_at_names(*hosts: str) -> AsyncIterator[tuple[Mesh, Mesh, TlsTransport, Address]]:
    """One mesh that runs, one whose seed is its name, that one's transport, and the name.

    Args:
        hosts: The addresses that the name has, one after the other.
    """
    trio.socket.set_custom_hostname_resolver(Resolver(*hosts))
    async with AsyncExitStack() as stack:
        made: list[Mesh] = []
        seeds: tuple[Address, ...] = ()
        for number in (1, 2):
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            await stack.enter_async_context(listener)
            me = someone(number)
            transport = TlsTransport(partial(lambda me: me, me), [listener])
            core = Gossip(
                key=me.key, mesh=THERE.id, instance=1, epoch=int(time.time()), seeds=seeds
            )
            made.append(Mesh(core, transport, save_epoch=lambda _: None, clock=time.time))
            if not seeds:
                seeds = (Address("kitchen-pc", transport.address.port),)
        nursery = await stack.enter_async_context(trio.open_nursery())
        await nursery.start(made[0].run, {})
        yield made[0], made[1], transport, seeds[0]
        nursery.cancel_scope.cancel()


def someone(number: int) -> LocalIdentity:
    key = SigningKey(number.to_bytes(32, "big"))
    return LocalIdentity(key=key, instance=1, mesh=THERE.id, mesh_name=THERE.name)


@pytest.mark.skipif(sys.platform == "darwin", reason="has one loopback address")
async def test_a_name_is_resolved_again_for_each_try(home: Home) -> None:
    async with meshes_at_names("127.0.0.2", "127.0.0.2", "127.0.0.1") as (_, _, transport, name):
        with trio.fail_after(JOIN_WAIT_S):
            card = await choose_mesh(home, (name,), transport.introduce, unsaid, nothing_known)
    assert card == THERE


@pytest.mark.skipif(sys.platform == "darwin", reason="has one loopback address")
async def test_a_running_node_follows_the_name_that_it_joined_by() -> None:
    """Its seed moves while nobody is linked: a laptop that got another address."""
    hosts = ("127.0.0.2", "127.0.0.2", "127.0.0.1")
    async with (
        meshes_at_names(*hosts) as (there, here, _, _),
        trio.open_nursery() as nursery,
    ):
        await nursery.start(here.run, {})
        with trio.fail_after(20):
            while there.me not in here.linked:
                await here.changes.wait(here.changes.count)
        assert here.health(there.me) is Health.LIVE
        nursery.cancel_scope.cancel()
