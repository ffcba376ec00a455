"""Shards whose quality may be measured.

Shell: writes files. A candidate holds what every shard of a set holds and nothing else, so no shard
of that set answers worse than it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from p2pmesh.models.experts import ExpertLists
from p2pmesh.models.importance import Ranking
from p2pmesh.models.parts import ShardKind, ShardQuality
from p2pmesh.models.shards import Places, sizes_to_measure
from p2pmesh.models.slice import read_layout, write_shard
from p2pmesh.models.store import ModelFile, Progress


class Candidate(Protocol):
    """A shard of any kind, before it is written."""

    @property
    def quality(self) -> ShardQuality:
        """Its kind, ranking, places and coverage; unmeasured."""

    @property
    def holds(self) -> str:
        """What it holds, for people: "12 of 16 experts"."""

    def write(self, output: Path, progress: Progress) -> int:
        """Write its file and return the size of that in bytes; blocks.

        Args:
            output: The file.
            progress: As for `write_shard`; what it raises stops the work, and no file is left.

        Raises:
            ModelError: The model cannot be cut, is damaged, or changed meanwhile.
            LocalError: The system does not let the model be read or the file be written.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShard:
    """A shard of whole experts."""

    model: ModelFile
    lists: ExpertLists
    quality: ShardQuality
    holds: str

    def write(self, output: Path, progress: Progress) -> int:
        """Write its file, as `Candidate` says."""
        return write_shard(self.model, self.lists, output, progress)


def expert_shards(model: ModelFile, ranking: Ranking, count: int) -> Sequence[Candidate]:
    """Return shards of whole experts, ascending.

    Args:
        model: As the store opened it.
        ranking: Of that model.
        count: How many at most.

    Raises:
        ModelError: The model has no experts, or the ranking is of another one.
        LocalError: The system does not let the model be read.
    """
    layout = read_layout(model)
    places = Places(ranking, layout)
    return [
        ExpertShard(
            model=model,
            lists=places.lists(range(critical)),
            quality=places.quality(critical),
            holds=f"{critical * layout.groups} of {layout.count} experts",
        )
        for critical in sizes_to_measure(places, count)
    ]


CANDIDATES: Mapping[ShardKind, Callable[[ModelFile, Ranking, int], Sequence[Candidate]]] = {
    ShardKind.EXPERTS: expert_shards,
}
"""How the candidates of each kind are made, ascending by size."""
