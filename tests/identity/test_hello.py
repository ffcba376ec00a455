from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.errors import PeerError
from p2pmesh.identity.hello import ClientHello, Peer, RefusedError, Self, ServerHello, refusal
from p2pmesh.identity.keys import MeshId, NodeId, SigningKey
from p2pmesh.wire.codec import decode, encode

MESH = MeshId(b"m" * 16)
CERTIFICATE = b"certificate"
ANNA = Self(key=SigningKey(b"a" * 32), instance=1, mesh=MESH, mesh_name="home")
BERT = Self(key=SigningKey(b"b" * 32), instance=2, mesh=MESH, mesh_name="home")


def client(
    me: Self = ANNA, *, expected: bytes | None = None, certificate: bytes = CERTIFICATE
) -> ClientHello:
    return ClientHello(
        me,
        purpose="gossip",
        expected=None if expected is None else NodeId(expected),
        certificate=certificate,
        nonce=b"c" * 32,
        now=1000.0,
    )


def server(me: Self = BERT) -> ServerHello:
    return ServerHello(me, certificate=CERTIFICATE, nonce=b"s" * 32, now=1007.0)


def shake(one: ClientHello, other: ServerHello) -> tuple[Peer, Peer]:
    verdict, caller = other.verdict(one.proof(other.challenge(one.start())))
    return one.finish(verdict), caller


def test_both_learn_who_the_other_is() -> None:
    answered, caller = shake(client(), server())
    assert (answered.node, answered.instance, answered.purpose) == (BERT.key.id, 2, "gossip")
    assert (caller.node, caller.instance, caller.purpose) == (ANNA.key.id, 1, "gossip")
    assert answered.clock_ahead_s == 7
    assert caller.clock_ahead_s == -7


def test_a_node_without_a_mesh_learns_the_servers() -> None:
    answered, caller = shake(client(dataclasses.replace(ANNA, mesh=None)), server())
    assert answered.mesh == caller.mesh == MESH
    assert answered.mesh_name == "home"


def test_a_man_in_the_middle_with_his_own_certificate_is_noticed() -> None:
    with pytest.raises(PeerError, match="did not prove"):
        shake(client(certificate=b"another"), server())


def test_a_recorded_conversation_cannot_be_replayed() -> None:
    caller, host = client(), server()
    proof = caller.proof(host.challenge(caller.start()))
    later = ServerHello(BERT, certificate=CERTIFICATE, nonce=b"t" * 32, now=1010.0)
    later.challenge(caller.start())
    with pytest.raises(PeerError, match="did not prove"):
        later.verdict(proof)


@pytest.mark.parametrize(
    ("one", "other", "sentence"),
    [
        (client(expected=b"x" * 16), server(), "another node answered"),
        (client(dataclasses.replace(ANNA, mesh=MeshId(b"n" * 16))), server(), "another mesh"),
        (client(BERT), server(), "own"),
    ],
)
def test_who_does_not_belong_together_is_told(
    one: ClientHello, other: ServerHello, sentence: str
) -> None:
    with pytest.raises(RefusedError, match=sentence):
        shake(one, other)


def test_a_refusal_reaches_the_caller_in_words() -> None:
    with pytest.raises(RefusedError, match="no room"):
        client().proof(refusal("no room"))


def test_another_protocol_version_is_refused() -> None:
    start = decode(client().start(), bytes_max=4096)
    with pytest.raises(RefusedError, match="version"):
        server().challenge(encode({**start, "v": [99]}))


def test_unknown_fields_are_left_alone_but_covered_by_the_proof() -> None:
    start = decode(client().start(), bytes_max=4096)
    host = server()
    challenge = host.challenge(encode({**start, "later": 1}))
    with pytest.raises(PeerError, match="did not prove"):
        client().proof(challenge)


@given(st.binary(max_size=200))
def test_junk_is_a_peers_fault_and_nothing_else(junk: bytes) -> None:
    host = server()
    host.challenge(client().start())
    for step in (server().challenge, client().proof, host.verdict):
        with pytest.raises(PeerError):
            step(junk)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_no_bit_of_the_challenge_can_be_changed(position: int, change: int) -> None:
    caller = client()
    challenge = bytearray(server().challenge(caller.start()))
    challenge[position % len(challenge)] ^= change
    with pytest.raises(PeerError):
        caller.proof(bytes(challenge))
