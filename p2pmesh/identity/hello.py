"""The mutual proof of identity that opens every connection between nodes.

Pure. It runs inside TLS, whose certificates are made afresh at each start and prove nothing by
themselves: here each side signs the whole conversation so far together with the digest of the
certificate that the server showed, so that a man in the middle would have to show another
certificate and make both signatures wrong. The client speaks first:

    client  start      versions, nonce, key, mesh, whom it expects, what the connection is for
    server  challenge  versions, nonce, key, mesh, and its signature
    client  proof      its signature, and its credential
    server  verdict    yes and its own credential, or why not

Each side says which versions of the protocol it speaks and both take the largest common one. The
whole of what either said is in the transcript that both sign, so nobody in between can talk two
nodes down to an older version. Unknown fields are left alone, and signed like all others.

Credentials come after the signatures, so that nobody shows what it may do to whom it does not know.
A purpose says which role a peer needs for it. Without a credential one can ask which mesh this is,
and ask to join it.

Python's ssl cannot ask for a client certificate that it does not know beforehand, which is why
the proof of both sides lives here and not in TLS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

from p2pmesh.errors import PeerError
from p2pmesh.identity.credentials import (
    CREDENTIAL_BYTES_MAX,
    EARLY_S_MAX,
    Credential,
    Role,
    is_signed,
    read_credential,
)
from p2pmesh.identity.keys import (
    ID_BYTES,
    PUBLIC_KEY_BYTES,
    SIGNATURE_BYTES,
    MeshId,
    NodeId,
    SigningKey,
    key_id,
    verify,
)
from p2pmesh.wire.codec import decode, encode
from p2pmesh.wire.fields import as_map, take, take_exactly, take_list
from p2pmesh.wire.text import plain_text

TAG = "p2pmesh hello 1"
# Of the messages on a link; records and this hello have tags of their own.
VERSIONS: tuple[int, ...] = (3,)
VERSIONS_MAX = 32  # that one side may offer; it speaks two or three
VERSIONS_SHOWN_MAX = 8  # in a sentence
PURPOSE_CHARS_MAX = 16  # a word
REASON_CHARS_MAX = 256  # two sentences for a person
UNNAMED = "unnamed"  # a mesh whose name holds nothing that could be shown
BINDING_BYTES = 32
NONCE_BYTES = 32  # never the same twice, nor guessed
HELLO_BYTES_MAX = 4096  # read from anybody: ten times what is said today
CLOCK_SKEW_S_MAX = 60

# A purpose says what follows the hello on a connection, and so which handler of the server gets it.
Purpose = str
GOSSIP: Purpose = "gossip"
HTTP: Purpose = "http"
HELLO: Purpose = "hello"  # nothing follows
RPC: Purpose = "rpc"  # the head of a pipeline sends graphs to one of its stages
RANKING: Purpose = "ranking"  # asks for a ranking of a model's experts
JOIN: Purpose = "join"  # asks for a credential, by an invitation or by an earlier credential
LAN: Purpose = "lan"  # asks for a credential because both are on one network

# Why a peer was refused, for programs.
REFUSED_THERE = "the node there refused: "  # before the reason that it gives
STRANGER, EXPIRED, REVOKED, ROLE = "stranger", "expired", "revoked", "role"
OVER = (EXPIRED, REVOKED)  # a membership is


class RefusedError(PeerError):
    """The other side will not talk to us, or we not to it; the sentence says why.

    Attributes:
        why: The reason in a word that programs know; "" for all others.
        by_peer: Whether the other side said it, and not this one about it.
    """

    def __init__(self, sentence: str, why: str = "", *, by_peer: bool = False) -> None:
        super().__init__(sentence)
        self.why, self.by_peer = why, by_peer


SAME_KEY = (
    "both sides have the same key: the address is the node's own, or one is a copy of the other; "
    "give each its own --home instead of a copy"
)


@dataclass(frozen=True, slots=True)
class Needs:
    """The conditions under which a peer may open a connection for a purpose.

    Attributes:
        role: The least role of the peer; None: strangers may as well.
        stage: Whether it needs the right `stage`.
    """

    role: Role | None
    stage: bool = False


ANYBODY = Needs(None)
Vouch = Callable[[Credential], str]  # why a credential is good no more; "" if it is good


def taken(_credential: Credential) -> str:
    """Take every credential: nothing was revoked."""
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalIdentity:
    """The identity that this node states in a hello.

    Attributes:
        key: The node's key.
        instance: Random per start.
        mesh: The mesh it belongs to; None while it has none and takes the server's.
        mesh_name: What people call that mesh.
        credential: Its credential in that mesh, as bytes; empty while it has none.
        vouch: Whether credentials of peers are good in that mesh.
        versions: The versions of the protocol that it speaks, at least one.
    """

    key: SigningKey
    instance: int
    mesh: MeshId | None
    mesh_name: str = ""
    credential: bytes = b""
    vouch: Vouch = taken
    versions: tuple[int, ...] = VERSIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """The proven identity of the other side.

    Attributes:
        version: Of the protocol, the largest that both sides speak.
        clock_ahead_s: Its clock minus ours, as it was said.
        credential: What it may do; None for a stranger, and where nobody shows one.
        binding: A digest of the whole hello: what is signed together with it holds on this
            connection only.
        host: The network address that it called from, "" where there is none.
    """

    node: NodeId
    public: bytes
    instance: int
    mesh: MeshId
    mesh_name: str
    purpose: Purpose
    version: int
    clock_ahead_s: int
    credential: Credential | None = None
    binding: bytes = b""
    host: str = ""


class ClientHello:
    """The dialling side of one handshake: `start`, then `proof`, then `finish`.

    Args:
        me: Who we are.
        purpose: What the connection is for.
        expected: Whom we mean to reach; None for whoever answers there.
        certificate: DER bytes of the certificate that the server showed in TLS.
        nonce: 32 fresh random bytes.
        now: Unix time in seconds.
    """

    def __init__(
        self,
        me: LocalIdentity,
        *,
        purpose: Purpose,
        expected: NodeId | None,
        certificate: bytes,
        nonce: bytes,
        now: float,
    ) -> None:
        self._me, self._purpose, self._now = me, purpose, now
        self._expected = expected
        self._certificate = certificate
        self._start = encode(
            {
                "v": me.versions,
                "n": nonce,
                "k": me.key.public,
                "m": me.mesh or b"",
                "to": expected or b"",
                "for": purpose,
                "i": me.instance,
                "at": int(now),
            }
        )
        self._peer: Peer | None = None

    def start(self) -> bytes:
        """The first message."""
        return self._start

    def proof(self, challenge: bytes) -> bytes:
        """Check who answered and prove who we are.

        Raises:
            PeerError: The server's message or proof is wrong.
            RefusedError: It said no, or is not whom we meant to reach.
        """
        fields = _fields(challenge)
        said = as_map(fields.get("c"), "the claim in a hello")
        claims = encode(said)
        public = take_exactly(said, "k", PUBLIC_KEY_BYTES)
        mesh = MeshId(take_exactly(said, "m", ID_BYTES))
        node = NodeId(key_id(public))
        take_exactly(said, "n", NONCE_BYTES)
        transcript = _transcript(self._start, claims, self._certificate)
        if not verify(public, take_exactly(fields, "s", SIGNATURE_BYTES), b"server" + transcript):
            raise PeerError("the other side did not prove its identity")
        if self._expected is not None and node != self._expected:
            raise RefusedError("another node answered at that address")
        if node == self._me.key.id:
            raise RefusedError(SAME_KEY)
        if self._me.mesh is not None and mesh != self._me.mesh:
            raise RefusedError("the node there belongs to another mesh")
        self._peer = Peer(
            node=node,
            public=public,
            instance=take(said, "i", int),
            mesh=mesh,
            mesh_name=plain_text(take(said, "name", str, size_max=256)) or UNNAMED,
            purpose=self._purpose,
            version=_common_version(self._me, said),
            clock_ahead_s=take(said, "at", int) - int(self._now),
            binding=_digest(transcript),
        )
        shown = b"" if self._purpose == HELLO else self._me.credential
        return encode({"s": self._me.key.sign(b"client" + transcript), "cred": shown})

    def finish(self, verdict: bytes) -> Peer:
        """Read the server's yes.

        Raises:
            PeerError: It is no verdict at all.
            RefusedError: It said no, or who says yes is no member of the mesh.
        """
        assert self._peer is not None, "finish comes after proof"
        fields = _fields(verdict)
        take(fields, "ok", bool)
        if self._purpose == HELLO:
            return self._peer
        shown = take(fields, "cred", bytes, size_max=CREDENTIAL_BYTES_MAX)
        credential = _check(shown, self._peer, self._me.vouch, self._now)
        if credential.role < Role.SERVE:
            raise RefusedError("the node there only uses the mesh, and serves nothing", ROLE)
        return replace(self._peer, credential=credential)


class ServerHello:
    """The accepting side of one handshake: `challenge`, then `verdict`.

    Whatever is refused here raises; the caller sends `refusal(sentence)` and closes.

    Args:
        me: Who we are.
        purposes: What this node has a handler for, and what a peer needs for each.
        certificate: As the client's.
        nonce: As the client's.
        now: As the client's.
    """

    def __init__(
        self,
        me: LocalIdentity,
        *,
        purposes: Mapping[Purpose, Needs],
        certificate: bytes,
        nonce: bytes,
        now: float,
    ) -> None:
        assert me.mesh is not None, "a node without a mesh accepts nobody"
        self._purposes = purposes
        self._me, self._certificate, self._nonce, self._now = me, certificate, nonce, now
        self._transcript = b""
        self._peer: Peer | None = None

    @property
    def purpose(self) -> Purpose:
        """Return what the caller wants; it comes after `challenge`."""
        assert self._peer is not None, "the purpose comes after challenge"
        return self._peer.purpose

    def challenge(self, start: bytes) -> bytes:
        """Read who calls and what for; prove who we are.

        Raises:
            PeerError: The message is no start of a hello.
            RefusedError: It is for another node, mesh or version, or for a purpose that this node
                does not offer.
        """
        said = _fields(start)
        public = take_exactly(said, "k", PUBLIC_KEY_BYTES)
        mesh = take(said, "m", bytes, size_max=ID_BYTES)
        expected = take(said, "to", bytes, size_max=ID_BYTES)
        purpose = take(said, "for", str, size_max=PURPOSE_CHARS_MAX)
        take_exactly(said, "n", NONCE_BYTES)
        assert self._me.mesh is not None
        version = _common_version(self._me, said)
        if expected and expected != self._me.key.id:
            raise RefusedError("another node answered at that address")
        if public == self._me.key.public:
            raise RefusedError(SAME_KEY)
        if mesh and mesh != self._me.mesh:
            raise RefusedError("this node belongs to another mesh")
        if purpose not in self._purposes:
            raise RefusedError(f"this node does not offer {purpose!r}")
        claim: dict[str, Any] = {
            "v": self._me.versions,
            "n": self._nonce,
            "k": self._me.key.public,
            "m": self._me.mesh,
            "name": self._me.mesh_name,
            "i": self._me.instance,
            "at": int(self._now),
        }
        self._transcript = _transcript(start, encode(claim), self._certificate)
        self._peer = Peer(
            node=NodeId(key_id(public)),
            public=public,
            instance=take(said, "i", int),
            mesh=self._me.mesh,
            mesh_name=self._me.mesh_name,
            purpose=purpose,
            version=version,
            clock_ahead_s=take(said, "at", int) - int(self._now),
            binding=_digest(self._transcript),
        )
        return encode({"c": claim, "s": self._me.key.sign(b"server" + self._transcript)})

    def verdict(self, proof: bytes) -> tuple[bytes, Peer]:
        """Check the caller's proof; returns the last message and who it is.

        Raises:
            PeerError: The proof, or the credential, is wrong.
            RefusedError: The caller may not open what it asks for.
        """
        assert self._peer is not None, "verdict comes after challenge"
        fields = _fields(proof)
        signature = take_exactly(fields, "s", SIGNATURE_BYTES)
        if not verify(self._peer.public, signature, b"client" + self._transcript):
            raise PeerError("the other side did not prove its identity")
        shown = take(fields, "cred", bytes, size_max=CREDENTIAL_BYTES_MAX, default=b"")
        peer, needs = self._peer, self._purposes[self._peer.purpose]
        if shown or needs.role is not None:
            credential = _check(shown, peer, self._me.vouch, self._now)
            _check_needs(needs, credential, peer.purpose)
            peer = replace(peer, credential=credential)
        yes: dict[str, Any] = {"ok": True}
        if peer.purpose != HELLO:
            yes["cred"] = self._me.credential
        return encode(yes), peer


def refusal(exc: PeerError) -> bytes:
    """The message that says no, in place of a challenge or verdict."""
    said = {"no": str(exc)[:REASON_CHARS_MAX]}
    return encode({**said, "why": exc.why} if isinstance(exc, RefusedError) and exc.why else said)


def _check(shown: bytes, peer: Peer, vouch: Vouch, now: float) -> Credential:
    """Return the credential that a peer showed.

    Raises:
        PeerError: It is none, or not the peer's.
        RefusedError: It showed none, or one that is good no more.
    """
    if not shown:
        raise RefusedError(
            "only members of this mesh may do that; ask one for an invitation, then: "
            "p2pmesh join TOKEN",
            STRANGER,
        )
    credential = read_credential(shown)
    if (credential.node, credential.mesh) != (peer.node, peer.mesh) or not is_signed(credential):
        raise PeerError("a credential that is not the other side's")
    if credential.begins_at > now + EARLY_S_MAX:
        raise RefusedError("a credential from the future; the clock of one of the two is wrong")
    if now >= credential.expires_at + CLOCK_SKEW_S_MAX:
        raise RefusedError(
            "a credential that has run out; ask for a new invitation, then: p2pmesh join TOKEN",
            EXPIRED,
        )
    if reason := vouch(credential):
        raise RefusedError(reason, REVOKED)
    return credential


def _check_needs(needs: Needs, credential: Credential, purpose: Purpose) -> None:
    if needs.role is not None and credential.role < needs.role:
        raise RefusedError(
            f"the role {credential.role.word!r} is not enough for {purpose!r}, which takes "
            f"{needs.role.word!r}: p2pmesh grant NODE {needs.role.word}",
            ROLE,
        )
    if needs.stage and not credential.stage:
        raise RefusedError(f"{purpose!r} takes the right 'stage': p2pmesh grant NODE stage", ROLE)


def _fields(message: bytes) -> dict[str, Any]:
    fields = as_map(decode(message, bytes_max=HELLO_BYTES_MAX), "a hello")
    if "no" in fields:
        reason = plain_text(take(fields, "no", str, size_max=REASON_CHARS_MAX), REASON_CHARS_MAX)
        why = take(fields, "why", str, size_max=PURPOSE_CHARS_MAX, default="")
        sentence = f"{REFUSED_THERE}{reason or 'it did not say why'}"
        raise RefusedError(sentence, why, by_peer=True)
    return fields


def _common_version(me: LocalIdentity, said: dict[str, Any]) -> int:
    theirs = take_list(said, "v", int, size_max=VERSIONS_MAX)
    if common := set(me.versions).intersection(theirs):
        return max(common)
    raise RefusedError(
        "two nodes without a common version of the protocol: "
        f"{_show(me.versions)} here, {_show(theirs)} there; update the older one"
    )


def _show(versions: Sequence[int]) -> str:
    return " and ".join(map(str, versions[:VERSIONS_SHOWN_MAX])) or "none"


def _digest(transcript: bytes) -> bytes:
    return blake2b(transcript, digest_size=BINDING_BYTES).digest()


def _transcript(start: bytes, claims: bytes, certificate: bytes) -> bytes:
    certificate_digest = blake2b(certificate, digest_size=32).digest()
    return encode([TAG, start, claims, certificate_digest])
