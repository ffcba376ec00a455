"""Values as people read them on a terminal.

Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from p2pmesh.engine.confinement import Confinement, described

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
ID_CHARS = 8  # of an id, as people are shown it: enough to tell the members of a mesh apart
FAR_AWAY_S = 10 * 365 * 86400  # a founder's membership ends after a lifetime
_KEPT = "\n\t"
_HERE = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - what nodes listen on


def clean(text: str) -> str:
    """Text from a peer or a model without what could steer a terminal; keeps line breaks."""
    return "".join(char for char in text if char in _KEPT or char.isprintable())


def line(value: object) -> str:
    """A value from outside as one clean line."""
    return " ".join(clean(part) for part in str(value).split())


def url(address: str) -> str:
    """Return the URL by which this machine reaches one of its listeners, without a path.

    "0.0.0.0:9337" -> "http://127.0.0.1:9337": what listens everywhere is no place to go to.
    """
    host, _, port = address.rpartition(":")
    return f"http://{_HERE.get(host, host)}:{port}"


def size(count_bytes: int) -> str:
    """1610612736 -> "1.5 GiB"."""
    value, at = float(max(0, count_bytes)), 0
    while value >= 1024 and at < len(_UNITS) - 1:
        value, at = value / 1024, at + 1
    return f"{value:.0f} {_UNITS[at]}" if at == 0 or value >= 100 else f"{value:.1f} {_UNITS[at]}"


def duration(seconds: float) -> str:
    """4210 -> "1 h 10 min"."""
    whole = int(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{whole} s"


def time_left(until: float | None, now: float) -> str:
    """Return how long it is until a unix time in seconds; "-" for none or one far away."""
    if until is None or until - now > FAR_AWAY_S:
        return "-"
    return duration(max(0, until - now))


def count(number: int, noun: str) -> str:
    """2, "node" -> "2 nodes"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def milliseconds(value: float | None) -> str:
    """1.84 -> "1.8 ms"; "-" when there is none."""
    if value is None:
        return "-"
    return f"{value:.1f} ms" if value < 10 else f"{value:.0f} ms"


def engine(status: Mapping[str, Any]) -> str:
    """The engine of a node's status in a few words."""
    name = line(f"{status['kind']} {status['version']} ({status['source']})")
    devices = ", ".join(line(f"{one['id']} {one['description']}") for one in status["devices"])
    return f"{name}, {devices}" if devices else name


def confinement(status: Mapping[str, Any]) -> str:
    """How far the engines of a node's status are kept from the rest of its machine."""
    stages = status["rpc_confinement"]
    return described(
        Confinement(**status["confinement"]), None if stages is None else Confinement(**stages)
    )


def layers(found: list[int] | None) -> str:
    """Which layers of a model, as ` layers 2-6`; empty for all of it."""
    if found is None:
        return ""
    first, last = found
    return f" layer {first}" if first == last else f" layers {first}-{last}"


def held(part: Mapping[str, Any]) -> str:
    """Return what a part holds of its model: ` layers 2-6`, ` 11/16 experts`, or "" for all."""
    if part["experts"] is None:
        return layers(part["layers"])
    return f" {experts(part['experts'])}"


def experts(held: Mapping[str, Any]) -> str:
    """How much a shard holds of the experts, as `11/16 experts` or `10/16 of each expert`."""
    what = "experts" if held["kind"] == "experts" else "of each expert"
    return f"{held['held']}/{held['of']} {what}"
