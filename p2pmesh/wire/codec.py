"""Canonical msgpack: equal values have equal bytes, and only those bytes are accepted.

Pure. Values are None, booleans, 64-bit integers, bytes, text, lists and maps with text keys; maps
are written sorted by key, everything in its shortest form. Floats are refused: they have no
place in signed facts. Decoding looks at the types and the order of keys, packs again and
compares, so a duplicate key, a long form or a foreign type cannot smuggle a second spelling of
the same value past a signature. How deep, wide and many containers may be is bounded, since a few
bytes that announce much would otherwise cost much.
"""

from __future__ import annotations

from typing import Any

import msgpack

from p2pmesh.errors import PeerError

INT_MIN = -(2**63)
INT_MAX = 2**64 - 1
DEPTH_MAX = 32  # containers within each other; what is said needs six
ITEMS_MAX = 4096  # of one list or map: the decoder makes room for as many as are announced
CONTAINERS_MAX = 8192  # in one value: each costs more to check than its byte to send

_SCALARS = frozenset({type(None), bool, int, str, bytes})
_TEXT = frozenset({str})


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
        PeerError: Too long, too deep, too wide, not msgpack, or not in canonical form.
    """
    if len(data) > bytes_max:
        raise PeerError(f"a message of {len(data)} bytes, at most {bytes_max} are allowed")
    try:
        value = msgpack.unpackb(
            data, strict_map_key=True, max_array_len=ITEMS_MAX, max_map_len=ITEMS_MAX
        )
        _check_form(value)
        canonical = msgpack.packb(value)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as exc:
        raise PeerError(f"a message that cannot be decoded: {type(exc).__name__}") from exc
    if canonical != data:
        raise PeerError("a message that is not in canonical form")
    return value


def _check_form(value: Any) -> None:
    """Refuse what packing again would not show: foreign types, unordered keys, excess.

    Level by level, so that the depth of the input is not that of the stack.
    """
    level = [value] if type(value) not in _SCALARS else []
    seen = depth = 0
    while level:
        seen, depth = seen + len(level), depth + 1
        if depth > DEPTH_MAX or seen > CONTAINERS_MAX:
            raise ValueError("too many or too deep containers")
        inner: list[Any] = []
        for container in level:
            kind = type(container)
            if kind is dict:
                keys = list(container)
                if not _TEXT.issuperset(map(type, keys)) or sorted(keys) != keys:
                    raise ValueError("map keys that are not text, or out of order")
                inner += [item for item in container.values() if type(item) not in _SCALARS]
            elif kind is list:
                inner += [item for item in container if type(item) not in _SCALARS]
            else:
                raise TypeError(f"a value of type {kind.__name__}")
        level = inner


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
