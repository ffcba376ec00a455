from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.errors import PeerError
from p2pmesh.identity.credentials import CHAIN_MAX, EARLY_S_MAX, Credential, Role, found
from p2pmesh.identity.hello import (
    ANYBODY,
    CLOCK_SKEW_S_MAX,
    EXPIRED,
    GOSSIP,
    HELLO,
    HELLO_BYTES_MAX,
    HTTP,
    JOIN,
    PURPOSE_CHARS_MAX,
    REVOKED,
    ROLE,
    STRANGER,
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
from tests.identity.builders import FOUNDED_AT, FOUNDERS, MESH, MESH_KEY, credential

CERTIFICATE = b"certificate"
STAGES = "stages"
PURPOSES = {
    GOSSIP: Needs(Role.SERVE),
    HTTP: Needs(Role.USE),
    HELLO: ANYBODY,
    JOIN: ANYBODY,
    STAGES: Needs(Role.SERVE, stage=True),
}


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


def server(me: LocalIdentity = BERT, *, now: float = 1007.0) -> ServerHello:
    return ServerHello(me, purposes=PURPOSES, certificate=CERTIFICATE, nonce=b"s" * 32, now=now)


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


# --- credentials --------------------------------------------------------------------------------

INVITER = SigningKey(b"i" * 32)
INVITERS = credential(INVITER, Role.INVITE)


def shown(raw: Credential | bytes, me: LocalIdentity = ANNA) -> LocalIdentity:
    return dataclasses.replace(me, credential=raw if isinstance(raw, bytes) else raw.raw)


def stated(holder: SigningKey, *, role: str = "serve", expires_at: int = 5000) -> bytes:
    """A delegation by an inviter that says whatever somebody likes."""
    signed = encode(
        ["p2pmesh delegation 1", MESH, holder.public, role, [], 1000, expires_at, "grant", b""]
    )
    return INVITER.sign(signed) + signed


def resting_on_inviters(*delegations: bytes) -> bytes:
    return encode([MESH_KEY.public, [*(one.raw for one in INVITERS.chain), *delegations]])


def flipped(raw: bytes, place: int) -> bytes:
    return raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]


def test_both_learn_what_the_other_may_do() -> None:
    answered, caller = shake(client(), server())
    assert (answered.credential, caller.credential) == (credential(BERT.key), credential(ANNA.key))
    assert answered.binding == caller.binding != b""
    assert shake(client(purpose=HTTP), server())[0].binding != answered.binding


@pytest.mark.parametrize(
    ("me", "why", "sentence"),
    [
        (shown(b""), STRANGER, "only members of this mesh"),
        (shown(credential(ANNA.key, Role.USE)), ROLE, "'use' is not enough for 'gossip'"),
        (shown(credential(ANNA.key, now=1008 + EARLY_S_MAX)), "", "from the future"),
    ],
    ids=["stranger", "role too low", "from the future"],
)
def test_who_may_not_is_told_why(me: LocalIdentity, why: str, sentence: str) -> None:
    with pytest.raises(RefusedError, match=sentence) as refused:
        shake(client(me), server())
    assert refused.value.why == why
    with pytest.raises(RefusedError, match=sentence) as told:
        client(me).proof(refusal(refused.value))
    assert told.value.why == why


@pytest.mark.parametrize(("late_s", "in_time"), [(-1, True), (0, False), (1, False)])
def test_a_credential_ends_when_it_says_and_a_clocks_error_later(
    late_s: int, *, in_time: bool
) -> None:
    me = shown(credential(ANNA.key, ttl_s=5))
    now = FOUNDED_AT + 5 + CLOCK_SKEW_S_MAX + late_s
    if in_time:
        assert shake(client(me), server(now=now))[1].credential is not None
    else:
        with pytest.raises(RefusedError, match="has run out") as refused:
            shake(client(me), server(now=now))
        assert refused.value.why == EXPIRED


def test_who_was_revoked_is_told_so_by_either_side() -> None:
    wary = dataclasses.replace(BERT, vouch=lambda one: "revoked by kitchen" * (one.node == A_ID))
    with pytest.raises(RefusedError, match="revoked by kitchen") as refused:
        shake(client(), server(wary))
    assert refused.value.why == REVOKED
    wary = dataclasses.replace(ANNA, vouch=lambda one: "revoked by attic" * (one.node != A_ID))
    with pytest.raises(RefusedError, match="revoked by attic") as refused:
        shake(client(wary), server())
    assert refused.value.why == REVOKED


A_ID = NodeId(ANNA.key.id)


