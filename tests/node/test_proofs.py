from __future__ import annotations

import json

import h11
import pytest
import trio
from trio.testing import MockClock, memory_stream_pair, wait_all_tasks_blocked

from p2pmesh.errors import LinkError, MeshError
from p2pmesh.models.parts import PartId, ReplicaKey
from p2pmesh.node.proofs import ANSWER_S, RETRY_S, Proofs, ask_replica
from tests.state.builders import NODES, digest

REPLICA = ReplicaKey(NODES[1], PartId(digest(1)))
OTHER = ReplicaKey(NODES[1], PartId(digest(2)))


class Asked:
    """Proofs of which the test decides how they end."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []
        self.changes = 0
        self.failure: MeshError | None = None
        self.hangs = False
        self.proofs = Proofs(self.ask, self.changed)

    async def ask(self, replica: tuple[object, ...]) -> None:
        self.asked.append(replica)
        if self.hangs:
            await trio.sleep_forever()
        if self.failure is not None:
            raise self.failure

    def changed(self) -> None:
        self.changes += 1


async def test_an_answer_is_remembered_while_the_same_life_says_ready(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    one = Asked()
    assert not one.proofs.review({REPLICA: 7, OTHER: 7})
    one.proofs.check(REPLICA, nursery)
    await wait_all_tasks_blocked()
    assert one.changes == 1
    assert set(one.proofs.review({REPLICA: 7, OTHER: 7})) == {REPLICA}
    assert not one.proofs.review({REPLICA: 8}), "the node started anew"
    assert not one.proofs.review({REPLICA: 7}), "and what was proven before is forgotten"


async def test_a_failure_since_voids_the_proof(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    one = Asked()
    one.proofs.review({REPLICA: 7})
    for _ in range(2):
        one.proofs.check(REPLICA, nursery)
        await wait_all_tasks_blocked()
        assert set(one.proofs.review({REPLICA: 7})) == {REPLICA}
        one.proofs.void(REPLICA)
        assert not one.proofs.review({REPLICA: 7})
    assert one.asked == [REPLICA] * 2


async def test_what_is_no_longer_said_while_it_is_asked_is_not_proven(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    one = Asked()
    one.proofs.review({REPLICA: 7})
    one.proofs.check(REPLICA, nursery)
    one.proofs.review({})
    await wait_all_tasks_blocked()
    assert not one.proofs.review({REPLICA: 7})


@pytest.mark.parametrize("hangs", [True, False])
async def test_who_does_not_answer_is_asked_again_after_a_while(
    nursery: trio.Nursery, autojump_clock: MockClock, *, hangs: bool
) -> None:
    one = Asked()
    one.hangs, one.failure = hangs, LinkError("nobody is there")
    one.proofs.review({REPLICA: 7})
    for _ in range(3):
        one.proofs.check(REPLICA, nursery)
        await trio.sleep(RETRY_S / 4)
    assert one.asked == [REPLICA]
    await trio.sleep(RETRY_S / 2 + ANSWER_S)
    assert not one.proofs.review({REPLICA: 7})
    one.hangs, one.failure = False, None
    one.proofs.check(REPLICA, nursery)
    await wait_all_tasks_blocked()
    assert one.asked == [REPLICA] * 2
    assert set(one.proofs.review({REPLICA: 7})) == {REPLICA}


async def answer(stream: trio.abc.Stream, status: int) -> h11.Request:
    """Be the other node's gateway for one request."""
    http = h11.Connection(h11.SERVER)
    while not isinstance(event := http.next_event(), h11.Request):
        http.receive_data(bytes(await stream.receive_some(65536)))
    body = json.dumps({"error": {"message": "no such\nmodel\x1b[2J"}}).encode()
    head = h11.Response(status_code=status, headers=[("content-length", str(len(body)))])
    events = (head, h11.Data(data=body), h11.EndOfMessage())
    await stream.send_all(b"".join(http.send(one) or b"" for one in events))
    return event


async def test_a_replica_is_asked_as_a_request_is_forwarded() -> None:
    here, there = memory_stream_pair()
    seen: list[h11.Request] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask_replica, here, REPLICA, "embedding")
        seen.append(await answer(there, 200))
    assert (seen[0].method, seen[0].target) == (b"POST", b"/v1/embeddings")
    assert dict(seen[0].headers)[b"x-p2pmesh-part"] == str(REPLICA.part).encode()


async def test_an_error_is_no_proof() -> None:
    here, there = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer, there, 404)
        with pytest.raises(LinkError, match=r"it answered 404: no such model \[2J$"):
            await ask_replica(here, REPLICA, "chat")
