"""Running a hello over a byte stream: length-prefixed frames, and nothing else.

The caller sets the deadline.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext

import trio

from p2pmesh.errors import LinkError, PeerError
from p2pmesh.identity.hello import (
    HELLO_BYTES_MAX,
    NONCE_BYTES,
    ClientHello,
    LocalIdentity,
    Needs,
    Peer,
    Purpose,
    ServerHello,
    refusal,
)
from p2pmesh.identity.keys import NodeId
from p2pmesh.transport.base import link_errors

# Around challenge and proof, which only reach a peer where the purpose allows it to be.
Guard = Callable[[Purpose], AbstractAsyncContextManager[object]]

_LENGTH = struct.Struct(">I")
_BROKEN = "the connection broke during the hello"


def unguarded(_purpose: Purpose) -> AbstractAsyncContextManager[object]:
    """Let the challenge reach a peer wherever it is."""
    return nullcontext()


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
    await send_frame(stream, hello.start())
    await send_frame(stream, hello.proof(await receive_frame(stream)))
    return hello.finish(await receive_frame(stream))


async def server_handshake(
    stream: trio.abc.Stream,
    me: LocalIdentity,
    *,
    purposes: Mapping[Purpose, Needs],
    certificate: bytes,
    now: float,
    guard: Guard = unguarded,
) -> Peer:
    """Prove each other's identity from the accepting side; refuse what is not in `purposes`.

    Raises as `client_handshake`.
    """
    nonce = secrets.token_bytes(NONCE_BYTES)
    hello = ServerHello(me, purposes=purposes, certificate=certificate, nonce=nonce, now=now)
    try:
        challenge = hello.challenge(await receive_frame(stream))
        async with guard(hello.purpose):
            await send_frame(stream, challenge)
            proof = await receive_frame(stream)
        verdict, peer = hello.verdict(proof)
    except PeerError as exc:
        await send_frame(stream, refusal(exc))
        raise
    await send_frame(stream, verdict)
    return peer


async def send_frame(stream: trio.abc.Stream, message: bytes) -> None:
    """Send one message with its length in front.

    Raises:
        LinkError: The stream broke.
    """
    with link_errors(_BROKEN):
        await stream.send_all(_LENGTH.pack(len(message)) + message)


async def receive_frame(stream: trio.abc.Stream, *, bytes_max: int = HELLO_BYTES_MAX) -> bytes:
    """Receive one message, and not a byte of what follows it.

    Raises:
        LinkError: The stream broke or ended.
        PeerError: The message is longer than it may be.
    """
    (size,) = _LENGTH.unpack(await _exactly(stream, _LENGTH.size))
    if size > bytes_max:
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