@pytest.mark.parametrize(
    "raw",
    [
        BERT.credential,
        FOUNDERS.raw,
        found(SigningKey(b"x" * 32), ANNA.key.public, FOUNDED_AT).raw,
        *(flipped(ANNA.credential, place) for place in range(0, len(ANNA.credential), 9)),
        ANNA.credential[:-1],
        resting_on_inviters(flipped(stated(ANNA.key), 3)),
        resting_on_inviters(stated(ANNA.key, role="admin")),
        resting_on_inviters(*[stated(ANNA.key)] * (CHAIN_MAX - 1)),
        b"junk",
        encode({}),
    ],
)
def test_a_credential_that_is_not_the_peers_or_no_good_opens_nothing(raw: bytes) -> None:
    for purpose in (GOSSIP, HTTP, JOIN):
        with pytest.raises(PeerError):
            shake(client(shown(raw), purpose=purpose), server())


@pytest.mark.parametrize("raw", [ANNA.credential, FOUNDERS.raw, flipped(BERT.credential, 70), b"x"])
def test_a_server_with_a_credential_that_is_not_its_own_is_no_member(raw: bytes) -> None:
    for purpose in (GOSSIP, HTTP, JOIN):
        with pytest.raises(PeerError):
            shake(client(purpose=purpose), server(shown(raw, BERT)))


def test_the_chain_of_such_a_test_is_good_when_nothing_is_wrong_with_it() -> None:
    good = resting_on_inviters(stated(ANNA.key))
    assert shake(client(shown(good)), server())[1].credential is not None


@pytest.mark.parametrize(
    ("role", "stage", "opens"),
    [
        (Role.USE, False, {HTTP}),
        (Role.USE, True, {HTTP}),
        (Role.SERVE, False, {HTTP, GOSSIP}),
        (Role.SERVE, True, {HTTP, GOSSIP, STAGES}),
        (Role.ADMIN, False, {HTTP, GOSSIP}),
        (Role.ADMIN, True, {HTTP, GOSSIP, STAGES}),
    ],
)
def test_what_a_peer_may_open_follows_from_its_role_and_rights(
    role: Role, opens: set[str], *, stage: bool
) -> None:
    own = credential(ANNA.key, role, stage=stage)
    for purpose in (HTTP, GOSSIP, STAGES):
        caller = client(shown(own), purpose=purpose)
        if purpose in opens:
            assert shake(caller, server())[1].credential == own
        else:
            with pytest.raises(RefusedError, match="p2pmesh grant NODE") as refused:
                shake(caller, server())
            assert refused.value.why == ROLE


@pytest.mark.parametrize("role", [None, Role.USE])
def test_a_server_without_a_credential_or_that_only_uses_the_mesh_is_none(
    role: Role | None,
) -> None:
    me = shown(b"" if role is None else credential(BERT.key, role), BERT)
    with pytest.raises(RefusedError) as refused:
        shake(client(), server(me))
    assert refused.value.why == (STRANGER if role is None else ROLE)


def test_a_stranger_may_ask_to_join_but_the_server_must_be_a_member() -> None:
    stranger = dataclasses.replace(shown(b""), mesh=None)
    answered, caller = shake(client(stranger, purpose=JOIN), server())
    assert answered.credential == credential(BERT.key)
    assert caller.credential is None
    with pytest.raises(RefusedError, match="only members") as refused:
        shake(client(stranger, purpose=JOIN), server(shown(b"", BERT)))
    assert refused.value.why == STRANGER


def test_for_a_mere_hello_nobody_shows_anything() -> None:
    caller, host = client(purpose=HELLO), server()
    proof = caller.proof(host.challenge(caller.start()))
    verdict, peer = host.verdict(proof)
    assert peer.credential is None
    assert caller.finish(verdict).credential is None
    assert ANNA.credential not in proof
    assert BERT.credential not in verdict


def test_credentials_are_shown_to_nobody_who_did_not_prove_who_it_is() -> None:
    caller, host = client(), server()
    start = caller.start()
    challenge = host.challenge(start)
    assert ANNA.credential not in start
    assert BERT.credential not in challenge
    with pytest.raises(PeerError, match="did not prove"):
        host.verdict(encode({"s": bytes(64), "cred": ANNA.credential}))


def test_a_reflected_hello_opens_nothing() -> None:
    # Somebody plays Bert's own words back to him, and Anna's to her.
    caller, host = client(), server()
    challenge = host.challenge(caller.start())
    with pytest.raises(PeerError):
        host.verdict(encode({**decode(challenge, bytes_max=HELLO_BYTES_MAX), "cred": b""}))
    with pytest.raises(PeerError):
        server().challenge(client(BERT).start())
    proof = caller.proof(challenge)
    with pytest.raises(PeerError):
        client().proof(proof)


def test_what_was_shown_once_does_not_help_somebody_else() -> None:
    thief = SigningKey(b"t" * 32)
    me = LocalIdentity(key=thief, instance=9, mesh=MESH, credential=ANNA.credential)
    with pytest.raises(PeerError, match="not the other side's"):
        shake(client(me), server())
