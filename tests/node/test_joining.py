"""How a node gets into a mesh: real members on a network in memory, files on disk."""

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
from p2pmesh.identity.credentials import Role, found
from p2pmesh.identity.hello import JOIN, LocalIdentity, Peer, Purpose, RefusedError
from p2pmesh.identity.keys import MeshId, NodeId, SigningKey
from p2pmesh.identity.tokens import Token
from p2pmesh.node import joining as module
from p2pmesh.node.joining import (
    JOIN_RETRY_S,
    JOIN_WAIT_S,
    Door,
    Entry,
    Joiner,
    what_answers,
)
from p2pmesh.node.keystore import (
    MeshInfo,
    load_book,
    load_mesh,
    load_statements,
    load_used,
    save_book,
    save_mesh,
    save_statements,
    save_used,
)
from p2pmesh.node.mesh import Mesh
from p2pmesh.transport.base import Asked
from p2pmesh.transport.handshake import send_frame
from p2pmesh.transport.tls import TlsTransport
from p2pmesh.wire.codec import encode
from p2pmesh.wire.statements import Policy, Revocation, state
from tests.identity.builders import FOUNDER, FOUNDERS, MESH, credential
from tests.node.cards import card_of, founded
from tests.node.members import NAME, key_of, members, policy
from tests.node.meshes import clock
from tests.state.builders import NODES, NOW

ANNA, BERT = Address("192.168.1.5", 9338), Address("kitchen-pc", 9338)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home.at(tmp_path / "new")
    home.create()
    return home


def unsaid(sentence: str) -> None:
    raise AssertionError(sentence)


async def nothing_known(address: Address) -> str:
    await trio.lowlevel.checkpoint()
    return ""


def someone(number: int, mesh: MeshId | None = None) -> LocalIdentity:
    key = key_of(number)
    own = credential(key).raw if mesh else b""
    return LocalIdentity(key=key, instance=1, mesh=mesh, mesh_name=NAME, credential=own)


def own_in(card: MeshInfo) -> tuple[bytes, str]:
    return card.id, card.name


# By invitation, from real members


async def test_an_invitation_leads_into_its_mesh(tmp_path: Path, home: Home) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        joiner = made.joiner("new", 1)
        entry = await joiner.by_name([founder.invite(uses=1)], unsaid)
    assert own_in(entry.card) == (MESH, NAME)
    assert entry.card.credential.node == key_of(1).id
    assert entry.card.credential.last.basis == "invite"
    assert (entry.seeds, entry.is_new) == ((founder.address,), False)
    assert load_mesh(home) == entry.card
    assert load_statements(home, MESH) == (policy(),)


