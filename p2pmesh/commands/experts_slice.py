"""`p2pmesh experts slice`: writes a file with some experts of a mixture-of-experts model."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from p2pmesh.commands.formatting import line, size
from p2pmesh.commands.long_work import stoppable
from p2pmesh.config import Settings
from p2pmesh.errors import ConfigError
from p2pmesh.home import Home, read_json
from p2pmesh.models.experts import (
    ExpertLayout,
    ExpertLists,
    check_lists,
    first_experts,
    same_experts,
)
from p2pmesh.models.shard_cache import ShardCache
from p2pmesh.models.slice import read_layout, write_shard
from p2pmesh.models.store import Progress, Store

_IDS = re.compile(r"\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*", re.ASCII)
_FORM = '{"layers": {"0": [3, 7], "1": [0, 5]}}'


@click.command("slice")
@click.argument("model")
@click.option(
    "--keep",
    required=True,
    metavar="LIST|N",
    help="The experts that stay: ids for all layers, like 0,3,5-9; a JSON file with a list for "
    "each layer; or a number, for that many of the first ones, to try it out.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What to write (default: a file among the shards of this node, which it may delete "
    "when others need the room).",
)
@click.pass_obj
def slice_model(settings: Settings, *, model: str, keep: str, output: Path | None) -> None:
    """Write a file with some of the experts of MODEL, which runs like any other model.

    MODEL is a GGUF file or the name of a model found on this machine. The shard answers worse than
    the whole model; a smaller quantisation of the whole model is often the better choice.
    """
    home = Home.of(settings)
    store = Store(home, environ=os.environ)
    source = store.locate(model)
    layout = read_layout(source)
    lists = _lists(keep, layout)
    kept = check_lists(layout, lists)
    if output is not None and os.path.lexists(output):
        raise ConfigError(f"{output} is there already; delete it, or choose another with --output")
    with stoppable("Stopped; no shard was written"):
        if output is None:
            with _bar("Reading") as show:
                digest = store.digest(source, show)
            shards = ShardCache(home.shards, settings.disk)
            with _bar("Writing") as show:
                output = shards.make(source, digest, lists, progress=show)
        else:
            with _bar("Writing") as show:
                write_shard(source, lists, output, show)
    click.echo(
        f"{kept} of {layout.count} experts in {len(layout.layers)} layers, "
        f"{size(output.stat().st_size)} of {size(source.size_bytes)}: {line(output)}"
    )
    if layout.used_of(kept) != layout.used:
        click.echo(
            f"Each token now uses {_most(layout.used_of(kept))} experts in place of "
            f"{_most(layout.used)}: more are not there."
        )
    click.echo(f"Run it: p2pmesh up --model {shlex.quote(line(output))}")


@contextlib.contextmanager
def _bar(label: str) -> Iterator[Progress]:
    """A bar on a terminal, full at the end also where there was nothing to do."""
    with click.progressbar(length=1, label=label, file=sys.stderr) as bar:

        def show(done: int, total: int) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        yield show
        show(bar.length or 1, bar.length or 1)


def _lists(keep: str, layout: ExpertLayout) -> ExpertLists:
    """Return the lists that `--keep` asks for."""
    if re.fullmatch(r"\d+", keep, re.ASCII):
        return first_experts(layout, int(keep))
    if _IDS.fullmatch(keep):
        return same_experts(layout, _ids(keep, layout.count))
    return _from_file(keep)


def _ids(text: str, count: int) -> list[int]:
    """The ids in a list such as "0,3,5-9"."""
    found: list[int] = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        first, last = int(low), int(high or low)
        if last < first:
            raise ConfigError(f"--keep {text}: {part} goes backwards; write {last}-{first}")
        if last >= count:
            raise ConfigError(f"--keep {text}: there is no expert {last}, only 0 to {count - 1}")
        found += range(first, last + 1)
    return found


def _from_file(name: str) -> ExpertLists:
    try:
        content: Any = read_json(Path(name))
    except OSError as exc:
        raise ConfigError(
            f"--keep {name} is neither a number, nor ids like 0,3,5-9, nor a file that can be "
            f"read ({exc.strerror})"
        ) from exc
    except ValueError as exc:
        raise ConfigError(f"--keep {name}: the file is not JSON ({exc})") from exc
    layers = content.get("layers") if isinstance(content, dict) else None
    if not isinstance(layers, dict) or not all(map(_is_row, layers.items())):
        raise ConfigError(f"--keep {name}: the file does not have the form {_FORM}")
    return {int(layer): tuple(ids) for layer, ids in layers.items()}


def _is_row(row: tuple[str, Any]) -> bool:
    layer, ids = row
    return (
        re.fullmatch(r"\d{1,9}", layer, re.ASCII) is not None
        and isinstance(ids, list)
        and all(type(one) is int for one in ids)
    )


def _most(used: int | tuple[int, ...]) -> int:
    return max(used) if isinstance(used, tuple) else used
