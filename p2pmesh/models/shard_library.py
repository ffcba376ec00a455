"""What this machine knows of the shards of its models: rankings, what was measured, and the files.

Shell: synchronous, for threads. Commands write rankings and measures while a node runs, so the
folder is looked at again and again, and read only when something in it has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import structlog

from p2pmesh.errors import MeshError, ModelError
from p2pmesh.models import measured, rankings
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.experts import ExpertLayout
from p2pmesh.models.importance import (
    Neurons,
    Ranking,
    RankingDigest,
    digest_of,
    from_bytes,
    to_bytes,
)
from p2pmesh.models.parts import QUALITIES_MAX, Shard, ShardKind, ShardQuality
from p2pmesh.models.shard_cache import ShardCache
from p2pmesh.models.shards import Places, RankedPlaces
from p2pmesh.models.slice import of_headers, read_layout
from p2pmesh.models.store import ModelFile, Progress
from p2pmesh.models.thin import is_of, thin_layout_of
from p2pmesh.sharing import COVERAGE_LEAST

_Stamp = frozenset[tuple[str, int]]

log = structlog.get_logger(__name__)


class ShardLibrary:
    """The rankings in one folder, and the shards by them.

    Args:
        folder: Where rankings lie, each with what was measured of its shards.
        cache: Where files of shards are kept.
    """

    def __init__(self, folder: Path, cache: ShardCache) -> None:
        self._folder, self._cache = folder, cache
        self._seen: tuple[_Stamp, frozenset[ModelDigest]] | None = None
        self._known: Mapping[ModelDigest, tuple[ShardQuality, ...]] = {}
        self._layouts: dict[ModelDigest, ExpertLayout] = {}

    def known(self, model: ModelDigest) -> tuple[ShardQuality, ...]:
        """Return how good shards of a model are, as of the last look; the measured ones first."""
        return self._known.get(model, ())

    def look(self, models: Mapping[ModelDigest, ModelFile]) -> bool:
        """Look for what is known of the shards of these models; whether that has changed."""
        stamp = self._stamp(), frozenset(models)
        if stamp == self._seen:
            return False
        before, self._seen = self._known, stamp
        found: dict[ModelDigest, list[ShardQuality]] = {}
        for ranking in self._rankings(models):
            try:
                found.setdefault(ranking.model, []).extend(self._qualities(ranking, models))
            except MeshError as exc:
                log.warning("ranking_not_used", ranking=digest_of(ranking), reason=str(exc))
        self._known = {model: _told(rows) for model, rows in found.items()}
        return self._known != before

    def read(self, digest: RankingDigest) -> bytes | None:
        """Return the bytes of a ranking; None when it is not here.

        Raises:
            ModelError: The file is damaged.
            LocalError: The system does not let it be read.
        """
        ranking = rankings.load(self._folder, digest)
        return None if ranking is None else to_bytes(ranking)

    def take(self, digest: RankingDigest, data: bytes) -> None:
        """Keep a ranking that a peer sent.

        Raises:
            ModelError: It is not the ranking of this digest.
            PeerError: It is no ranking.
            LocalError: Disk full, no permission.
        """
        ranking = from_bytes(data)
        if digest_of(ranking) != digest:
            raise ModelError("it is another ranking than the one asked for")
        rankings.save(self._folder, ranking)

    def adopt(self, digest: RankingDigest, claims: Collection[ShardQuality]) -> None:
        """Keep what peers say that they measured, as far as nothing is known here.

        Raises:
            LocalError: Disk full, no permission.
        """
        known = {one[:4] for one in measured.load(self._folder, digest)}
        new = [one for one in claims if one.is_measured and one[:4] not in known]
        if new:
            measured.add(self._folder, digest, new)

    def lacks(self, file: ModelFile, model: ModelDigest, kind: ShardKind, ranking: str) -> str:
        """Return what this node lacks for shards: `ranking`, `neurons`, or "" for nothing.

        Args:
            file: The whole model.
            model: Its digest.
            kind: Of the shards.
            ranking: The digest of theirs.

        Raises:
            ModelError: The ranking is of another model.
            LocalError: The system does not let it be read.
        """
        try:
            found = rankings.load(self._folder, RankingDigest(ranking))
        except ModelError as exc:
            log.warning("ranking_damaged", reason=str(exc))
            return "ranking"
        if found is None:
            return "ranking"
        if kind is not ShardKind.THIN or found.neurons is None:
            return ""
        # It may be a peer's, and says how large the file is that would be fetched.
        if found.model != model or not is_of(found, of_headers(file, thin_layout_of)):
            raise ModelError("the ranking of its experts is of another model")
        return "" if rankings.neurons_path(self._folder, found.neurons).is_file() else "neurons"

    def neurons(self, digest: str) -> Path | None:
        """Return the file with the scores of neurons of this digest; None when it is not here."""
        path = rankings.neurons_path(self._folder, Neurons(digest, 0))
        return path if path.is_file() else None

    def ranking(self, digest: RankingDigest) -> Ranking | None:
        """Return a ranking; None when it is not here. Raises as `read`."""
        return rankings.load(self._folder, digest)

    def taking_neurons(self, ranking: Ranking) -> AbstractContextManager[Callable[[bytes], object]]:
        """See `rankings.taking_neurons`."""
        return rankings.taking_neurons(self._folder, ranking)

    def make(
        self, file: ModelFile, digest: ModelDigest, shard: Shard, progress: Progress | None = None
    ) -> Path:
        """Return the file of a shard, which is written unless it is here; blocks meanwhile.

        Args:
            file: The whole model.
            digest: Of the whole model.
            shard: What to keep; its ranking must be here.
            progress: As for `slice.write_shard`.

        Raises:
            ModelError: The ranking is not here, or of another model; the shard has too little of
                what matters by it, whatever was claimed; the model cannot be cut.
            LocalError: It would take more disk than shards may, or the system does not let the
                files be read or written; of a thin shard, the scores of neurons are not here.
        """
        ranking = rankings.load(self._folder, RankingDigest(shard.ranking))
        if ranking is None or ranking.model != digest:
            raise ModelError("the ranking of its experts is not here")
        if shard.kind is ShardKind.THIN:
            _check_likely(self._thin(ranking, file), shard)
            neurons = rankings.load_neurons(self._folder, ranking)
            return self._cache.make_thin(file, digest, ranking, neurons, shard, progress=progress)
        places = Places(ranking, self._layout(digest, file))
        lists = places.of(shard)
        _check_likely(places, shard)
        return self._cache.make(file, digest, lists, ranking=shard.ranking, progress=progress)

    def _qualities(
        self, ranking: Ranking, models: Mapping[ModelDigest, ModelFile]
    ) -> Iterator[ShardQuality]:
        """Yield what is known of shards that this node can make: it vouches for them by that."""
        file = models[ranking.model]
        known = measured.load(self._folder, digest_of(ranking))
        kinds = (Places(ranking, self._layout(ranking.model, file)), self._thin(ranking, file))
        for places in kinds:
            if places is not None:
                mine = (
                    one for one in known if one.kind is places.kind and one.places == places.count
                )
                yield from (places.quality(one.critical, one.divergence) for one in mine)
                if predicted := places.predicted():
                    yield predicted

    def _thin(self, ranking: Ranking, file: ModelFile) -> RankedPlaces | None:
        """Return the places of thin shards; None where there are none of that model."""
        neurons = rankings.load_neurons(self._folder, ranking)
        if neurons is None:
            return None
        from p2pmesh.models.thin_places import ThinPlaces  # late: numpy, as in rankings.py

        try:
            return ThinPlaces(ranking, neurons, of_headers(file, thin_layout_of))
        except ModelError as exc:
            log.info("no_thin_shards", path=str(file.parts[0]), reason=str(exc))
            return None

    def _layout(self, digest: ModelDigest, file: ModelFile) -> ExpertLayout:
        if digest not in self._layouts:
            self._layouts[digest] = read_layout(file)
        return self._layouts[digest]

    def _rankings(self, models: Mapping[ModelDigest, ModelFile]) -> Iterator[Ranking]:
        """The readable rankings of these models."""
        for path in sorted(self._folder.glob(f"*{rankings.SUFFIX}")):
            try:
                ranking = rankings.load(self._folder, RankingDigest(path.stem))
            except MeshError as exc:
                log.warning("ranking_not_used", path=str(path), reason=str(exc))
                continue
            if ranking is not None and ranking.model in models:
                yield ranking

    def _stamp(self) -> _Stamp:
        stamps: list[tuple[str, int]] = []
        for path in self._folder.glob("*"):
            try:
                stamps.append((path.name, path.stat().st_mtime_ns))
            except OSError as exc:  # it went away a moment ago, or is not to be read
                log.debug("ranking_not_seen", path=str(path), reason=str(exc))
        return frozenset(stamps)


def _check_likely(places: RankedPlaces | None, shard: Shard) -> None:
    """Refuse a shard by a claim that cannot be true: anybody may say that he measured it."""
    if places is None or not 0 < shard.critical <= places.count:
        return  # what makes the file says what is wrong
    if places.coverage(shard.critical) < COVERAGE_LEAST:
        raise ModelError(
            f"{places.holds(shard.critical)} have too little of the importance for a shard, "
            "whatever was said of their quality"
        )


def _told(known: Collection[ShardQuality]) -> tuple[ShardQuality, ...]:
    """Return as much as the mesh is told: the measured first, small shards first.

    Of too many measured ones some of all sizes, the smallest and the largest among them: which
    of them are good enough is up to those who want the model.
    """
    measures = sorted((one for one in known if one.is_measured), key=_size)
    if len(measures) > QUALITIES_MAX:
        last = len(measures) - 1
        measures = [measures[n * last // (QUALITIES_MAX - 1)] for n in range(QUALITIES_MAX)]
    guesses = sorted((one for one in known if not one.is_measured), key=_size)
    return (*measures, *guesses)[:QUALITIES_MAX]


def _size(one: ShardQuality) -> tuple[int, ShardQuality]:
    return one.critical * 1000 // one.places, one
