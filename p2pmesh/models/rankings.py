"""Rankings of experts as files of this node, each named by the digest of its bytes.

Shell: reads and writes files. A ranking of `importance.py` is `DIGEST.ranking`. The scores of
neurons that it names are `DIGEST.neurons`: little-endian 32 bit floats [layers, domains, experts,
width], in the order of the ranking, so that any part of it can be read by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from p2pmesh.errors import LocalError, MeshError, ModelError, PeerError
from p2pmesh.home import replacing, write_atomic
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.importance import (
    DIGEST_BYTES,
    RANKING_BYTES_MAX,
    Neurons,
    Ranking,
    RankingDigest,
    digest_of,
    from_bytes,
    to_bytes,
)

if TYPE_CHECKING:
    from p2pmesh.models.imatrix import Floats

SUFFIX = ".ranking"
NEURONS_SUFFIX = ".neurons"
FLOAT, FLOAT_BYTES = "<f4", 4

log = structlog.get_logger(__name__)


def save(folder: Path, ranking: Ranking) -> Path:
    """Keep a ranking, whose neurons were saved before; returns its file.

    Raises:
        LocalError: Disk full, no permission.
    """
    _create(folder)
    path = folder / f"{digest_of(ranking)}{SUFFIX}"
    write_atomic(path, to_bytes(ranking))
    return path


def load(folder: Path, digest: RankingDigest) -> Ranking | None:
    """Return the ranking with this digest; None when it is not here.

    Raises:
        ModelError: The file was changed.
        LocalError: The system does not let it be read.
    """
    path = folder / f"{digest}{SUFFIX}"
    try:
        with path.open("rb") as file:
            data = file.read(RANKING_BYTES_MAX + 1)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise _unreadable(path, exc) from exc
    if blake2b(data, digest_size=DIGEST_BYTES).hexdigest() != digest:
        raise _damaged(path)
    try:
        return from_bytes(data)
    except PeerError as exc:
        raise ModelError(f"{path} cannot be used: {exc}") from exc


def newest(folder: Path, model: ModelDigest) -> Ranking | None:
    """Return the ranking of a model that was made here last; None when there is none.

    Files that cannot be used are logged and passed over.

    Raises:
        LocalError: The system does not let the folder be read.
    """
    try:
        found = [(path.stat().st_mtime_ns, path) for path in folder.glob(f"*{SUFFIX}")]
    except OSError as exc:
        raise _unreadable(folder, exc) from exc
    for _, path in sorted(found, reverse=True):
        try:
            ranking = load(folder, RankingDigest(path.stem))
        except MeshError as exc:
            log.warning("ranking_unusable", reason=str(exc))
            continue
        if ranking is not None and ranking.model == model:
            return ranking
    return None


def save_neurons(folder: Path, layers: Sequence[Floats]) -> Neurons:
    """Keep the scores of neurons, and return what a ranking says of them.

    Args:
        folder: The home's rankings.
        layers: For each layer, [domains, experts, width].

    Raises:
        LocalError: Disk full, no permission.
    """
    _create(folder)
    hasher = blake2b(digest_size=DIGEST_BYTES)
    for scores in layers:
        hasher.update(scores.astype(FLOAT).tobytes())
    digest = hasher.hexdigest()
    with replacing(folder / f"{digest}{NEURONS_SUFFIX}") as file:
        for scores in layers:
            file.write(scores.astype(FLOAT).tobytes())
    return Neurons(digest, layers[0].shape[-1])


def neurons_path(folder: Path, neurons: Neurons) -> Path:
    """Return where the scores of neurons are, if they are here."""
    return folder / f"{neurons.digest}{NEURONS_SUFFIX}"


def neurons_bytes(ranking: Ranking) -> int:
    """Return the size of the file with the scores of neurons of a ranking; 0 without any."""
    if ranking.neurons is None:
        return 0
    scores = len(ranking.layers) * len(ranking.domains) * ranking.experts * ranking.neurons.width
    return FLOAT_BYTES * scores


@contextmanager
def taking_neurons(folder: Path, ranking: Ranking) -> Iterator[Callable[[bytes], object]]:
    """Keep the scores of neurons that a peer sends, piece by piece, by the function given.

    Raises:
        ModelError: At the end: it was another file than the one that the ranking names.
        LocalError: Disk full, no permission.
    """
    assert ranking.neurons is not None, "there is something to take"
    _create(folder)
    hasher = blake2b(digest_size=DIGEST_BYTES)
    with replacing(neurons_path(folder, ranking.neurons)) as file:

        def take(piece: bytes) -> None:
            hasher.update(piece)
            file.write(piece)

        yield take
        if hasher.hexdigest() != ranking.neurons.digest:
            raise ModelError("what came are not the neurons that the ranking names")


def load_neurons(folder: Path, ranking: Ranking) -> Floats | None:
    """Return the scores of neurons of a ranking, [layers, domains, experts, width].

    They stay on the disk until they are used. None when the ranking has none, or they are not here.

    Raises:
        ModelError: The file was changed.
        LocalError: The system does not let it be read.
    """
    if ranking.neurons is None:
        return None
    import numpy as np  # late: it takes memory that few nodes ever need

    path = neurons_path(folder, ranking.neurons)
    shape = (len(ranking.layers), len(ranking.domains), ranking.experts, ranking.neurons.width)
    try:
        if path.stat().st_size != neurons_bytes(ranking):
            raise _damaged(path)
        scores: Floats = np.memmap(path, FLOAT, mode="r", shape=shape)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise _unreadable(path, exc) from exc
    hasher = blake2b(digest_size=DIGEST_BYTES)
    for layer in scores:
        hasher.update(layer.tobytes())
    if hasher.hexdigest() != ranking.neurons.digest:
        raise _damaged(path)
    return scores


def _create(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise LocalError(f"Cannot create {folder} ({exc.strerror}); choose another --home") from exc


def _damaged(path: Path) -> ModelError:
    return ModelError(
        f"{path} is damaged: its bytes are not those that its name says; delete it and run "
        "p2pmesh experts rank again"
    )


def _unreadable(path: Path, exc: OSError) -> LocalError:
    return LocalError(f"Cannot read {path} ({exc.strerror}); check its permissions")
