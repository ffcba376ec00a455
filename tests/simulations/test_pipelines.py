from __future__ import annotations

import pytest
import trio

from simulations.pipelines import carry, even_layers


@pytest.mark.parametrize(
    ("layers", "count", "behind"), [(8, 2, [4]), (8, 3, [3, 3]), (4, 3, [1, 2]), (5, 2, [3])]
)
def test_nodes_share_layers_evenly(layers: int, count: int, behind: list[int]) -> None:
    assert even_layers(layers, count) == behind


def pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    near, far = trio.socket.socketpair()
    return trio.SocketStream(near), trio.SocketStream(far)


async def test_what_is_carried_comes_whole_and_late() -> None:
    (near, source), (sink, far) = pair(), pair()
    sent = bytes(range(256)) * 4096
    async with near, source, sink, far, trio.open_nursery() as nursery:
        began_s = trio.current_time()
        nursery.start_soon(carry, source, sink, 0.02)
        nursery.start_soon(near.send_all, sent)
        got = bytearray(await far.receive_some(1))
        assert trio.current_time() - began_s >= 0.02
        while len(got) < len(sent):
            got += await far.receive_some()
        assert got == sent
        await near.send_eof()
        assert await far.receive_some() == b""


async def test_carrying_ends_when_nobody_is_left_to_hear() -> None:
    (near, source), (sink, far) = pair(), pair()
    async with near, source, sink:
        await far.aclose()
        await near.send_all(b"a")
        with trio.fail_after(5):
            await carry(source, sink, 0.001)
    assert near.socket.fileno() == -1
