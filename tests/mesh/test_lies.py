"""Valid lies of a member: what it signs about itself moves nothing but its own part."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import trio

from p2pmesh.identity.keys import NodeId, SigningKey, parse_id
from p2pmesh.placement.rendezvous import rank
from p2pmesh.state.registers import ModelRequest, wants_to_wire
from p2pmesh.wire.registers import WANTS
from tests.mesh.hostile import (
    ANSWER,
    answers,
    ask,
    claims,
    demo,
    describes,
    gives,
    holds,
    key_below,
    lying,
    never_answer,
)
from tests.mesh.nodes import Node, running, wait_until

HEARD_S = 10.0


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    with running(tmp_path_factory.mktemp("pair"), 2) as nodes:
        assert answers(*nodes)
        yield nodes


async def in_thread(question: Callable[[], bool], what: str) -> None:
    await trio.to_thread.run_sync(partial(wait_until, question, what, within_s=HEARD_S))


def knows(node: Node, name: str) -> bool:
    return any(one["name"] == name for one in node.status()["nodes"])


async def heard(pair: list[Node], name: str) -> None:
    await in_thread(lambda: all(knows(node, name) for node in pair), f"{name} is known")


def said(node: Node) -> list[str]:
    """The answers to a request for any model, and for the embedded one by its name."""
    return [ask(node, timeout_s=20.0).text, ask(node, model=demo().stem, timeout_s=20.0).text]


def engines(pair: list[Node]) -> set[int]:
    return {process.pid for node in pair for process in node.engines()}


async def both_answer(pair: list[Node]) -> bool:
    texts = [await trio.to_thread.run_sync(said, node) for node in pair]
    return texts == [[ANSWER, ANSWER]] * len(pair)


@pytest.mark.parametrize(
    "lie",
    [
        describes(gives=frozenset({"embedding"})),
        describes(size_bytes=2**62, other_bytes=2**62),
        describes(context=1),
    ],
    ids=["modality", "size", "context"],
)
async def test_a_false_card_changes_nothing_for_others(pair: list[Node], lie: object) -> None:
    before = engines(pair)
    async with lying(
        pair[0],
        gives(2**40),
        holds(lie),  # type: ignore[arg-type]  # a `Held`
        key=key_below(*pair),
        name="poisoner",
    ):
        await heard(pair, "poisoner")
        assert await both_answer(pair)
    assert await both_answer(pair), "nor once it has gone"
    assert engines(pair) == before


def _preferred(pair: list[Node]) -> SigningKey:
    """A key whose node the plan takes before the honest ones, for the embedded model."""
    honest = [NodeId(parse_id(node.me["id"])) for node in pair]
    while True:
        key = SigningKey(secrets.token_bytes(32))
        mine = NodeId(key.id)
        if rank(demo().digest, [(node, 1) for node in (*honest, mine)])[0] == mine:
            return key


async def test_who_says_ready_and_never_answers_takes_no_copy_away(pair: list[Node]) -> None:
    before = engines(pair)
    async with lying(
        pair[0],
        gives(2**63),
        holds(demo()),
        claims(),
        on_stream=never_answer,
        key=_preferred(pair),
        name="thief",
    ) as thief:
        await heard(pair, "thief")
        await in_thread(lambda: thief.streams > 0, "it is asked for a token")
        assert engines(pair) == before


async def test_a_huge_model_that_nobody_wants_is_not_what_auto_means(pair: list[Node]) -> None:
    other = demo().__class__(
        digest=type(demo().digest)("a" * 64),
        stem="huge",
        card=describes(size_bytes=2**63 - 1).card,
    )
    async with lying(
        pair[0], gives(2**63), holds(other), claims([other.digest]), on_stream=never_answer
    ) as liar:
        await heard(pair, "liar")
        assert await both_answer(pair)
        assert liar.streams == 0


async def test_one_members_wishes_leave_the_embedded_model_running(pair: list[Node]) -> None:
    before = engines(pair)
    wish = ModelRequest(
        digest=demo().digest, stem=demo().stem, replicas=1024, priority=1000, context=1, slots=64
    )
    missing = ModelRequest(
        digest=type(demo().digest)("b" * 64),
        stem=demo().stem,
        replicas=1,
        priority=1000,
        context=0,
        slots=0,
    )
    async with lying(pair[0], {WANTS: wants_to_wire([wish, missing])}, name="wisher"):
        await heard(pair, "wisher")
        assert await both_answer(pair)
        assert engines(pair) == before, "no second copy, no restart"