async def test_a_member_needs_its_invitation_no_more(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        joiner, token = made.joiner("new", 1), founder.invite(uses=1)
        first = await joiner.by_name([token], unsaid)
        again = await joiner.by_name([token], unsaid)
        founder.scope.cancel()
        alone = await joiner.by_name([token], unsaid)
    assert first.card == again.card == alone.card
    assert alone.seeds == (founder.address,)


async def test_of_several_invitations_one_that_leads_somewhere_will_do(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        spent = Token(mesh=MESH, seed=b"s" * 16, addresses=(founder.address,))
        entry = await made.joiner("new", 1).by_name([spent, founder.invite()], unsaid)
    assert entry.card.id == MESH


async def test_a_refusal_is_said_at_once_and_leaves_nothing(
    tmp_path: Path, home: Home, autojump_clock: MockClock
) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        unknown = Token(mesh=MESH, seed=b"s" * 16, addresses=(founder.address,))
        began = trio.current_time()
        with pytest.raises(LocalError) as caught:
            await made.joiner("new", 1).by_name([unknown], unsaid)
        assert trio.current_time() - began < 1
    assert str(caught.value) == (
        f"Cannot join: {founder.address}: this invitation is not known here, or it was revoked"
    )
    assert files(home) == []


def files(home: Home) -> list[str]:
    return sorted(path.name for path in home.root.iterdir() if path.is_file())


async def test_an_invitation_to_another_mesh_than_that_of_who_answers(
    tmp_path: Path, home: Home
) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        other = Token(mesh=MeshId(b"x" * 16), seed=b"s" * 16, addresses=(founder.address,))
        with pytest.raises(LocalError, match="belongs to another mesh"):
            await made.joiner("new", 1).by_name([other], unsaid)
    assert files(home) == []


async def test_joining_another_mesh_forgets_all_of_the_earlier_one(
    tmp_path: Path, home: Home
) -> None:
    earlier = founded(key_of(1))
    save_mesh(home, earlier)
    save_book(home, earlier.id, {NODES[1]: (ANNA,)})
    save_used(home, {b"i" * 16: [NODES[1]]})
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        entry = await made.joiner("new", 1).by_name([founder.invite()], unsaid)
    assert load_mesh(home) == entry.card
    assert load_book(home, earlier.id) == {}
    assert load_used(home) == {}
    assert load_statements(home, MESH) == (policy(),)


async def test_who_was_revoked_comes_back_with_a_new_invitation(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        joiner = made.joiner("new", 1)
        first = await joiner.by_name([founder.invite()], unsaid)
        await trio.sleep(1)
        anna = await made.start("anna", key=key_of(1), own=first.card.credential, seeds=[founder])
        await founder.knows(anna)
        founder.authority.revoke("anna", below=False)
        await anna.ended.wait()
        assert "was revoked by founder" in anna.failure
        await trio.sleep(1.1)  # times are whole seconds
        again = await joiner.by_name([founder.invite()], unsaid)
    assert again.card.credential.last.issued_at > first.card.credential.last.issued_at


# Over the network


async def test_an_address_of_an_open_mesh_leads_into_it(tmp_path: Path, home: Home) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        entry = await made.joiner("new", 1).by_name([founder.address], unsaid)
    assert (entry.card.credential.last.basis, entry.is_new) == ("lan", True)
    assert entry.card.credential.role is Role.SERVE
    assert load_mesh(home) == entry.card


async def test_an_address_of_a_private_mesh_needs_an_invitation(tmp_path: Path, home: Home) -> None:
    async with members(tmp_path, is_open=False) as made:
        founder = await made.start("founder")
        with pytest.raises(LocalError, match="this mesh is private: ask a member"):
            await made.joiner("new", 1).by_name([founder.address], unsaid)
        (waiting,) = founder.admission.waiting
        assert (waiting.node, waiting.name) == (key_of(1).id, "new")
    assert files(home) == []


async def test_an_address_of_this_nodes_own_mesh_is_only_a_way_to_it(tmp_path: Path) -> None:
    async with members(tmp_path, is_open=False) as made:
        founder = await made.start("founder")
        joiner = made.joiner("new", 1)
        first = await joiner.by_name([founder.invite()], unsaid)
        again = await joiner.by_name([founder.address, ANNA], unsaid)
    assert again == Entry(card=first.card, seeds=(founder.address, ANNA))


async def test_a_mesh_that_is_heard_is_asked_once(
    tmp_path: Path, home: Home, autojump_clock: MockClock
) -> None:
    async with members(tmp_path) as made:
        began = trio.current_time()
        with pytest.raises(LocalError, match="Cannot join: nobody answers"):
            await made.joiner("new", 1).over_network(MESH, [ANNA])
        assert trio.current_time() == began
    assert files(home) == []


# What goes wrong on the way


class Network:
    """Who answers where, and who was asked when."""

    def __init__(self) -> None:
        self.answers: dict[Address, Callable[[], Peer]] = {}
        self.asked: list[tuple[float, Address]] = []
        self._started = trio.current_time()

    async def introduce(self, address: Address) -> Peer:
        self.asked.append((trio.current_time() - self._started, address))
        await trio.lowlevel.checkpoint()
        if address not in self.answers:
            raise LinkError(f"nobody answers at {address}: nothing listens there")
        return self.answers[address]()

    async def ask(self, address: Address, purpose: Purpose, me: LocalIdentity) -> Asked:
        await self.introduce(address)
        raise RefusedError("this node lets nobody in")

    def joiner(self, home: Home, identify: Callable[[Address], Any] = nothing_known) -> Joiner:
        door = Door(introduce=self.introduce, ask=self.ask, identify=identify)
        return Joiner(home, someone(1), "new", door, clock)


def peer(*, clock_ahead_s: int = 0) -> Peer:
    return Peer(
        node=NodeId(FOUNDER.id),
        public=FOUNDER.public,
        instance=1,
        mesh=MESH,
        mesh_name=NAME,
        purpose=JOIN,
        clock_ahead_s=clock_ahead_s,
        version=3,
        binding=b"b" * 32,
    )


def no_node() -> Peer:
    raise PeerError(f"{BERT} does not speak TLS 1.3")


def belong(home: Home) -> MeshInfo:
    """Make the node of `home` a member already."""
    card = card_of(credential(key_of(1)), NAME)
    save_mesh(home, card)
    return card


async def test_when_nobody_answers_the_sentence_names_each_reason(
    home: Home, autojump_clock: MockClock
) -> None:
    network = Network()
    network.answers[BERT] = no_node
    with pytest.raises(LocalError) as caught:
        await network.joiner(home).by_name([ANNA, BERT], unsaid)
    assert str(caught.value) == (
        "Cannot join: nobody answers at 192.168.1.5:9338: nothing listens there; "
        "kitchen-pc:9338 does not speak TLS 1.3. "
        "Check the address, and that `p2pmesh up` runs there"
    )
    assert network.asked[-1][0] == pytest.approx(JOIN_WAIT_S)
    assert len(network.asked) == 2 * (int(JOIN_WAIT_S / JOIN_RETRY_S) + 1)
    assert files(home) == []


async def test_when_nobody_answers_an_earlier_mesh_is_waited_for(
    home: Home, autojump_clock: MockClock
) -> None:
    earlier = belong(home)
    notes: list[str] = []
    entry = await Network().joiner(home).by_name([ANNA], notes.append)
    assert entry == Entry(card=earlier, seeds=(ANNA,))
    (note,) = notes
    assert note == (
        "Cannot join: nobody answers at 192.168.1.5:9338: nothing listens there. "
        "Check the address, and that `p2pmesh up` runs there. "
        "Going on in the mesh quiet-otter, as before"
    )


async def test_a_node_that_starts_at_the_same_moment_is_waited_for(
    home: Home, autojump_clock: MockClock
) -> None:
    network, earlier = Network(), belong(home)

    async def start_late() -> None:
        await trio.sleep(3.1)
        network.answers[ANNA] = peer

    async with trio.open_nursery() as nursery:
        nursery.start_soon(start_late)
        assert (await network.joiner(home).by_name([ANNA], unsaid)).card == earlier
    assert network.asked[-1][0] == pytest.approx(3.25)


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

    joiner = network.joiner(home, identify)
    with pytest.raises(LocalError, match="Cannot join: kitchen-pc:9338 is a web server"):
        await joiner.by_name([BERT], unsaid)
    assert [when for when, _ in network.asked] == [0]
    with pytest.raises(LocalError, match="nothing listens there; kitchen-pc:9338 is a web server"):
        await joiner.by_name([ANNA, BERT], unsaid)
    assert [address for _, address in network.asked].count(BERT) == 2
    assert identified == [BERT, ANNA, BERT]


async def test_a_refusal_is_not_waited_for(home: Home, autojump_clock: MockClock) -> None:
    network = Network()
    network.answers[ANNA] = peer
    with pytest.raises(LocalError, match=r"192\.168\.1\.5:9338: this node lets nobody in"):
        await network.joiner(home).by_name([ANNA], unsaid)
    assert [address for _, address in network.asked] == [ANNA, ANNA]


async def test_a_damaged_mesh_file_is_said_before_anybody_is_asked(
    home: Home, autojump_clock: MockClock
) -> None:
    home.mesh_file.write_text("junk", "utf-8")
    network = Network()
    with pytest.raises(LocalError, match="is damaged"):
        await network.joiner(home).by_name([ANNA], unsaid)
    assert network.asked == []


async def test_with_a_wrong_clock_nothing_is_joined(home: Home, autojump_clock: MockClock) -> None:
    network = Network()
    network.answers[ANNA] = lambda: peer(clock_ahead_s=3600)
    with pytest.raises(LocalError, match="This clock is 1 h 00 min behind the mesh"):
        await network.joiner(home).by_name([ANNA], unsaid)
    assert files(home) == []
    assert len(network.asked) == 1, "waiting does not set a clock"


async def test_a_difference_that_others_named_do_not_see_is_none(
    home: Home, autojump_clock: MockClock
) -> None:
    network, earlier = Network(), belong(home)
    network.answers[ANNA] = lambda: peer(clock_ahead_s=3600)
    network.answers[BERT] = peer
    assert (await network.joiner(home).by_name([ANNA, BERT], unsaid)).card == earlier
    assert [address for _, address in network.asked] == [ANNA, BERT]


async def test_one_that_nobody_else_named_can_confirm_counts(
    home: Home, autojump_clock: MockClock
) -> None:
    network = Network()
    network.answers[BERT] = lambda: peer(clock_ahead_s=3600)
    with pytest.raises(LocalError, match="This clock is 1 h 00 min behind the mesh"):
        await network.joiner(home).by_name([ANNA, BERT], unsaid)
    assert [address for _, address in network.asked] == [ANNA, BERT, ANNA]


# What a member answers that is no member, or lies


def answering(home: Home, answer: bytes) -> Joiner:
    """A node to which whoever it asks answers that."""

    async def ask(address: Address, purpose: Purpose, me: LocalIdentity) -> Asked:
        ours, theirs = trio.testing.memory_stream_pair()
        await send_frame(theirs, answer)
        return Asked(ours, peer())

    async def introduce(address: Address) -> Peer:
        await trio.lowlevel.checkpoint()
        return peer()

    door = Door(introduce=introduce, ask=ask, identify=nothing_known)
    return Joiner(home, someone(1), "new", door, clock)


OTHER_MESH = SigningKey(b"o" * 32)
WRONG_POLICY = state(
    OTHER_MESH,
    None,
    Policy(number=1, open=True, name="x", founded_at=NOW),
    mesh=MeshId(OTHER_MESH.id),
    now=NOW,
)


def flipped(raw: bytes, at: int = 5) -> bytes:
    changed = bytearray(raw)
    changed[at] ^= 1
    return bytes(changed)


def yes(own: bytes, rules: bytes = b"") -> bytes:
    return encode({"c": own, "p": rules, "a": []})


GOOD = credential(key_of(1))
UNSIGNED = GOOD.raw.replace(GOOD.last.raw, flipped(GOOD.last.raw))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"", "."),
        (b"\xc1", "."),
        (encode([]), "."),
        (yes(b""), "."),
        (yes(GOOD.raw[:-1]), "."),
        (yes(UNSIGNED), "a credential with a wrong signature"),
        (yes(credential(key_of(2)).raw), "a credential that is not for this node"),
        (yes(found(OTHER_MESH, key_of(1).public, NOW).raw), "that is not for this node"),
        (yes(GOOD.raw, b"junk"), "."),
        (yes(GOOD.raw, WRONG_POLICY.raw), "rules of a mesh that are not signed by it"),
        (yes(GOOD.raw, flipped(policy().raw)), "rules of a mesh that are not signed by it"),
    ],
)
async def test_a_wrong_answer_makes_nobody_a_member(
    home: Home, monkeypatch: pytest.MonkeyPatch, answer: bytes, says: str
) -> None:
    monkeypatch.setattr(module, "JOIN_WAIT_S", 0.0)
    token = Token(mesh=MESH, seed=b"s" * 16, addresses=(ANNA,))
    for ways in ([token], [ANNA]):
        with pytest.raises(LocalError, match=f"^Cannot join: .*{says}"):
            await answering(home, answer).by_name(ways, unsaid)
        assert files(home) == []


