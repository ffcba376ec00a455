from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.errors import PeerError
from p2pmesh.identity.credentials import Role
from p2pmesh.identity.hello import (
    GOSSIP,
    HELLO_BYTES_MAX,
    HTTP,
    PURPOSE_CHARS_MAX,
    VERSIONS,
    VERSIONS_MAX,
    ClientHello,
    LocalIdentity,
    Needs,
    Peer,
    RefusedError,
    ServerHello,
    _transcript,
    refusal,
)
from p2pmesh.identity.keys import MeshId, NodeId, SigningKey
from p2pmesh.wire.codec import decode, encode
from tests.identity.builders import MESH, credential

CERTIFICATE = b"certificate"
PURPOSES = {GOSSIP: Needs(Role.SERVE), HTTP: Needs(Role.USE)}


def somebody(letter: bytes, instance: int) -> LocalIdentity:
    key = SigningKey(letter * 32)
    shown = credential(key).raw
    return LocalIdentity(key=key, instance=instance, mesh=MESH, mesh_name="home", credential=shown)


ANNA, BERT = somebody(b"a", 1), somebody(b"b", 2)


def client(
    me: LocalIdentity = ANNA,
    *,
    expected: bytes | None = None,
    certificate: bytes = CERTIFICATE,
    purpose: str = GOSSIP,
) -> ClientHello:
    return ClientHello(
        me,
        purpose=purpose,
        expected=None if expected is None else NodeId(expected),
        certificate=certificate,
        nonce=b"c" * 32,
        now=1000.0,
    )


def server(me: LocalIdentity = BERT) -> ServerHello:
    return ServerHello(me, purposes=PURPOSES, certificate=CERTIFICATE, nonce=b"s" * 32, now=1007.0)


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
    later = ServerHello(
        BERT, purposes=PURPOSES, certificate=CERTIFICATE, nonce=b"t" * 32, now=1010.0
    )
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


@pytest.mark.parametrize("purpose", ["rpc", "stream", "GOSSIP", "", "\x1b[31m"])
def test_a_purpose_without_a_handler_is_refused_by_name(purpose: str) -> None:
    with pytest.raises(RefusedError) as refused:
        server().challenge(client(purpose=purpose).start())
    assert str(refused.value) == f"this node does not offer {purpose!r}"


def test_a_purpose_that_is_no_word_is_refused() -> None:
    assert shake(client(purpose=HTTP), server())[1].purpose == HTTP
    with pytest.raises(PeerError, match=f"'for' is longer than {PURPOSE_CHARS_MAX}"):
        server().challenge(client(purpose="x" * (PURPOSE_CHARS_MAX + 1)).start())


def test_a_refusal_reaches_the_caller_in_words() -> None:
    with pytest.raises(RefusedError, match="no room"):
        client().proof(refusal(RefusedError("no room")))


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("\x1b[2J\x1b]0;pwned\x07 no entry\n", "[2J ]0;pwned  no entry"),
        ("gpj.\u202eexe", "gpj. exe"),
        ("\x1b\r\n", "it did not say why"),
    ],
)
def test_a_refusal_steers_no_terminal(said: str, shown: str) -> None:
    with pytest.raises(RefusedError) as refused:
        client().proof(refusal(RefusedError(said)))
    assert str(refused.value) == f"the node there refused: {shown}"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("\x1b[31mred\x1b[0m\nheron", "[31mred [0m heron"),
        ("\u202egninrom", "gninrom"),
        ("x" * 256, "x" * 120),
        ("\x07\x1b", "unnamed"),
        ("", "unnamed"),
    ],
)
def test_the_name_of_a_mesh_steers_no_terminal(said: str, shown: str) -> None:
    answered, _ = shake(client(), server(dataclasses.replace(BERT, mesh_name=said)))
    assert answered.mesh_name == shown


@pytest.mark.parametrize("field", ["name", "no"])
def test_a_text_of_ten_kilobytes_is_refused(field: str) -> None:
    long = "x" * 10_000
    host = server(dataclasses.replace(BERT, mesh_name=long))
    caller = client()
    answer = host.challenge(caller.start()) if field == "name" else encode({"no": long})
    with pytest.raises(PeerError, match="at most"):
        caller.proof(answer)


def speaking(me: LocalIdentity, *versions: int) -> LocalIdentity:
    return dataclasses.replace(me, versions=versions)


@pytest.mark.parametrize(
    ("ours", "theirs", "common"),
    [((1,), (1,), 1), ((1, 2), (1, 2), 2), ((1, 2), (1,), 1), ((3, 2), (2, 3, 9), 3)],
)
def test_the_largest_common_version_is_spoken(
    ours: tuple[int, ...], theirs: tuple[int, ...], common: int
) -> None:
    answered, caller = shake(client(speaking(ANNA, *ours)), server(speaking(BERT, *theirs)))
    assert answered.version == caller.version == common


def test_a_node_speaks_what_it_was_built_for() -> None:
    answered, _ = shake(client(), server())
    assert answered.version == max(VERSIONS)


