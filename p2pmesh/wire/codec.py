"""Canonical msgpack: equal values have equal bytes, and only those bytes are accepted.

Pure. Values are None, booleans, 64-bit integers, bytes, text, lists and maps with text keys; maps
are written sorted by key, everything in its shortest form. Floats are refused: they have no
place in signed facts. Decoding re-encodes and compares, so a duplicate key, a long form or a
foreign type cannot smuggle a second spelling of the same value past a signature.
"""

from __future__ import annotations

from typing import Any

import msgpack

from p2pmesh.errors import PeerError

INT_MIN = -(2**63)
INT_MAX = 2**64 - 1


def encode(value: Any) -> bytes:
    """The canonical bytes of `value`; tuples count as lists.

    Raises:
        TypeError: `value` holds something that the wire has no form for: our own bug.
        OverflowError: An integer does not fit 64 bits.
    """
    data = msgpack.packb(_ordered(value), use_bin_type=True)
    assert isinstance(data, bytes)
    return data


def decode(data: bytes, *, bytes_max: int) -> Any:
    """The value behind canonical bytes from outside.

    Args:
        data: What a peer sent.
        bytes_max: Longer input is refused unread.

    Raises:
        PeerError: Too long, not msgpack, or not in canonical form.
    """
    if len(data) > bytes_max:
        raise PeerError(f"a message of {len(data)} bytes, at most {bytes_max} are allowed")
    try:
        value = msgpack.unpackb(data, raw=False, strict_map_key=True)
        canonical = encode(value)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as exc:
        raise PeerError(f"a message that cannot be decoded: {type(exc).__name__}") from exc
    if canonical != data:
        raise PeerError("a message that is not in canonical form")
    return value


def _ordered(value: Any) -> Any:
    # Exact types: a subclass (an enum, msgpack's Timestamp) could encode as something else.
    kind = type(value)
    if kind is dict:
        for key in value:
            if type(key) is not str:
                raise TypeError(f"map key of type {type(key).__name__}")
        return {key: _ordered(value[key]) for key in sorted(value)}
    if kind is list or kind is tuple:
        return [_ordered(item) for item in value]
    if kind is int and not INT_MIN <= value <= INT_MAX:
        raise OverflowError("an integer of more than 64 bits")
    if value is None or kind in (bool, int, str, bytes):
        return value
    raise TypeError(f"a value of type {kind.__name__}")
