"""Messages of a possible newer protocol, which nodes of this version must get along with.

It has messages of another kind, fields beside those that are known here, a register of its own,
and more in the `member` body. The first two are skipped wherever they arrive; the records have to
reach everybody in their exact bytes, through nodes that understand none of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from p2pmesh.identity import hello
from p2pmesh.wire.codec import decode, encode
from p2pmesh.wire.messages import MESSAGE_BYTES_MAX, Message, Ping, encode_message

NEWER = max(hello.VERSIONS) + 1
VERSIONS = (*hello.VERSIONS, NEWER)  # that a newer node speaks
REGISTER = "future"
MODALITY = "smell"

_NEWS = encode({"t": "rumour", "about": [1, {"deep": b"x"}], "z": None})
_UNKNOWN_ROWS = (
    ["0" * 64, "whole", "dancing", ""],
    ["0" * 64, "stage-0011aabb-0", "ready", ""],
    {"stage": 3},
    "word",
)
_FIELDS: Mapping[str, Any] = {"colour": "green", "extra": [1, [2, b"three"]]}


def in_newer_words(message: Message) -> Iterator[bytes]:
    """How a newer shell says this to another one: with more fields, and a kind of its own."""
    if isinstance(message, Ping):
        yield _NEWS
    fields = decode(encode_message(message), bytes_max=MESSAGE_BYTES_MAX)
    yield encode({**fields, **_FIELDS})


def newer_words(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a register that this version knows, as a newer node writes it.

    With fields and columns of its own, rows of kinds and states that nobody here knows, and a
    modality besides the known ones.
    """
    said = {name: _newer_rows(value) for name, value in body.items()}
    return {**said, **_FIELDS}


def _newer_rows(value: Any) -> Any:
    if not isinstance(value, list) or not value or isinstance(value[0], str):
        return value
    return [*_UNKNOWN_ROWS, *(_newer_row(row) for row in value)]


def _newer_row(row: Any) -> Any:
    if isinstance(row, list):
        return [*row, "column"]
    fields = {**row, **_FIELDS}
    if "card" in fields:
        card = fields["card"]
        fields["card"] = {**card, **_FIELDS, "takes": sorted([*card["takes"], MODALITY])}
    return fields


def newer_body(number: int) -> dict[str, Any]:
    """Return the body that a newer node adds in a register of its own."""
    return {"node": number, **_FIELDS}
