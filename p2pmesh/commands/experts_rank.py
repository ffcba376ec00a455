"""`p2pmesh experts rank`: which experts of a model matter most, for which kind of text."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import trio

import p2pmesh
from p2pmesh.commands.formatting import count, line, size
from p2pmesh.commands.long_work import domains, scratch, show, stoppable
from p2pmesh.commands.table import Column, table
from p2pmesh.config import Settings
from p2pmesh.engine.find import find_engine
from p2pmesh.engine.imatrix import Collection, collect, imatrix_program
from p2pmesh.errors import ConfigError, LocalError, ModelError
from p2pmesh.home import Home
from p2pmesh.models import rankings
from p2pmesh.models.expert_scores import layer_scores, ranking_of
from p2pmesh.models.imatrix import DownTensor, Imatrix, down_tensors, read_imatrix
from p2pmesh.models.importance import (
    NAME_CHARACTERS_MAX,
    Method,
    Ranking,
    coverage,
    digest_of,
    kept_experts,
    merged,
    ordered,
    to_bytes,
)
from p2pmesh.models.store import ModelFile, Store
from p2pmesh.sharing import MILLION

MINUTES_MAX = 20.0
METHOD: Method = "counts-energy"
_FILE = click.Path(path_type=Path)
_PACKAGE = Path(p2pmesh.__file__).parent
# What comes with the package anyway, so that a ranking can be made at once and offline.
TEXTS: Mapping[str, Path] = {
    "code": _PACKAGE / "models" / "store.py",
    "manual": _PACKAGE / "wire" / "PROTOCOL.md",
    "prose": _PACKAGE / "models" / "data" / "prose.txt",
}
SHOWN = 8  # experts of a layer in the table; --json has all


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """What the user asked for.

    Attributes:
        texts: Files of text by the name of their domain; without any, `TEXTS`.
        imatrices: Importance matrices by the name of their domain; then no text is used.
        minutes: For all texts together.
    """

    texts: Mapping[str, Path]
    imatrices: Mapping[str, Path]
    minutes: float


@click.command()
@click.argument("model")
@click.option(
    "--text",
    "texts",
    type=_FILE,
    multiple=True,
    metavar="FILE",
    help="A text; each is a domain, named as its file. Without one: code, manual and prose that "
    "come with p2pmesh.",
)
@click.option(
    "--imatrix",
    "imatrices",
    type=_FILE,
    multiple=True,
    metavar="FILE",
    help="An importance matrix of llama-imatrix in place of a text. One beside the model that is "
    "called *imatrix*.gguf and fits it is used if there is neither.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(0, MINUTES_MAX, min_open=True),
    default=MINUTES_MAX,
    show_default=True,
    help="For all texts; what was seen until then counts.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def rank(
    settings: Settings,
    *,
    model: str,
    texts: tuple[Path, ...],
    imatrices: tuple[Path, ...],
    minutes: float,
    as_json: bool,
) -> None:
    """Rank the experts of MODEL in each layer by what they add to its answers.

    MODEL is a GGUF file or the name of a model found on this machine. Text runs through the whole
    model once. The ranking is kept in the node's home, named by its digest, with a score of each
    neuron beside it. Measure quality on other text than this.
    """
    if texts and imatrices:
        raise ConfigError("Give either --text or --imatrix")
    home = Home.of(settings)
    request = _Request(texts=domains(texts), imatrices=domains(imatrices), minutes=minutes)
    store = Store(home, environ=os.environ)
    source = store.locate(model)
    tensors = down_tensors(source)
    with stoppable("Stopped; no ranking was made"):
        found = _statistics(settings, home, source, tensors, request)
        names = sorted(found)
        matrices = [found[name] for name in names]
        weighing = partial(show, "Weighing experts", "layers")
        scores = list(layer_scores(tensors, matrices, weighing))
        neurons = rankings.save_neurons(home.rankings, [one.neurons for one in scores])
        ranking = ranking_of(store.digest(source), METHOD, names, scores, neurons)
        path = rankings.save(home.rankings, ranking)
    chunks = {name: found[name].chunks for name in names}
    click.echo(json.dumps(_as_object(ranking, path, chunks)) if as_json else _text(ranking, path))


def _statistics(
    settings: Settings,
    home: Home,
    source: ModelFile,
    tensors: Mapping[int, DownTensor],
    request: _Request,
) -> dict[str, Imatrix]:
    """Return the importance matrix of each domain: given, found beside the model, or made now."""
    if request.imatrices:
        return {name: read_imatrix(path, tensors) for name, path in request.imatrices.items()}
    if not request.texts:
        beside = _beside(source, tensors)
        if beside is not None:
            return beside
    engine = find_engine(settings.engine, home.engine, os.environ)
    program = imatrix_program(engine)
    home.create()
    with scratch(home.cache, "imatrix") as folder:
        return trio.run(_collect, program, source, tensors, request, folder)


def _beside(source: ModelFile, tensors: Mapping[int, DownTensor]) -> dict[str, Imatrix] | None:
    """Return the first importance matrix beside the model that is one of it."""
    for path in sorted(source.parts[0].parent.glob("*imatrix*.gguf")):
        try:
            matrix = read_imatrix(path, tensors)
        except (ModelError, LocalError) as exc:
            click.echo(f"Not used: {line(exc)}", err=True)
            continue
        click.echo(f"Using {line(path)}; give a --text to measure anew", err=True)
        return {path.stem[:NAME_CHARACTERS_MAX]: matrix}
    return None


async def _collect(
    program: Path,
    source: ModelFile,
    tensors: Mapping[int, DownTensor],
    request: _Request,
    folder: Path,
) -> dict[str, Imatrix]:
    """Run one text after the other through the model, each for an equal part of what time is left.

    `folder` is for files that are not needed afterwards.
    """
    texts = request.texts or TEXTS
    found: dict[str, Imatrix] = {}
    end_s = trio.current_time() + 60 * request.minutes
    for number, (name, text) in enumerate(sorted(texts.items())):
        output = folder / "imatrix.gguf"
        job = Collection(
            program=program,
            model=source.parts[0],
            text=text,
            output=output,
            deadline_s=(end_s - trio.current_time()) / (len(texts) - number),
        )
        if not await collect(job, partial(show, f"Text {name}", "chunks")):
            click.echo(f"The time is over before {line(text)} is; its beginning counts", err=True)
        found[name] = read_imatrix(output, tensors)
        output.unlink()
        click.echo(f"Text {line(name)}: {count(found[name].chunks, 'chunk')}", err=True)
    return found


def _text(ranking: Ranking, path: Path) -> str:
    half = -(-ranking.experts // 2)
    columns = (Column("LAYER", right=True), *(Column(d.name.upper()) for d in ranking.domains))
    orders = {domain.name: ordered(ranking, domain.name) for domain in ranking.domains}
    rows = [
        (layer, *(_cell(orders[domain.name][at][0]) for domain in ranking.domains))
        for at, layer in enumerate(ranking.layers)
    ]
    shares = [
        f"{domain.name}: the {half} first of {ranking.experts} experts have "
        f"{_share(ranking, domain.name, half)} % of the importance"
        for domain in ranking.domains
    ]
    if len(ranking.domains) > 1:
        shares.append(f"one list for all: {_share(merged(ranking, 'mean'), 'mean', half)} %")
    critical = [
        f"critical in layer {layer}: {', '.join(map(str, experts))}; every shard needs them"
        for layer, experts in zip(ranking.layers, ranking.critical, strict=True)
        if experts
    ]
    kept = f"{path}\nRanking {digest_of(ranking)} ({size(len(to_bytes(ranking)))})"
    return "\n".join([table(columns, rows), *map(line, shares), *critical, kept])


def _cell(order: Sequence[int]) -> str:
    return " ".join(map(str, order[:SHOWN])) + (" …" if len(order) > SHOWN else "")


def _share(ranking: Ranking, domain: str, kept: int) -> int:
    """Return the mean share of all layers in percent."""
    shares = coverage(ranking, domain, kept_experts(ranking, domain, kept))
    return 100 * sum(shares) // (MILLION * len(shares))


def _as_object(ranking: Ranking, path: Path, chunks: Mapping[str, int]) -> dict[str, Any]:
    return {
        "digest": digest_of(ranking),
        "path": str(path),
        "model": ranking.model,
        "method": ranking.method,
        "experts": ranking.experts,
        "critical": dict(zip(ranking.layers, ranking.critical, strict=True)),
        "neurons": ranking.neurons._asdict() if ranking.neurons else None,
        "domains": [
            {
                "name": domain.name,
                "chunks": chunks[domain.name],
                "layers": {
                    layer: order[0]
                    for layer, order in zip(
                        ranking.layers, ordered(ranking, domain.name), strict=True
                    )
                },
            }
            for domain in ranking.domains
        ],
    }
