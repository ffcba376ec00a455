"""The checks of `p2pmesh doctor`: each yields findings, with what to do about them.

Blocks: files, sockets, an engine that is asked. Leaves nothing but the cache of model headers.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from p2pmesh.commands import formatting
from p2pmesh.config import Address, Settings
from p2pmesh.control import Control, NoNodeError, find_node
from p2pmesh.engine.confinement import described
from p2pmesh.engine.find import Engine, find_engine
from p2pmesh.errors import LocalError, MeshError
from p2pmesh.home import PRIVATE_MODE, Home
from p2pmesh.models.store import Store
from p2pmesh.placement.resources import Memory, budget_bytes

State = Literal["ok", "warn", "fail"]

PYTHON_MIN, PYTHON_TESTED = (3, 11), (3, 13)
DISK_LOW_BYTES, DISK_FULL_BYTES = 2 * 2**30, 100 * 2**20  # an engine build; logs and keys
MEMORY_LOW_BYTES = 2**30  # the smallest models that are of use
CLOCK_SLACK_S = 60.0  # what the mesh tolerates
OTHERS = 0o077


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One finding.

    Attributes:
        name: What was looked at, in a word.
        detail: What was found.
        fix: What to do; "" when nothing.
    """

    name: str
    state: State
    detail: str
    fix: str = ""


