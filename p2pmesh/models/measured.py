"""What was measured of the shards of a ranking, in a file beside it.

Shell: reads and writes files. `DIGEST.measured` is JSON; what cannot be read there is left out, as
it can be measured again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import structlog

from p2pmesh.home import read_json, write_atomic
from p2pmesh.models.parts import MEASURES_MAX, PLACES_MAX, ShardKind, ShardQuality
from p2pmesh.sharing import DIVERGENCE_LIMIT, MILLION

SUFFIX = ".measured"

log = structlog.get_logger(__name__)


def add(folder: Path, ranking: str, measured: Iterable[ShardQuality]) -> None:
    """Keep measured qualities beside a ranking; newer ones take the place of those alike.

    Raises:
        LocalError: Disk full, no permission.
    """
    known = {one[:4]: one for one in load(folder, ranking)}
    known |= {one[:4]: one for one in measured if one.is_measured and one.ranking == ranking}
    rows = [[one.kind.value, *one[2:]] for one in sorted(known.values())]
    write_atomic(folder / f"{ranking}{SUFFIX}", json.dumps(rows).encode())


def load(folder: Path, ranking: str) -> tuple[ShardQuality, ...]:
    """Return what was measured of the shards of a ranking; () where that is nothing or damaged."""
    path = folder / f"{ranking}{SUFFIX}"
    try:
        rows = read_json(path)
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as exc:
        log.warning("measures_unreadable", path=str(path), reason=str(exc))
        return ()
    if not isinstance(rows, list):
        rows = []
    found = (_quality(ranking, row) for row in rows[:MEASURES_MAX])
    return tuple(one for one in found if one is not None)


def _quality(ranking: str, row: Any) -> ShardQuality | None:
    match row:
        case [str(kind), int(places), int(critical), int(divergence), int(coverage)] if (
            kind in set(ShardKind)
            and 0 < critical < places <= PLACES_MAX
            and 0 <= divergence <= DIVERGENCE_LIMIT
            and 0 <= coverage <= MILLION
        ):
            return ShardQuality(ShardKind(kind), ranking, places, critical, divergence, coverage)
    return None
