"""Shards whose quality may be measured.

Shell: reads and writes files. A candidate holds what every shard of a set holds and nothing else,
so no shard of that set answers worse than it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from p2pmesh.errors import LocalError
from p2pmesh.models import rankings
from p2pmesh.models.importance import Ranking
from p2pmesh.models.parts import ShardKind, ShardQuality
from p2pmesh.models.shards import Places, RankedPlaces, sizes_to_measure
from p2pmesh.models.slice import of_headers, read_layout, write_planned
from p2pmesh.models.store import ModelFile, Progress
from p2pmesh.models.thin import thin_layout_of
from p2pmesh.models.thin_places import ThinPlaces


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A shard of any kind, before it is written.

    Attributes:
        model: What it is cut from.
        places: Of a ranking of that model.
        critical: How many of them it holds.
    """

    model: ModelFile
    places: RankedPlaces
    critical: int

    @property
    def kind(self) -> ShardKind:
        """Return whether it leaves out experts or neurons."""
        return self.places.kind

    @property
    def quality(self) -> ShardQuality:
        """Return its kind, ranking, places and coverage; unmeasured."""
        return self.places.quality(self.critical)

    @property
    def holds(self) -> str:
        """Return what it holds, for people: "12 of 16 experts"."""
        return self.places.holds(self.critical)

    def write(self, output: Path, progress: Progress) -> int:
        """Write its file and return the size of that in bytes; blocks.

        Args:
            output: The file.
            progress: As for `write_planned`; what it raises stops the work, and no file is left.

        Raises:
            ModelError: The model cannot be cut, is damaged, or changed meanwhile.
            LocalError: The system does not let the model be read or the file be written.
        """
        return write_planned(self.model, self.places.plan(self.critical), output, progress)


def candidates(
    kind: ShardKind, model: ModelFile, ranking: Ranking, folder: Path
) -> Sequence[Candidate]:
    """Return shards of one kind, ascending.

    Args:
        kind: Which.
        model: As the store opened it.
        ranking: Of that model.
        folder: Where rankings are, and with them the scores of neurons.

    Raises:
        ModelError: No such shard of the model would be right, or the ranking is of another one.
        LocalError: The system does not let the model be read, or there are no scores of neurons.
    """
    places = _places(kind, model, ranking, folder)
    return [
        Candidate(model=model, places=places, critical=critical)
        for critical in sizes_to_measure(places)
    ]


def _places(kind: ShardKind, model: ModelFile, ranking: Ranking, folder: Path) -> RankedPlaces:
    if kind is ShardKind.EXPERTS:
        return Places(ranking, read_layout(model))
    neurons = rankings.load_neurons(folder, ranking)
    if neurons is None:
        raise LocalError(
            f"There are no scores of the neurons of {model.stem} here; make them with p2pmesh "
            f"experts rank {model.stem}"
        )
    return ThinPlaces(ranking, neurons, of_headers(model, thin_layout_of))
