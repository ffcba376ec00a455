"""How many bytes a message is on a link, without writing them.

Simulated nodes hand each other objects: writing and reading each of them would take most of the
time of a run. Sizes follow from the forms of msgpack; one message in a hundred is written, read
again and compared, so that neither these sums nor the codec can be wrong for long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import Random
from typing import Any

from p2pmesh.wire.facts import FACT_KINDS
from p2pmesh.wire.messages import (
    FINGERPRINT_BYTES,
    PLAN_DIGEST_BYTES,
    Ack,
    FetchRequest,
    Items,
    Message,
    Ping,
    Push,
    Ranges,
    decode_message,
    encode_message,
)
from p2pmesh.wire.records import DIGEST_BYTES
from simulations.schedule import ViolationError

WRITTEN = 0.01  # share of messages that go through the codec


def size_of(message: Message) -> int:
    """The length of `encode_message(message)`, in bytes."""
    size = _SIZES.get(type(message))
    return len(encode_message(message)) if size is None else size(message)


def check_codec(message: Message) -> None:
    """Write a message, read it again, and compare.

    Raises:
        ViolationError: It comes back as another one, or has another size.
    """
    data = encode_message(message)
    if decode_message(data) != message or len(data) != size_of(message):
        raise ViolationError(f"{message!r:.200} does not survive its own encoding")


class Scale:
    """Weighs messages, and tries the codec on some of them.

    Args:
        rng: Decides on which.
    """

    def __init__(self, rng: Random) -> None:
        self._draw = rng.random

    def size(self, message: Message | bytes) -> int:
        """In bytes, without what carries it; raises as `check_codec`."""
        if isinstance(message, bytes):
            return len(message)
        if self._draw() < WRITTEN:
            check_codec(message)
        return size_of(message)


def _number(value: int) -> int:
    """Of an integer that is not negative."""
    if value < 1 << 7:
        return 1
    if value < 1 << 8:
        return 2
    if value < 1 << 16:
        return 3
    return 5 if value < 1 << 32 else 9


def _binary(length: int) -> int:
    return length + (2 if length < 1 << 8 else 3 if length < 1 << 16 else 5)


def _list(items: Iterable[int], length: int) -> int:
    return sum(items) + (1 if length < 16 else 3 if length < 1 << 16 else 5)


def _binaries(values: tuple[bytes, ...]) -> int:
    if not values:
        return 1
    return _list([_binary(len(value)) for value in values], len(values))


def _frame(message: Message, *, without: int) -> int:
    """Return the bytes of a kind's smallest message without its values."""
    return len(encode_message(message)) - without


def _sign(kind: type[Ping | Ack]) -> Callable[[Any], int]:
    smallest = kind(
        token=0,
        at_ms=0,
        cutoff=0,
        fingerprint=bytes(FINGERPRINT_BYTES),
        plan=bytes(PLAN_DIGEST_BYTES),
        keep=False,
    )
    frame = _frame(smallest, without=4)

    def size(sign: Ping | Ack) -> int:
        numbers = _number(sign.token) + _number(sign.at_ms) + _number(sign.cutoff)
        recent = len(sign.recent)  # ids, all of one length
        return frame + numbers + (1 if recent < 16 else 3) + recent * _ID

    return size


_ID = _binary(DIGEST_BYTES)
_FACTS = _frame(Push(), without=len(FACT_KINDS))
_RANGES = _frame(Ranges(ranges=()), without=1)
_ITEMS = _frame(Items(lower=b"", upper=b"", ids=(), answer=False), without=5)
_WANT = _frame(FetchRequest(ids=()), without=1)


def _facts(facts: Push) -> int:
    return _FACTS + sum(_binaries(facts.of(kind)) for kind in FACT_KINDS.values())


def _ranges(ranges: Ranges) -> int:
    rows = (
        1 + _binary(len(one.lower)) + _binary(len(one.upper)) + _number(one.count) + 18
        for one in ranges.ranges
    )
    return _RANGES + _list(rows, len(ranges.ranges))


def _items(items: Items) -> int:
    return _ITEMS + _binary(len(items.lower)) + _binary(len(items.upper)) + _binaries(items.ids)


def _want(want: FetchRequest) -> int:
    return _WANT + _binaries(want.ids)


_SIZES: dict[type, Callable[[Any], int]] = {
    Ping: _sign(Ping),
    Ack: _sign(Ack),
    Push: _facts,
    Ranges: _ranges,
    Items: _items,
    FetchRequest: _want,
}
