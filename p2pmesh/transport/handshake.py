"""Running a hello over a byte stream: length-prefixed frames, and nothing else.

The caller sets the deadline.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Collection

import trio

from p2pmesh.errors import LinkError, PeerError
from p2pmesh.identity.hello import (
    HELLO_BYTES_MAX,
    NONCE_BYTES,
    ClientHello,
    LocalIdentity,
    Peer,
    Purpose,
    ServerHello,
    refusal,
)
from p2pmesh.identity.keys import NodeId
from p2pmesh.transport.base import link_errors

_LENGTH = struct.Struct(">I")
_BROKEN = "the connection broke during the hello"


async def client_handshake(
    stream: trio.abc.Stream,
    me: LocalIdentity,
    *,
    certificate: bytes,
    purpose: Purpose,
    expected: NodeId | None,
    now: float,
) -> Peer:
    """Prove each other's identity from the dialling side.

    Args:
        stream: Fresh from the server, nothing read or written yet.
        me: Who we are.
        certificate: What the server showed in TLS.
        purpose: What the connection is for.
        expected: Who has to answer; None for anybody of this mesh.
        now: Unix time in seconds, as this node takes it to be.

    Raises:
        LinkError: The stream broke.
        PeerError: The other side refused, or its proof is wrong.
    """
    hello = ClientHello(
        me,
        purpose=purpose,
        expected=expected,
        certificate=certificate,
        nonce=secrets.token_bytes(NONCE_BYTES),
        now=now,
    )
    await _send(stream, hello.start())
    await _send(stream, hello.proof(await _receive(stream)))
    return hello.finish(await _receive(stream))


async def server_handshake(
    stream: trio.abc.Stream,
    me: LocalIdentity,
    *,
    purposes: Collection[Purpose],
    certificate: bytes,
    now: float,
) -> Peer:
    """Prove each other's identity from the accepting side; refuse what is not in `purposes`.

    Raises as `client_handshake`.
    """
    nonce = secrets.token_bytes(NONCE_BYTES)
    hello = ServerHello(me, purposes=purposes, certificate=certificate, nonce=nonce, now=now)
    try:
        await _send(stream, hello.challenge(await _receive(stream)))
        verdict, peer = hello.verdict(await _receive(stream))
    except PeerError as exc:
        await _send(stream, refusal(str(exc)))
        raise
    await _send(stream, verdict)
    return peer


async def _send(stream: trio.abc.Stream, message: bytes) -> None:
    with link_errors(_BROKEN):
        await stream.send_all(_LENGTH.pack(len(message)) + message)


async def _receive(stream: trio.abc.Stream) -> bytes:
    (size,) = _LENGTH.unpack(await _exactly(stream, _LENGTH.size))
    if size > HELLO_BYTES_MAX:
        raise PeerError("what came is no hello")
    return await _exactly(stream, size)


async def _exactly(stream: trio.abc.Stream, size: int) -> bytes:
    # Never a byte more: what follows the hello belongs to the next protocol.
    data = b""
    while len(data) < size:
        with link_errors(_BROKEN):
            chunk = await stream.receive_some(size - len(data))
        if not chunk:
            raise LinkError("the other side hung up during the hello")
        data += chunk
    return data
