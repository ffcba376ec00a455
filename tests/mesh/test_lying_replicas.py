"""Members that say that they run a model and do not, beside the node that does."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio

from p2pmesh.config import Address, parse_address
from tests.mesh.hostile import (
    ANSWER,
    Handler,
    Liar,
    answers,
    ask,
    claims,
    hang_up,
    lying,
    never_answer,
)
from tests.mesh.nodes import Node, owners, running, wait_until

CHATS = 16
HEARD_S = 10.0
STALL_S = 5.0  # after which a replica that says nothing is given up
BOUND_S = 3.0  # for all other chats together, on a busy machine

Greeting = Callable[[trio.SocketStream], Awaitable[None]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Node]]:
    """The owner of the embedded model, and a node that forwards to it."""
    with running(tmp_path_factory.mktemp("pair"), 2) as nodes:
        assert answers(*nodes)
        [owner] = owners(nodes[0].status())
        first, second = sorted(nodes, key=lambda node: node.name != owner)
        yield first, second


def states(node: Node) -> list[str]:
    """The states of all engines in the mesh, as a node sees them."""
    return [model["state"] for one in node.status()["nodes"] for model in one["models"]]


async def chat(entry: Node) -> list[float]:
    """Ask 16 times in turn; each is answered right. How long each took."""
    taken = []
    for _ in range(CHATS):
        began = time.monotonic()
        reply = await trio.to_thread.run_sync(partial(ask, entry, timeout_s=20.0))
        assert (reply.status, reply.text) == (200, ANSWER)
        taken.append(time.monotonic() - began)
    return sorted(taken)


async def believed(entry: Node, liar: str) -> None:
    known = partial(wait_until, lambda: liar in owners(entry.status()), "heard", within_s=HEARD_S)
    await trio.to_thread.run_sync(known)


async def one_answer(stream: trio.abc.Stream) -> None:
    """Break an answer off before the first of its body."""
    await stream.receive_some(65536)
    await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
    await stream.aclose()


@pytest.mark.parametrize(
    ("on_stream", "stalls"),
    [
        pytest.param(never_answer, True, marks=pytest.mark.full),
        (hang_up, False),
        (one_answer, False),
    ],
    ids=["never answers", "hangs up", "head only"],
)
async def test_a_replica_that_does_not_answer_costs_next_to_nothing(
    pair: tuple[Node, Node], on_stream: Handler, *, stalls: bool
) -> None:
    _, entry = pair
    async with lying(entry, claims(), on_stream=on_stream, name="liar") as liar:
        await believed(entry, "liar")
        taken = await chat(entry)
        assert 0 < liar.streams < CHATS
        assert sum(taken[:-1]) < BOUND_S
        assert taken[-1] < BOUND_S + STALL_S * stalls


@asynccontextmanager
async def listening(greet: Greeting) -> AsyncIterator[Address]:
    async def handle(stream: trio.SocketStream) -> None:
        async with stream:
            try:
                await greet(stream)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return  # it hung up first

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, handle, listeners)
        yield Address(*listeners[0].socket.getsockname()[:2])
        nursery.cancel_scope.cancel()


async def like_ssh(stream: trio.SocketStream) -> None:
    await stream.send_all(b"SSH-2.0-OpenSSH_9.6\r\n")
    await stream.receive_some(65536)


async def close_at_once(stream: trio.SocketStream) -> None:
    await trio.lowlevel.checkpoint()


async def chat_beside(liar: Liar, entry: Node) -> None:
    await believed(entry, "liar")
    assert max(await chat(entry)) < BOUND_S
    assert liar.streams == 0


@pytest.mark.parametrize("greet", [like_ssh, close_at_once], ids=["SSH", "closes at once"])
async def test_an_address_where_no_node_listens_costs_nothing(
    pair: tuple[Node, Node], greet: Greeting
) -> None:
    _, entry = pair
    async with (
        listening(greet) as address,
        lying(entry, claims(), addresses=[address], name="liar") as liar,
    ):
        await chat_beside(liar, entry)


async def test_nor_does_the_address_of_another_node(pair: tuple[Node, Node]) -> None:
    owner, entry = pair
    address = parse_address(owner.me["peer"])
    async with lying(entry, claims(), addresses=[address], name="liar") as liar:
        await chat_beside(liar, entry)


@pytest.mark.full
def test_an_engine_that_stands_still_is_soon_not_ready_and_then_goes_on(
    pair: tuple[Node, Node],
) -> None:
    owner, entry = pair
    [engine] = [one for one in owner.engines() if not one.children()]
    assert ask(entry).text == ANSWER
    with ThreadPoolExecutor() as threads:
        engine.suspend()
        try:
            waiting = [threads.submit(ask, node) for node in (entry, owner)]
            taken_s = wait_until(lambda: states(entry) == ["loading"], "not ready", within_s=9.0)
        finally:
            engine.resume()
        assert [one.result().text for one in waiting] == [ANSWER] * 2
    assert taken_s > 2, "a moment of silence is nothing"
    assert engine in owner.engines(), "it was not started anew"