class Doctor:
    """Runs the checks of one home, in an order in which later ones use earlier results."""

    def __init__(self, settings: Settings, home: Home) -> None:
        self._settings = settings
        self._home = home
        self._node: Control | None = None
        self._status: dict[str, Any] = {}

    def run(self) -> Iterator[Check]:
        """Every finding, as it is made."""
        checks: tuple[Callable[[], Iterator[Check]], ...] = (
            self._python,
            self._data,
            self._keys,
            self._running,
            self._ports,
            self._disk,
            self._engine,
            self._models,
            self._clock,
        )
        for check in checks:
            yield from check()

    def _python(self) -> Iterator[Check]:
        version = ".".join(map(str, sys.version_info[:3]))
        if sys.version_info < PYTHON_MIN:
            yield _fail("python", f"{version} is too old", "install Python 3.11 or newer")
        elif sys.version_info[:2] > PYTHON_TESTED:
            yield _warn("python", f"{version} is newer than what p2pmesh was tested with")
        else:
            yield _ok("python", version)

    def _data(self) -> Iterator[Check]:
        for name, path in (("data", self._home.root), ("cache", self._home.cache)):
            place = _existing(path)
            try:
                with tempfile.TemporaryFile(dir=place):
                    yield _ok(name, str(path))
            except OSError as exc:
                fix = "correct its permissions, or choose another place with --home"
                yield _fail(name, f"{place} cannot be written ({exc.strerror})", fix)

    def _keys(self) -> Iterator[Check]:
        home = self._home
        if not home.node_key.exists():
            yield _ok("key", "none yet; the first start makes one")
        for path in (home.node_key, home.run_file):
            try:
                mode = path.stat().st_mode & 0o777
            except FileNotFoundError:
                continue
            except OSError as exc:
                yield _fail("key", f"{path} cannot be seen ({exc.strerror})", "whose is it?")
                continue
            if sys.platform != "win32" and mode & OTHERS:
                fix = f"chmod {PRIVATE_MODE:o} {path}"
                yield _fail("key", f"others can read {path} (mode {mode:o})", fix)
            elif path == home.node_key:
                yield _ok("key", f"{path}, readable by its owner only")

    def _running(self) -> Iterator[Check]:
        try:
            self._node = find_node(self._home)
            self._status = self._node.status()
        except NoNodeError:
            if self._home.run_file.exists():
                yield _warn("node", "the last one did not end well; the next start cleans up")
            else:
                yield _ok("node", "none is running")
        except LocalError as exc:
            yield _fail("node", str(exc), "end its process, then p2pmesh up")
        else:
            run = self._node.run
            yield _ok("node", f"{run.name} runs (process {run.pid}) and answers")

    def _ports(self) -> Iterator[Check]:
        for name in ("api", "console", "peer"):
            if self._node is not None:
                address = getattr(self._node.run, name)
                yield _ok(name, f"{address}, held by this node")
            else:
                yield self._port(name, getattr(self._settings, name))

    def _port(self, name: str, address: Address) -> Check:
        try:
            _bind(address)
        except socket.gaierror:
            return _fail(name, f"{address.host} is no address", f"choose another with --{name}")
        except OSError as exc:
            fix = f"choose another with --{name} HOST:PORT"
            if name in self._settings.given:
                return _fail(name, f"{address} cannot be used ({exc.strerror})", fix)
            detail = f"{address} cannot be used ({exc.strerror})"
            return _warn(name, detail, f"a second node takes the next free port; else {fix}")
        return _ok(name, f"{address} is free")

    def _disk(self) -> Iterator[Check]:
        path = _existing(self._home.root)
        free = shutil.disk_usage(path).free
        detail = f"{formatting.size(free)} free at {path}"
        fix = "make room, or choose another place with --home"
        if free < DISK_FULL_BYTES:
            yield _fail("disk", detail, fix)
        elif free < DISK_LOW_BYTES:
            yield _warn("disk", detail, f"{fix}, before installing an engine")
        else:
            yield _ok("disk", detail)

    def _engine(self) -> Iterator[Check]:
        devices = []
        try:
            engine = find_engine(self._settings.engine, self._home.engine, os.environ)
        except MeshError as exc:
            yield _fail("engine", str(exc), "p2pmesh engine install")
        else:
            rpc = f"RPC {engine.rpc}" if engine.rpc else "no RPC, so no stage of a pipeline"
            yield _ok("engine", f"{engine.kind} {engine.version} ({engine.source}; {rpc})")
            yield _confinement(engine)
            devices = [device for device in engine.devices if not device.unified]
            for device in engine.devices:
                total = formatting.size(device.total_bytes)
                yield _ok("device", f"{device.id}: {device.description}, {total}")
            for warning in engine.warnings:
                yield _warn("engine", warning)
        if self._status.get("node", {}).get("role") == "use":
            return  # it runs no models
        yield self._memory(
            [Memory(total_bytes=d.total_bytes, free_bytes=d.free_bytes) for d in devices]
        )

    def _memory(self, devices: list[Memory]) -> Check:
        main = psutil.virtual_memory()
        memory = Memory(total_bytes=main.total, free_bytes=main.available, main=True)
        fixed = self._settings.memory
        budget = self._status.get("node", {}).get("memory", {}).get("budget_bytes")
        if budget is None:
            budget = budget_bytes(fixed, [memory, *devices])
        have = sum((one.total_bytes for one in devices), main.total)
        detail = f"{formatting.size(budget)} for models, of {formatting.size(have)} in this machine"
        if budget > have:
            return _fail("memory", detail, "give a smaller --memory")
        if budget < MEMORY_LOW_BYTES:
            return _warn("memory", detail, "close other programs, or serve from another machine")
        return _ok("memory", detail)

    def _models(self) -> Iterator[Check]:
        store = Store(self._home, environ=os.environ)
        try:
            store.embedded()
        except MeshError as exc:
            yield _fail("models", str(exc), "install p2pmesh again")
        yield _ok("models", f"{formatting.count(len(store.discover()), 'usable file')} found")
        for one in store.unusable:
            if one.state == "other":
                yield _ok("models", one.reason)
            else:
                # What is missing is named in the reason, with how to get it.
                damaged = one.state == "damaged"
                fix = "delete it, or download it again" if damaged else ""
                yield _warn("models", one.reason, fix)
        for text in self._settings.model:
            try:
                store.locate(text)
            except MeshError as exc:
                yield _fail("model", str(exc), "correct --model")

    def _clock(self) -> Iterator[Check]:
        now = time.time()
        text = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
        known = max(Path(__file__).stat().st_mtime, self._last_epoch())
        if now < known - CLOCK_SLACK_S:
            behind = formatting.duration(known - now)
            yield _fail("clock", f"{text} is at least {behind} behind", "set the clock")
        else:
            yield _ok("clock", text)

    def _last_epoch(self) -> float:
        """When this node last started, in unix seconds; 0 when it never did."""
        try:
            return float(int(self._home.epoch_file.read_text("ascii")))
        except (OSError, ValueError):
            return 0.0


def _bind(address: Address) -> None:
    """Takes the port for a moment; raises OSError when it cannot be had."""
    infos = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    for family, kind, protocol, _, where in infos:
        with socket.socket(family, kind, protocol) as probe:
            if sys.platform != "win32":  # there it would let two programs share a port
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)


def _existing(path: Path) -> Path:
    """`path`, or the nearest directory above it that exists."""
    return next((place for place in (path, *path.parents) if place.is_dir()), path)


def _confinement(engine: Engine) -> Check:
    """Warn where stages of others would have all rights of this user."""
    said = described(engine.confinement, engine.rpc_confinement)
    is_open = engine.rpc_confinement is not None and not engine.rpc_confinement.is_full
    return _warn("sandbox", said) if is_open else _ok("sandbox", said)


def _ok(name: str, detail: str) -> Check:
    return Check(name=name, state="ok", detail=detail)


def _warn(name: str, detail: str, fix: str = "") -> Check:
    return Check(name=name, state="warn", detail=detail, fix=fix)


def _fail(name: str, detail: str, fix: str) -> Check:
    return Check(name=name, state="fail", detail=detail, fix=fix)
