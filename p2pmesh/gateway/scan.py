"""Reads the top level of a JSON object without building what is inside.

Pure. `json.loads` holds the interpreter lock for the whole text and can make a gigabyte of objects
out of 64 MiB; this walks the bytes in small steps, so that it can run in a thread beside the event
loop, and keeps nothing. It checks only as much as it needs: whoever gets the body parses it fully.
"""

from __future__ import annotations

import json
import mmap
import re
from typing import Any

# Brackets and strings in one body, far above any real request: a bound on time, about a second.
# Escaped quotes are not counted: a second for each 8 MiB of nothing else.
MARKS_MAX = 2_000_000

# The top-level values that are read are names and switches; a longer one is not.
VALUE_BYTES_MAX = 4096

# A request's body: bytes, or a mapping for a large one (`bodies.py`).
Body = bytes | mmap.mmap

_MARK = re.compile(rb'["\[\]{}]')
_KEY = re.compile(rb"\s*:\s*")
_BLANK = re.compile(rb"\s*")
_SCALAR = re.compile(rb"[^,\]}\s]*")


def top_level(body: Body, wanted: frozenset[str]) -> dict[str, Any]:
    """The values of the `wanted` keys of the object in `body`, the last of each.

    A wanted key whose value is an object or an array reads as an empty list.

    Raises:
        ValueError: It is not one JSON object, as far as that was looked at.
    """
    at = _skip(_BLANK, body, 0)
    if body[at : at + 1] != b"{":
        raise ValueError("the body is not a JSON object")
    found: dict[str, Any] = {}
    depth = 0
    for _ in range(MARKS_MAX):
        mark = _MARK.search(body, at)
        if mark is None:
            raise ValueError("the body ends inside the object")
        at = mark.end()
        match mark.group():
            case b'"':
                start, at = mark.start(), _string_end(body, at)
                colon = _KEY.match(body, at) if depth == 1 else None
                if colon is not None:
                    at = colon.end()
                    key = _decode(body, start, colon.start())
                    if key in wanted:
                        found[key] = _value(body, at)
                    if body[at : at + 1] == b'"':  # a string value must not pass for a key
                        at = _string_end(body, at + 1)
            case b"{" | b"[":
                depth += 1
            case _:
                depth -= 1
                if depth == 0:
                    if _skip(_BLANK, body, at) != len(body):
                        raise ValueError(f"more text follows the object at byte {at}")
                    return found
    raise ValueError(f"the body has more than {MARKS_MAX} values")


def _skip(pattern: re.Pattern[bytes], body: Body, at: int) -> int:
    matched = pattern.match(body, at)
    assert matched is not None, "the pattern matches the empty text"
    return matched.end()


def _string_end(body: Body, at: int) -> int:
    """The index after the quote that closes the string whose text starts at `at`."""
    while True:
        quote = body.find(b'"', at)
        if quote < 0:
            raise ValueError("the body ends inside a string")
        text = body[at:quote]  # a run of backslashes cannot reach behind the last quote
        if (len(text) - len(text.rstrip(b"\\"))) % 2 == 0:
            return quote + 1
        at = quote + 1


def _decode(body: Body, start: int, end: int) -> Any:
    if end - start > VALUE_BYTES_MAX:
        return None
    return json.loads(body[start:end])


def _value(body: Body, at: int) -> Any:
    first = body[at : at + 1]
    if first == b'"':
        return _decode(body, at, _string_end(body, at + 1))
    if first in (b"{", b"["):
        return []
    return _decode(body, at, _skip(_SCALAR, body, at))