def test_without_a_common_version_both_sides_are_named() -> None:
    host = server(speaking(BERT, 1, 2))
    with pytest.raises(RefusedError, match="1 and 2 here, 3 there"):
        host.challenge(client(speaking(ANNA, 3)).start())


def test_a_caller_checks_the_version_by_itself() -> None:
    caller = client(speaking(ANNA, 1, 3))
    # A server that only claims to have found a common one.
    challenge = _Careless(speaking(BERT, 2)).challenge(caller.start())
    with pytest.raises(RefusedError, match="1 and 3 here, 2 there"):
        caller.proof(challenge)


class _Careless(ServerHello):
    def __init__(self, me: LocalIdentity) -> None:
        super().__init__(
            me, purposes=PURPOSES, certificate=CERTIFICATE, nonce=b"s" * 32, now=1007.0
        )

    def challenge(self, start: bytes) -> bytes:
        said = decode(start, bytes_max=HELLO_BYTES_MAX)
        honest = self._me
        self._me = speaking(honest, *honest.versions, *said["v"])
        signed = decode(super().challenge(start), bytes_max=HELLO_BYTES_MAX)
        claim = {**signed["c"], "v": honest.versions}
        transcript = _transcript(start, encode(claim), CERTIFICATE)
        return encode({"c": claim, "s": honest.key.sign(b"server" + transcript)})


def test_nobody_in_between_can_talk_two_nodes_down() -> None:
    caller, host = client(speaking(ANNA, 1, 2)), server(speaking(BERT, 1, 2))
    start = decode(caller.start(), bytes_max=HELLO_BYTES_MAX)
    challenge = host.challenge(encode({**start, "v": [1]}))
    with pytest.raises(PeerError, match="did not prove"):
        caller.proof(challenge)
    said = decode(host.challenge(caller.start()), bytes_max=HELLO_BYTES_MAX)
    claim = {**said["c"], "v": [1]}
    with pytest.raises(PeerError, match="did not prove"):
        caller.proof(encode({**said, "c": claim}))


@pytest.mark.parametrize("offer", [[], ["1"], [True], [None], 1, [1] * (VERSIONS_MAX + 1)])
def test_an_offer_of_another_form_is_refused(offer: object) -> None:
    start = decode(client().start(), bytes_max=HELLO_BYTES_MAX)
    with pytest.raises(PeerError):
        server().challenge(encode({**start, "v": offer}))


def test_a_long_refusal_arrives_cut() -> None:
    offer = range(2**63, 2**63 + VERSIONS_MAX)
    start = decode(client().start(), bytes_max=HELLO_BYTES_MAX)
    with pytest.raises(RefusedError) as refused:
        server().challenge(encode({**start, "v": list(offer)}))
    with pytest.raises(RefusedError, match="without a common version"):
        client().proof(refusal(refused.value))


def test_unknown_fields_of_either_side_are_left_alone() -> None:
    caller, host = _Newer(ANNA), server()
    caller_proof = caller.proof(host.challenge(caller.start()))
    _, peer = host.verdict(caller_proof)
    assert peer.node == ANNA.key.id
    assert (
        caller.finish(encode({"ok": True, "cred": BERT.credential, "later": 1})).node == BERT.key.id
    )


class _Newer(ClientHello):
    def __init__(self, me: LocalIdentity) -> None:
        super().__init__(
            me,
            purpose="gossip",
            expected=None,
            certificate=CERTIFICATE,
            nonce=b"c" * 32,
            now=1000.0,
        )
        start = decode(self._start, bytes_max=HELLO_BYTES_MAX)
        self._start = encode({**start, "later": [1, {"x": b"y"}]})


def test_unknown_fields_are_left_alone_but_covered_by_the_proof() -> None:
    start = decode(client().start(), bytes_max=HELLO_BYTES_MAX)
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


@given(st.integers(0, 10_000), st.none() | st.integers(0, 255))
def test_a_damaged_start_is_refused_or_spoils_the_proof(place: int, byte: int | None) -> None:
    caller = client()
    start = caller.start()
    place %= len(start)
    damaged = start[:place] + (b"" if byte is None else bytes([byte]) + start[place + 1 :])
    try:
        challenge = server().challenge(damaged)
    except PeerError:
        return
    if damaged != start:
        with pytest.raises(PeerError):
            caller.proof(challenge)


DEEP = b"\x91" * 3000 + b"\x01"
HUGE = b"\xdd\xff\xff\xff\xff"


@pytest.mark.parametrize("junk", [DEEP, HUGE, bytes(HELLO_BYTES_MAX + 1), b"", b"\x80", b"\x01"])
def test_deep_huge_and_empty_messages_are_refused(junk: bytes) -> None:
    host, caller = server(), client()
    host.challenge(client().start())
    caller.proof(server().challenge(caller.start()))
    for step in (server().challenge, client().proof, host.verdict, caller.finish):
        with pytest.raises(PeerError):
            step(junk)
