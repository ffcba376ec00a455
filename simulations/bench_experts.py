"""Expert shards beside quantisations of equal size: `python -m simulations.bench_experts`.

What each loses against the whole model, by llama-perplexity: the Kullback-Leibler divergence of its
answers, how often both prefer the same token, and the perplexity, on texts that no ranking is made
of. Side by side in one run:

- ways of choosing experts, with equally many kept: sqrt(tokens x output energy) per layer, tokens
  per layer, one list for all layers, chance; and thin shards, which keep all experts and of each
  the neurons that matter most;
- sets of shards for several numbers of nodes, as the planner makes them: the worst shard counts;
- quantisations of the whole model.

The default is a subset of a few minutes; `--full` measures all sizes and sets.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import trio

from p2pmesh.commands.experts_measure import TEXTS as HELD_TEXTS
from p2pmesh.commands.experts_rank import TEXTS as RANKING_TEXTS
from p2pmesh.engine.find import Engine, find_engine
from p2pmesh.engine.imatrix import Collection, collect, imatrix_program
from p2pmesh.engine.perplexity import Figures, compare, perplexity_program, save_answers
from p2pmesh.engine.tools import tool_program
from p2pmesh.home import Home
from p2pmesh.identity.keys import NodeId
from p2pmesh.models import rankings
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.expert_scores import layer_scores, ranking_of
from p2pmesh.models.experts import ExpertLists
from p2pmesh.models.imatrix import Imatrix, down_tensors, read_imatrix
from p2pmesh.models.importance import Method, Ranking, merged
from p2pmesh.models.parts import ShardKind, ShardQuality
from p2pmesh.models.shards import Places
from p2pmesh.models.slice import of_headers, read_layout, write_planned, write_shard
from p2pmesh.models.store import ModelFile, Store
from p2pmesh.models.thin import thin_layout_of
from p2pmesh.models.thin_places import ThinPlaces
from p2pmesh.placement.experts import Host, shards_of

RANK_S = 60.0  # for each text
CHANCES = 3  # draws of experts by chance, of which the mean counts
QUANTISATIONS = ("Q6_K", "Q5_1", "Q4_0")
ALL_QUANTISATIONS = ("Q6_K", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "Q3_K_M", "Q2_K")
NODES, ALL_NODES = (2, 4), (2, 3, 4, 8)

Write = Callable[[Path], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Something that answers in place of the whole model.

    Attributes:
        name: For people; equal names are draws of one thing, or shards of one set.
        group: The table that it belongs to.
        write: Writes its file.
        coverage: Of the importance, 0 to 1, where it is least; None where that has no meaning.
    """

    name: str
    group: str
    write: Write
    coverage: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What was measured of one variant.

    Attributes:
        figures: By text.
    """

    variant: Variant
    size_bytes: int
    figures: Mapping[str, Figures]


class Bench:
    """One model, ranked, with the ways of cutting it.

    Args:
        model: Whole.
        engine: With llama.cpp's tools.
        folder: For files that are not needed afterwards.
    """

    def __init__(self, model: ModelFile, engine: Engine, folder: Path) -> None:
        self.model, self.engine, self.folder = model, engine, folder
        self.layout = read_layout(model)
        self._thin = of_headers(model, thin_layout_of)
        self._tensors = down_tensors(model)
        self._rankings: dict[Method, Ranking] = {}

    async def rank(self) -> None:
        """Rank the experts and neurons by the texts that come with the package."""
        matrices: dict[str, Imatrix] = {}
        for name, text in RANKING_TEXTS.items():
            output = self.folder / f"{name}.imatrix.gguf"
            job = Collection(
                program=imatrix_program(self.engine),
                model=self.model.parts[0],
                text=text,
                output=output,
                deadline_s=RANK_S,
            )
            await collect(job, lambda _done, _total: None)
            matrices[name] = read_imatrix(output, self._tensors)
        names = sorted(matrices)
        scores = list(layer_scores(self._tensors, [matrices[n] for n in names], lambda *_: None))
        neurons = rankings.save_neurons(self.folder, [one.neurons for one in scores])
        digest = ModelDigest("0" * 64)
        for method in get_args(Method):
            self._rankings[method] = ranking_of(digest, method, names, scores, neurons)

    @property
    def places(self) -> Places:
        """The places of the ranking that the mesh would use."""
        return Places(self._rankings["counts-energy"], self.layout)

    def choices(self, kept: int) -> Iterator[Variant]:
        """Ways of choosing the same number of experts, and thin shards of as many bytes."""
        group = f"{kept} of {self.layout.count}"
        names: Mapping[Method, str] = {"counts-energy": "tokens x energy", "counts": "tokens"}
        for method, name in names.items():
            places = Places(self._rankings[method], self.layout)
            lists = places.lists(range(kept))
            yield self._of(f"{name}, per layer", group, lists, places.coverage(kept) / 1e6)
        yield self._of("one list for all layers", group, self._one_list(kept))
        for draw in range(CHANCES):
            rng = random.Random(draw)
            lists = {
                layer: sorted(rng.sample(range(self.layout.count), kept))
                for layer in self.layout.layers
            }
            yield self._of("chance", group, lists)
        thin = self._thin_places()
        width = round(kept / self.layout.count * thin.count)
        name = f"thin, {width * thin.layout.step} of {thin.layout.width} neurons"
        write = partial(_planned, self.model, thin, width)
        yield Variant(name=name, group=group, write=write, coverage=thin.coverage(width) / 1e6)

    def sets(self, critical: int, nodes: int) -> Iterator[Variant]:
        """The shards of a set over equal nodes, as the planner makes it."""
        places = self.places
        quality = ShardQuality(ShardKind.EXPERTS, "", places.count, critical, 0, 0)
        hosts = [Host(_node(n), places.count, places.count, places.count) for n in range(nodes)]
        shards = shards_of(quality, hosts)
        sizes = sorted({shard.size for shard in shards.values()})
        name = f"{nodes} nodes, {critical} critical: {'-'.join(map(str, sizes))} experts each"
        for shard in shards.values():
            kept = [place for place in range(places.count) if shard.kept >> place & 1]
            yield self._of(name, "sets", places.lists(kept), places.coverage(critical) / 1e6)

    def quantised(self, names: Sequence[str]) -> Iterator[Variant]:
        """The whole model in fewer bits."""
        for name in names:
            yield Variant(name=name, group="whole model", write=partial(self._quantise, name))

    def _of(
        self, name: str, group: str, lists: ExpertLists, coverage: float | None = None
    ) -> Variant:
        write = partial(write_shard, self.model, lists)
        return Variant(name=name, group=group, write=write, coverage=coverage)

    def _one_list(self, kept: int) -> ExpertLists:
        """The experts with the most tokens in all layers together."""
        ranking = merged(self._rankings["counts"], "mean")
        [domain] = ranking.domains
        totals = [sum(column) for column in zip(*domain.weights, strict=True)]
        best = sorted(range(len(totals)), key=lambda expert: -totals[expert])[:kept]
        return dict.fromkeys(self.layout.layers, tuple(sorted(best)))

    def _thin_places(self) -> ThinPlaces:
        ranking = self._rankings["counts-energy"]
        neurons = rankings.load_neurons(self.folder, ranking)
        assert neurons is not None, "they were saved with the ranking"
        return ThinPlaces(ranking, neurons, self._thin)

    def _quantise(self, name: str, output: Path) -> None:
        program = tool_program(self.engine, "llama-quantize")
        argv = [str(program), "--allow-requantize", str(self.model.parts[0]), str(output), name]
        subprocess.run(argv, check=True, capture_output=True, timeout=300)


def _planned(model: ModelFile, places: ThinPlaces, width: int, output: Path) -> None:
    write_planned(model, places.plan(width), output)


def _node(number: int) -> NodeId:
    return NodeId(number.to_bytes(16, "big"))


async def measured(
    bench: Bench, variants: Sequence[Variant], texts: Mapping[str, Path], chunks: int
) -> list[Row]:
    """Measure variants one after the other."""
    program = perplexity_program(bench.engine)
    answers: dict[str, Path] = {}
    for name, text in texts.items():
        answers[name] = bench.folder / f"{name}.answers"
        await save_answers(program, bench.model.parts[0], text, answers[name], chunks)
    rows = []
    for number, variant in enumerate(variants, 1):
        path = bench.folder / "variant.gguf"
        await trio.to_thread.run_sync(variant.write, path)
        figures = {
            name: await compare(program, path, one, lambda _done, _total: None)
            for name, one in answers.items()
        }
        rows.append(Row(variant=variant, size_bytes=path.stat().st_size, figures=figures))
        print(f"{number}/{len(variants)} {variant.group}: {variant.name}", file=sys.stderr)
        path.unlink()
    return rows


def summary(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Return one entry per name: of a set its worst shard, of draws by chance their mean."""
    entries = []
    for name, group in dict.fromkeys((row.variant.name, row.variant.group) for row in rows):
        same = [row for row in rows if (row.variant.name, row.variant.group) == (name, group)]
        pick = _mean if name == "chance" else max
        entries.append(
            {
                "group": group,
                "name": name,
                "bytes": max(row.size_bytes for row in same),
                "coverage": same[0].variant.coverage,
                "divergence": {
                    text: pick([row.figures[text].divergence for row in same])
                    for text in same[0].figures
                },
                "worst": pick([max(f.divergence for f in row.figures.values()) for row in same]),
                "agreement": -pick([-min(f.agreement for f in r.figures.values()) for r in same]),
                "perplexity": {
                    text: pick([row.figures[text].perplexity for row in same])
                    for text in same[0].figures
                },
            }
        )
    return entries


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def show(report: Mapping[str, object]) -> str:
    """Return the tables of a report as text."""
    entries: Sequence[Mapping[str, object]] = report["entries"]  # type: ignore[assignment]
    lines = [f"Whole model: {report['model_bytes'] / 1e6:.2f} MB"]  # type: ignore[operator]
    for group in dict.fromkeys(entry["group"] for entry in entries):
        lines += ["", f"{group}", _HEAD]
        for entry in entries:
            if entry["group"] == group:
                lines.append(_line(entry))
    return "\n".join([*lines, "", f"took {report['took_s']:.0f} s"])


