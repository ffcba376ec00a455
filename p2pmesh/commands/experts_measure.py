"""`p2pmesh experts measure`: how far the answers of shards are from those of their model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import trio

import p2pmesh
from p2pmesh.commands.formatting import line, size
from p2pmesh.commands.long_work import domains, scratch, show, stoppable
from p2pmesh.commands.table import Column, table
from p2pmesh.config import Settings
from p2pmesh.engine.find import find_engine
from p2pmesh.engine.measuring import Measured, Task, measure
from p2pmesh.engine.perplexity import perplexity_program
from p2pmesh.errors import ConfigError, EngineError, LocalError, ModelError
from p2pmesh.home import Home
from p2pmesh.models import measured as measures
from p2pmesh.models import rankings
from p2pmesh.models.candidates import Candidate, candidates
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.importance import Ranking, RankingDigest, digest_of
from p2pmesh.models.parts import MEASURES_MAX, ShardKind
from p2pmesh.models.store import ModelFile, Store
from p2pmesh.sharing import DIVERGENCE_MAX, MILLION

SIZES = 4
MINUTES = 20.0
MINUTES_MAX = 24 * 60.0
ANSWERS_BYTES_MAX = 2 * 2**30
_PACKAGE = Path(p2pmesh.__file__).parent
# None of them is one that rankings are made of: on those the shards look better than they are.
TEXTS: Mapping[str, Path] = {
    "code": _PACKAGE / "gateway" / "proxy.py",
    "manual": _PACKAGE / "models" / "data" / "manual.txt",
    "prose": _PACKAGE / "models" / "data" / "prose2.txt",
}
_ALL = "all"


@click.command("measure")
@click.argument("model")
@click.option(
    "--text",
    "texts",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="A text; each is a domain, named as its file. Give none that the ranking was made of. "
    "Without one: code, manual and prose that come with p2pmesh.",
)
@click.option(
    "--ranking",
    "wanted",
    metavar="DIGEST",
    help="The ranking to cut shards by (default: the newest one of this model).",
)
@click.option(
    "--kind",
    type=click.Choice([*(kind.value for kind in ShardKind), _ALL]),
    default=_ALL,
    show_default=True,
    help="Which kind of shards.",
)
@click.option(
    "--sizes",
    type=click.IntRange(1, MEASURES_MAX // len(ShardKind)),
    default=SIZES,
    show_default=True,
    help="How many sizes of each kind to measure; each halves what is left to search for the "
    "smallest that is good enough.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(0, MINUTES_MAX, min_open=True),
    default=MINUTES,
    show_default=True,
    help="For all of it; the sizes that were done until then count.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def measure_model(
    settings: Settings,
    *,
    model: str,
    texts: tuple[Path, ...],
    wanted: str | None,
    kind: str,
    sizes: int,
    minutes: float,
    as_json: bool,
) -> None:
    """Measure how far the answers of shards of MODEL are from its own.

    MODEL is a GGUF file or the name of a model found on this machine, which must have the memory to
    run it whole, however slowly. What is measured is kept beside the ranking, and decides which
    shards the mesh may use; the smallest within --moe-quality are searched. The whole model's
    answers and one shard take disk meanwhile.
    """
    domain_texts = domains(texts) or TEXTS
    home = Home.of(settings)
    store = Store(home, environ=os.environ)
    source = store.locate(model)
    with stoppable("Stopped; the sizes that were measured to their end are kept"):
        ranking = _ranking(home, store.digest(source), wanted, model)
        shards = _candidates(kind, source, ranking, home.rankings)
        if not shards:
            raise ConfigError(f"{line(model)} needs all its experts; there is no shard to measure")
        program = perplexity_program(find_engine(settings.engine, home.engine, os.environ))
        home.create()
        with scratch(home.cache, "measure") as folder:
            task = Task(
                program=program,
                model=source.parts[0],
                texts=domain_texts,
                candidates=shards,
                sizes=sizes,
                divergence_max=settings.moe_quality,
                folder=folder,
                answers_bytes_max=_room(folder, settings.disk),
                deadline_s=60 * minutes,
            )
            found: list[Measured] = []
            keep = partial(_keep, home.rankings, found)
            if not trio.run(measure, task, keep, _report):
                click.echo("The time is over; what was measured until then is kept", err=True)
    if not found:
        raise EngineError(
            f"No size was measured within {minutes:g} minutes; give it more --minutes, fewer "
            "--sizes, or measure on a faster machine"
        )
    found.sort(key=lambda one: (one.quality.kind, one.quality.critical))
    click.echo(json.dumps(_as_object(ranking, found)) if as_json else text_of(found))


def _candidates(kind: str, model: ModelFile, ranking: Ranking, folder: Path) -> list[Candidate]:
    """Return the shards to measure; where all kinds will do, of those that the model allows."""
    found: list[Candidate] = []
    for one in ShardKind:
        if kind not in {one, _ALL}:
            continue
        try:
            found += candidates(one, model, ranking, folder)
        except (ModelError, LocalError) as exc:
            if kind == one or one is ShardKind.EXPERTS:
                raise
            click.echo(f"No thin shards: {line(exc)}", err=True)
    return found


def _ranking(home: Home, model: ModelDigest, wanted: str | None, name: str) -> Ranking:
    """Return the ranking that is wanted, or the newest one."""
    advice = f"make one with p2pmesh experts rank {line(name)}"
    if wanted is None:
        ranking = rankings.newest(home.rankings, model)
        if ranking is None:
            raise ConfigError(f"There is no ranking of {line(name)} here; {advice}")
        return ranking
    ranking = rankings.load(home.rankings, RankingDigest(wanted))
    if ranking is None:
        raise ConfigError(f"There is no ranking {line(wanted)} here; {advice}")
    if ranking.model != model:
        raise ConfigError(f"{line(wanted)} is a ranking of another model; {advice}")
    return ranking


def _room(folder: Path, disk: int | None) -> int:
    """Return what the answers of the whole model may take, in bytes."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as exc:
        raise LocalError(f"Cannot use {folder} ({exc.strerror}); choose another --home") from exc
    return min(ANSWERS_BYTES_MAX, free // 4, ANSWERS_BYTES_MAX if disk is None else disk)


def _keep(folder: Path, found: list[Measured], one: Measured) -> None:
    """Write a size down at once, so that whatever stops the work loses only the next one."""
    measures.add(folder, one.quality.ranking, [one.quality])
    found.append(one)
    click.echo(f"{one.holds}: kl {_kl(one.quality.divergence)}", err=True)


def _report(what: str, done: int, total: int) -> None:
    show(what, "chunks", done, total)


def text_of(found: Sequence[Measured]) -> str:
    """Return the table of what was measured, and what follows from it."""
    names = sorted(found[0].figures)
    columns = (
        Column("SHARD"),
        *(Column(title, right=True) for title in ("SIZE", "COVERAGE")),
        *(Column(f"KL {line(name).upper()}", right=True) for name in names),
        *(Column(title, right=True) for title in ("KL WORST", "SAME TOKEN")),
    )
    rows = [
        (
            one.holds,
            size(one.size_bytes),
            f"{one.quality.coverage / MILLION:.1%}",
            *(f"{one.figures[name].divergence:.3f}" for name in names),
            _kl(one.quality.divergence),
            f"{one.agreement:.1%}",
        )
        for one in found
    ]
    return f"{table(columns, rows)}\n{_verdict(found)}"


def _verdict(found: Sequence[Measured]) -> str:
    """Say which size is good enough for the default bar, and what another bar would take."""
    bar = f"kl={DIVERGENCE_MAX / MILLION:.2f}"
    good = [one for one in found if one.quality.divergence <= DIVERGENCE_MAX]
    if not good:
        best = min(found, key=lambda one: one.quality.divergence)
        return (
            f"None is within {bar}, the default. {best.holds} are used with "
            f"p2pmesh up --moe-quality {_bar(best)}"
        )
    [first, *_] = good
    smallest = found[0]
    said = f"Within {bar}, the default of p2pmesh up --moe-quality: {first.holds} and more."
    if smallest not in good:
        said += f" Smaller and worse: --moe-quality {_bar(smallest)} takes {smallest.holds}."
    return said


def _bar(one: Measured) -> str:
    """Return the bar that a size just meets."""
    return f"kl={-(-one.quality.divergence // 10_000) / 100:.2f}"


def _kl(divergence: int) -> str:
    return f"{divergence / MILLION:.3f}"


def _as_object(ranking: Ranking, found: Sequence[Measured]) -> dict[str, Any]:
    return {
        "model": ranking.model,
        "ranking": digest_of(ranking),
        "shards": [
            {
                "kind": one.quality.kind,
                "holds": one.holds,
                "places": one.quality.places,
                "critical": one.quality.critical,
                "size_bytes": one.size_bytes,
                "coverage": one.quality.coverage / MILLION,
                "divergence": one.quality.divergence / MILLION,
                "agreement": one.agreement,
                "domains": {
                    name: {"divergence": figures.divergence, "agreement": figures.agreement}
                    for name, figures in one.figures.items()
                },
            }
            for one in found
        ],
    }
