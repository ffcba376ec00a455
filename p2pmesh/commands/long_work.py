"""What commands share that work for minutes: being stopped, room for files, texts, progress."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import psutil

from p2pmesh.commands.formatting import line
from p2pmesh.errors import ConfigError, LocalError
from p2pmesh.models.importance import DOMAINS_MAX, NAME_CHARACTERS_MAX


@contextlib.contextmanager
def stoppable(said: str) -> Iterator[None]:
    """A block that a request to stop (Ctrl-C, SIGTERM) ends in order: nothing half-done is left.

    Args:
        said: What the user is told then.

    Raises:
        LocalError: It was stopped.
    """
    stopped = False
    # Only for SIGINT does trio see to it that KeyboardInterrupt comes at a safe place.
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    except* KeyboardInterrupt:  # trio puts it into a group
        stopped = True
    finally:
        signal.signal(signal.SIGTERM, before)
    if stopped:
        raise LocalError(said)


@contextlib.contextmanager
def scratch(cache: Path, name: str) -> Iterator[Path]:
    """A folder for files that are not needed afterwards; deletes those that killed runs left.

    Args:
        cache: Where to make it; it must exist.
        name: Of the work, one word.
    """
    for left in cache.glob(f"{name}-*-*"):
        pid = left.name.split("-")[1]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{name}-{os.getpid()}-", dir=cache) as folder:
        yield Path(folder)


def domains(paths: Sequence[Path]) -> dict[str, Path]:
    """Return files by the names of their domains, which are theirs without the suffix.

    Raises:
        ConfigError: One is not there, or they do not name domains.
    """
    named = {path.stem[:NAME_CHARACTERS_MAX]: path for path in paths}
    if len(named) < len(paths):
        raise ConfigError("Two of the files have the same name, which is that of their domain")
    if len(named) > DOMAINS_MAX:
        raise ConfigError(f"{len(named)} files; there can be {DOMAINS_MAX} domains at most")
    for name, path in named.items():
        if not path.is_file():
            raise ConfigError(f"There is no file {path}; check the path")
        if not name.isprintable():
            raise ConfigError(f"{str(path)!r} names no domain; rename it to printable characters")
    return named


def show(what: str, unit: str, done: int, total: int) -> None:
    """Show progress as one moving line on a terminal, and nothing elsewhere."""
    if sys.stderr.isatty():
        of = f" of {total}" if total else ""
        click.echo(f"\r{line(what)}: {done}{of} {unit}\r", err=True, nl=False)