_HEAD = f"{'':44}{'MB':>7}{'COVERS':>8}{'KL WORST':>10}{'SAME':>7}  KL AND PERPLEXITY BY TEXT"


def _line(entry: Mapping[str, object]) -> str:
    coverage = entry["coverage"]
    divergence: Mapping[str, float] = entry["divergence"]  # type: ignore[assignment]
    perplexity: Mapping[str, float] = entry["perplexity"]  # type: ignore[assignment]
    texts = ", ".join(
        f"{text} {divergence[text]:.3f} {100 * (perplexity[text] - 1):+.1f} %"
        for text in divergence
    )
    covers = "-" if coverage is None else f"{coverage:.0%}"
    return (
        f"{entry['name']:44}{entry['bytes'] / 1e6:7.2f}{covers:>8}"  # type: ignore[operator]
        f"{entry['worst']:10.3f}{entry['agreement']:7.0%}  {texts}"
    )


async def run(options: argparse.Namespace) -> dict[str, object]:
    """Return the report: what was measured, and how long it took."""
    began = time.monotonic()
    home = Home.at(options.folder)
    store = Store(home, environ=os.environ)
    model = store.open(options.model) if options.model else store.embedded()
    engine = find_engine(options.engine, home.engine, os.environ)
    texts = {path.stem: path for path in options.text} or dict(HELD_TEXTS)
    bench = Bench(model, engine, options.folder)
    await bench.rank()
    count = bench.places.count
    sizes = [round(count * share) for share in ((0.5, 0.625, 0.75) if options.full else (0.625,))]
    nodes = ALL_NODES if options.full else NODES
    criticals = sizes if options.full else [count // 2]
    sizes = options.sizes or sizes
    variants = [variant for size in sizes for variant in bench.choices(size)]
    variants += [v for n in nodes for critical in criticals for v in bench.sets(critical, n)]
    variants += bench.quantised(ALL_QUANTISATIONS if options.full else QUANTISATIONS)
    rows = await measured(bench, variants, texts, options.chunks)
    return {
        "entries": summary(rows),
        "model_bytes": model.size_bytes,
        "chunks": options.chunks,
        "took_s": time.monotonic() - began,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench and print its report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a model of experts (default: the embedded one)")
    parser.add_argument("--engine", type=Path, help="the folder of llama.cpp's tools")
    parser.add_argument("--text", type=Path, action="append", default=[], help="a held text")
    parser.add_argument("--chunks", type=int, default=10, help="of 256 tokens, of each text")
    parser.add_argument("--sizes", type=int, nargs="*", help="experts kept in each layer")
    parser.add_argument("--full", action="store_true", help="all sizes, sets and quantisations")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench-experts-") as folder:
        options = argparse.Namespace(**{**vars(options), "folder": Path(folder)})
        report = trio.run(run, options)
    print(json.dumps(report) if options.json else show(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
