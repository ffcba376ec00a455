"""Questions to small real servers on loopback."""

from __future__ import annotations

import json
from pathlib import PurePath

import pytest
import trio

from p2pmesh.engine.argv import Launch, Modality
from p2pmesh.engine.probe import ask_health, ask_token
from p2pmesh.errors import EngineError

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
LOADING = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\n{}"


def refusal(body: bytes) -> bytes:
    return b"HTTP/1.1 500 X\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


def launch(modality: Modality = "chat") -> Launch:
    return Launch(model_paths=(PurePath("x"),), alias="x", modality=modality, api_key="k3y")


class Server:
    """Answers every connection with the same bytes and keeps the requests."""

    def __init__(self, nursery: trio.Nursery, answer: bytes) -> None:
        self.nursery, self.answer = nursery, answer
        self.requests: list[bytes] = []
        self.port = 0

    async def start(self) -> None:
        listeners = await self.nursery.start(trio.serve_tcp, self.serve, 0)
        self.port = listeners[0].socket.getsockname()[1]

    async def serve(self, stream: trio.SocketStream) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            request += await stream.receive_some()
        self.requests.append(request)
        await stream.send_all(self.answer)
        await stream.aclose()


async def serve(nursery: trio.Nursery, answer: bytes) -> Server:
    server = Server(nursery, answer)
    await server.start()
    return server


@pytest.mark.parametrize(
    ("modality", "path", "question"),
    [
        ("chat", "/v1/completions", {"prompt": "a", "max_tokens": 1}),
        ("completion", "/v1/completions", {"prompt": "a", "max_tokens": 1}),
        ("embedding", "/v1/embeddings", {"input": "a"}),
        ("rerank", "/v1/rerank", {"query": "a", "documents": ["a"]}),
    ],
)
async def test_the_question_fits_the_model(
    nursery: trio.Nursery, modality: Modality, path: str, question: dict[str, object]
) -> None:
    server = await serve(nursery, OK)
    assert await ask_token("127.0.0.1", server.port, launch(modality))
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(f"POST {path} HTTP/1.1".encode())
    assert b"Authorization: Bearer k3y" in head
    assert json.loads(body) == question


async def test_loading_is_not_ready(nursery: trio.Nursery) -> None:
    server = await serve(nursery, LOADING)
    assert not await ask_token("127.0.0.1", server.port, launch())


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (refusal(b'{"error": {"message": "no memory"}}'), "with 500: no memory"),
        (refusal(b'{"error": []}'), 'with 500: {"error": \\[\\]}'),
        (refusal(b""), "with 500: nothing"),
        (refusal(b"\xff"), "with 500: \ufffd"),
        (refusal(b"[" * 100_000), r"with 500: \[\["),
        (b"SSH-2.0-x\r\n\r\n", "does not speak HTTP"),
        (b"", "does not speak HTTP"),
        (OK[:-1], "does not speak HTTP"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 5000000\r\n\r\n" + b"x" * 5_000_000,
            "absurdly long",
        ),
    ],
)
async def test_refusals_and_junk(nursery: trio.Nursery, answer: bytes, words: str) -> None:
    server = await serve(nursery, answer)
    with trio.fail_after(5), pytest.raises(EngineError, match=words):
        await ask_token("127.0.0.1", server.port, launch())


async def test_nobody_there() -> None:
    with trio.socket.socket() as taken:
        await taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(EngineError, match="does not accept connections"):
            await ask_token("127.0.0.1", port, launch())
        assert not await ask_health("127.0.0.1", port)


@pytest.mark.parametrize(("answer", "healthy"), [(OK, True), (LOADING, False), (b"x", False)])
async def test_health(nursery: trio.Nursery, answer: bytes, *, healthy: bool) -> None:
    server = await serve(nursery, answer)
    assert await ask_health("127.0.0.1", server.port) is healthy
    assert server.requests[0].startswith(b"GET /health HTTP/1.1")
