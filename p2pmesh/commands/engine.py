"""`p2pmesh engine info` and `p2pmesh engine install`."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict
from typing import Any, get_args

import click

from p2pmesh.config import Settings
from p2pmesh.engine.accelerators import Backend
from p2pmesh.engine.build import install as install_engine
from p2pmesh.engine.confinement import described
from p2pmesh.engine.find import Engine, Finding, survey
from p2pmesh.engine.subprocesses import Progress
from p2pmesh.errors import ConfigError, EngineError, LocalError
from p2pmesh.home import Home

_GIB = 1024**3
_BAR_WIDTH = 30
_STEPS = {
    "download": "Downloading llama.cpp",
    "tools": "Fetching build tools",
    "unpack": "Unpacking",
    "configure": "Configuring",
    "build": "Building",
    "check": "Checking",
    "done": "Done",
}

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def engine() -> None:
    """The program that runs models: llama.cpp's server."""


@engine.command()
@as_json
@click.pass_obj
def info(settings: Settings, *, as_json: bool) -> None:
    """Show which engines are here, in the order in which they are tried."""
    findings = list(survey(settings.engine, Home.of(settings).engine, os.environ))
    chosen = next((found.engine for found in findings if found.engine is not None), None)
    if settings.engine is not None and findings[0].engine is None:
        raise ConfigError(f"--engine {findings[0].where}: {findings[0].problem}")
    if as_json:
        click.echo(json.dumps(_as_object(findings, chosen)))
    else:
        for finding in findings:
            for line in _lines(finding, chosen):
                click.echo(line)
    if chosen is None:
        raise EngineError("No engine works here; try p2pmesh engine install")


@engine.command()
@as_json
@click.option("--force", is_flag=True, help="Build again from the beginning.")
@click.option(
    "--backend",
    type=click.Choice(get_args(Backend)),
    help="What to build for, instead of the best that this machine has a toolkit for.",
)
@click.pass_obj
def install(settings: Settings, *, as_json: bool, force: bool, backend: Backend | None) -> None:
    """Build llama.cpp for this machine; an interrupted build goes on where it stopped."""
    display = _Events() if as_json else _Bar(is_terminal=sys.stderr.isatty())
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        engine = install_engine(
            Home.of(settings), report=display.show, force=force, backend=backend
        )
    except KeyboardInterrupt:
        raise LocalError("Stopped; p2pmesh engine install goes on from here") from None
    finally:
        signal.signal(signal.SIGTERM, before)
        display.close()
    if as_json:
        click.echo(json.dumps({"engine": _engine_object(engine)}))
    else:
        click.echo(_summary(engine))
        click.echo(f"  {engine.command[0]}")


class _Events:
    """Progress as JSON lines, for programs."""

    def show(self, progress: Progress) -> None:
        click.echo(json.dumps(asdict(progress)))

    def close(self) -> None:
        """Nothing is left open."""


class _Bar:
    """Progress for people: one moving line on a terminal, one line for each step elsewhere."""

    def __init__(self, *, is_terminal: bool) -> None:
        self._is_terminal = is_terminal
        self._step = ""
        self._width = 0

    def show(self, progress: Progress) -> None:
        text = _STEPS[progress.step]
        if self._step != progress.step:
            self.close()
            self._step = progress.step
            if not self._is_terminal:
                detail = f": {progress.detail}" if progress.detail else ""
                click.echo(f"{text}{detail}", err=True)
        if self._is_terminal:
            line = f"{text} {_bar(progress)}".rstrip()
            click.echo(f"\r{line:<{self._width}}", err=True, nl=False)
            self._width = len(line)  # what the next, shorter line has to cover

    def close(self) -> None:
        """Ends the moving line."""
        if self._step and self._is_terminal:
            click.echo("", err=True)
        self._step = ""
        self._width = 0


def _bar(progress: Progress) -> str:
    if progress.total == 0:
        return f"{progress.done or ''} {progress.detail}".strip()
    filled = _BAR_WIDTH * progress.done // progress.total
    percent = 100 * progress.done // progress.total
    return f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {percent:3} %"


def _summary(engine: Engine) -> str:
    rpc = f"RPC {engine.rpc}" if engine.rpc else "no RPC: cannot be a pipeline stage"
    return f"{engine.kind} engine {engine.version} ({engine.source}; {rpc})"


def _lines(finding: Finding, chosen: Engine | None) -> list[str]:
    engine = finding.engine
    if engine is None:
        where = f" {finding.where}" if finding.where else ""
        return [f"  {finding.source}{where}: {finding.problem}"]
    lines = [
        f"{'*' if engine is chosen else ' '} {_summary(engine)}",
        f"      {finding.where}",
        *(
            f"      {device.id}: {device.description}, {device.total_bytes / _GIB:.1f} GiB, "
            f"{device.free_bytes / _GIB:.1f} GiB free"
            for device in engine.devices
        ),
    ]
    if not engine.devices:
        lines.append("      CPU only")
    lines.append(f"      {described(engine.confinement, engine.rpc_confinement)}")
    return lines + [f"      Warning: {warning}" for warning in engine.warnings]


def _as_object(findings: list[Finding], chosen: Engine | None) -> dict[str, Any]:
    return {
        "engine": None if chosen is None else _engine_object(chosen),
        "searched": [
            {
                "source": finding.source,
                "where": finding.where,
                "problem": finding.problem,
                "engine": None if finding.engine is None else _engine_object(finding.engine),
            }
            for finding in findings
        ],
    }


def _engine_object(engine: Engine) -> dict[str, Any]:
    return asdict(engine)
