"""`p2pmesh experts slice`: writes a file with some experts of a mixture-of-experts model."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import click

from p2pmesh.commands.formatting import line, size
from p2pmesh.config import Settings
from p2pmesh.errors import ConfigError, LocalError
from p2pmesh.home import Home, read_json
from p2pmesh.models.experts import (
    ExpertLayout,
    ExpertLists,
    check_lists,
    first_experts,
    same_experts,
)
from p2pmesh.models.slice import read_layout, write_shard
from p2pmesh.models.store import ModelFile, Store

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
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="What to write.")
@click.pass_obj
def slice_model(settings: Settings, *, model: str, keep: str, output: Path | None) -> None:
    """Write a file with some of the experts of MODEL, which runs like any other model.

    MODEL is a GGUF file or the name of a model found on this machine. The shard answers worse than
    the whole model; a smaller quantisation of the whole model is often the better choice.
    """
    source = Store(Home.of(settings), environ=os.environ).locate(model)
    layout = read_layout(source)
    lists = _lists(keep, layout)
    kept = check_lists(layout, lists)
    output = output or Path(f"{source.stem}-{kept}of{layout.count}-experts.gguf")
    if os.path.lexists(output):
        raise ConfigError(f"{output} is there already; delete it, or choose another with --output")
    written = _write(source, lists, output)
    click.echo(
        f"Wrote {line(output)}: {kept} of {layout.count} experts in {len(layout.layers)} layers, "
        f"{size(written)} of {size(source.size_bytes)}"
    )
    if layout.used_of(kept) != layout.used:
        click.echo(
            f"Each token now uses {_most(layout.used_of(kept))} experts in place of "
            f"{_most(layout.used)}: more are not there."
        )
    click.echo(f"Run it: p2pmesh up --model {line(output)}")


def _write(source: ModelFile, lists: ExpertLists, output: Path) -> int:
    """Write with a bar on a terminal; a request to stop ends in order and leaves no file."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with click.progressbar(length=1, label="Writing", file=sys.stderr) as bar:

            def show(done: int, total: int) -> None:
                bar.length = total
                bar.update(done - bar.pos)

            return write_shard(source, lists, output, show)
    except KeyboardInterrupt:
        raise LocalError(f"Stopped; {output} was not written") from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _lists(keep: str, layout: ExpertLayout) -> ExpertLists:
    """What `--keep` asks for."""
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
