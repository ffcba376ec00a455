"""Questions to a running engine: is it alive, does it really answer.

One short connection per question, over trio and h11. An engine counts as ready when it has
answered a request of the kind it was started for, not when its port is open: llama.cpp listens
before the weights are in memory, and a driver may fail only at the first token.
"""

from __future__ import annotations

import json

import h11
import trio

from p2pmesh.engine.argv import Launch, Modality
from p2pmesh.errors import EngineError

ANSWER_BYTES_MAX = 4 * 1024 * 1024  # one embedding of a large model is some 100 kB of JSON

_QUESTIONS: dict[Modality, tuple[str, dict[str, object]]] = {
    "chat": ("/v1/completions", {"prompt": "a", "max_tokens": 1}),
    "completion": ("/v1/completions", {"prompt": "a", "max_tokens": 1}),
    "embedding": ("/v1/embeddings", {"input": "a"}),
    "rerank": ("/v1/rerank", {"query": "a", "documents": ["a"]}),
}


async def ask_token(host: str, port: int, launch: Launch) -> bool:
    """One small request of the model's kind.

    Returns:
        False while the engine says that it is still loading.

    Raises:
        EngineError: It refuses, or its answer is not one.
    """
    authorization = ("Authorization", f"Bearer {launch.api_key}")
    request, data = small_request(launch.modality, f"{host}:{port}", authorization)
    status, body = await _exchange(host, port, request, data)
    if status == 503:
        return False
    if status != 200:
        raise EngineError(f"the engine answered a first request with {status}: {reason(body)}")
    return True


def small_request(
    modality: Modality, host: str, *headers: tuple[str, str]
) -> tuple[h11.Request, bytes]:
    """The head and body of the smallest request that makes a model of this kind compute."""
    path, question = _QUESTIONS[modality]
    data = json.dumps(question).encode()
    described = [
        ("Host", host),
        ("Connection", "close"),
        *headers,
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(data))),
    ]
    return h11.Request(method="POST", target=path, headers=described), data


async def ask_health(host: str, port: int) -> bool:
    """Whether the engine's HTTP side answers `/health` with 200. The caller sets the deadline."""
    headers = [("Host", f"{host}:{port}"), ("Connection", "close")]
    request = h11.Request(method="GET", target="/health", headers=headers)
    try:
        status, _ = await _exchange(host, port, request, b"")
    except EngineError:
        return False
    return status == 200


async def _exchange(host: str, port: int, request: h11.Request, data: bytes) -> tuple[int, bytes]:
    try:
        stream = await trio.open_tcp_stream(host, port)
    except OSError as exc:
        raise EngineError("the engine does not accept connections") from exc
    async with stream:
        return await exchange(stream, request, data)


async def exchange(stream: trio.abc.Stream, request: h11.Request, data: bytes) -> tuple[int, bytes]:
    """Send one request and read its answer: status and body.

    Raises:
        EngineError: The connection breaks, or what comes is no HTTP.
    """
    connection = h11.Connection(h11.CLIENT)
    events = (request, h11.Data(data=data), h11.EndOfMessage())
    try:
        await stream.send_all(b"".join(connection.send(event) or b"" for event in events))
        return await _answer(connection, stream)
    except (OSError, trio.BrokenResourceError) as exc:
        raise EngineError("the engine does not accept connections") from exc
    except h11.RemoteProtocolError as exc:
        raise EngineError(f"the engine does not speak HTTP: {exc}") from exc


async def _answer(connection: h11.Connection, stream: trio.abc.Stream) -> tuple[int, bytes]:
    status, body = 0, bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(bytes(await stream.receive_some()))
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > ANSWER_BYTES_MAX:
                raise EngineError("the engine's answer to one token is absurdly long")
        elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
            return status, bytes(body)


def reason(body: bytes) -> str:
    """The message of llama.cpp's error shape, else the beginning of whatever it is."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, TypeError, KeyError, RecursionError):  # a peer may nest without end
        return body[:200].decode("utf-8", "replace").strip() or "nothing"