async def test_a_right_answer_makes_a_member(home: Home) -> None:
    token = Token(mesh=MESH, seed=b"s" * 16, addresses=(ANNA,))
    entry = await answering(home, yes(GOOD.raw)).by_name([token], unsaid)
    assert entry.card.credential == GOOD
    assert entry.card.name == NAME


async def test_a_full_disk_makes_nobody_a_member(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise LocalError("Cannot write mesh.json (no space left on device)")

    monkeypatch.setattr(module, "save_mesh", fail)
    token = Token(mesh=MESH, seed=b"s" * 16, addresses=(ANNA,))
    with pytest.raises(LocalError, match=r"Cannot write mesh\.json"):
        await answering(home, yes(GOOD.raw)).by_name([token], unsaid)
    assert load_mesh(home) is None


# The mesh of the last start


async def test_the_last_mesh_is_that_of_this_key(home: Home) -> None:
    joiner = answering(home, b"")
    assert joiner.earlier() is None
    save_mesh(home, card_of(credential(key_of(2)), NAME))
    assert joiner.earlier() is None, "the key was replaced"
    card = belong(home)
    assert joiner.earlier() == card


async def test_a_membership_is_usable_until_it_ends(home: Home) -> None:
    joiner = answering(home, b"")
    assert joiner.is_usable(belong(home))
    over = credential(key_of(1), now=NOW - 100, ttl_s=100)
    assert not joiner.is_usable(card_of(over))
    target = Revocation(target=key_of(1).id, keeps=frozenset())
    revoked = state(FOUNDER, FOUNDERS, target, mesh=MESH, now=NOW)
    save_statements(home, MESH, [policy(), revoked])
    assert not joiner.is_usable(belong(home))


# What answers, if it is no peer port


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
            me = someone(number, MESH)
            transport = TlsTransport(partial(lambda me: me, me), [listener])
            core = Gossip(key=me.key, mesh=MESH, instance=1, epoch=int(time.time()), seeds=seeds)
            made.append(Mesh(core, transport, save_epoch=lambda _: None, clock=time.time))
            if not seeds:
                seeds = (Address("kitchen-pc", transport.address.port),)
        nursery = await stack.enter_async_context(trio.open_nursery())
        await nursery.start(made[0].run, {})
        yield made[0], made[1], transport, seeds[0]
        nursery.cancel_scope.cancel()


@pytest.mark.skipif(sys.platform == "darwin", reason="has one loopback address")
async def test_a_name_is_resolved_again_for_each_try(home: Home) -> None:
    card = belong(home)
    async with meshes_at_names("127.0.0.2", "127.0.0.2", "127.0.0.1") as (_, _, transport, name):
        door = Door(introduce=transport.introduce, ask=transport.ask, identify=nothing_known)
        joiner = Joiner(home, someone(1), "new", door, time.time)
        with trio.fail_after(JOIN_WAIT_S):
            entry = await joiner.by_name([name], unsaid)
    assert entry == Entry(card=card, seeds=(name,))


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
