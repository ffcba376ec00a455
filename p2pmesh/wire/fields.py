"""Reading fields out of decoded values, each with its type and bound. Pure.

Unknown fields are left alone: a newer peer may say more than this version understands.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from p2pmesh.errors import PeerError

T = TypeVar("T")


def as_map(value: Any, what: str) -> dict[str, Any]:
    """`value` if it is a map.

    Raises:
        PeerError: It is not; `what` names the place.
    """
    if type(value) is not dict:
        raise PeerError(f"{what} is not a map")
    return value


def take(
    fields: dict[str, Any],
    name: str,
    kind: type[T],
    *,
    size_max: int = 4096,
    default: T | None = None,
) -> T:
    """The field `name`, which must be of exactly that type.

    Args:
        fields: A decoded map.
        name: The field.
        kind: Its type; integers must also not be negative.
        size_max: Bound on the length of text, bytes and lists.
        default: The value of a field that is not there; None where it must be.

    Raises:
        PeerError: Missing, of another type, negative, or too long.
    """
    value = fields.get(name, default)
    if type(value) is not kind:
        raise PeerError(f"field {name!r} is not of type {kind.__name__}")
    if isinstance(value, (str, bytes, list)) and len(value) > size_max:
        raise PeerError(f"field {name!r} is longer than {size_max}")
    if isinstance(value, int) and value < 0:
        raise PeerError(f"field {name!r} is negative")
    return value


def take_list(fields: dict[str, Any], name: str, kind: type[T], *, size_max: int) -> tuple[T, ...]:
    """The list `name`, all of whose items are of exactly that type.

    Raises:
        PeerError: As `take`, or an item of another type.
    """
    items = take(fields, name, list, size_max=size_max)
    if any(type(item) is not kind for item in items):
        raise PeerError(f"field {name!r} holds something that is not of type {kind.__name__}")
    return tuple(items)


def take_rows(
    fields: dict[str, Any], name: str, read: Callable[[Any], T], *, count_max: int
) -> Iterator[T]:
    """The rows of the list `name` that can be read, of the first `count_max`; none without it.

    A newer peer may have rows of kinds that this version does not know; they are its own affair.

    Args:
        fields: A decoded map.
        name: The field.
        read: Makes something of a row, or raises `PeerError`.
        count_max: How many rows are looked at.

    Raises:
        PeerError: The field is no list.
    """
    for row in take(fields, name, list, size_max=sys.maxsize, default=[])[:count_max]:
        try:
            yield read(row)
        except PeerError:
            continue


def take_exactly(fields: dict[str, Any], name: str, size: int) -> bytes:
    """The bytes `name`, which must be `size` long.

    Raises:
        PeerError: As `take`, or of another length.
    """
    value = take(fields, name, bytes, size_max=size)
    if len(value) != size:
        raise PeerError(f"field {name!r} has the wrong length")
    return value


def take_bytes(
    fields: dict[str, Any], name: str, *, count_max: int, size_max: int, size_min: int = 0
) -> tuple[bytes, ...]:
    """The list `name` of at most `count_max` byte strings, each with a length within bounds.

    Raises:
        PeerError: As `take_list`, or an item that is too short or too long.
    """
    items = take_list(fields, name, bytes, size_max=count_max)
    if not all(size_min <= len(item) <= size_max for item in items):
        raise PeerError(f"field {name!r} holds something of a wrong length")
    return items
