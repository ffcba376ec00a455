"""`p2pmesh engine install`: builds llama.cpp's programs for this very machine.

    download ─► unpack ─► configure ─► build ─► check ─► publish

Each step leaves something that the next run finds: a verified package, a whole source folder, a
build folder in which ninja goes on where it stopped. Nobody sees an engine before its programs
have run: a finished directory is renamed into place and only then does `current` name it. A
running engine goes on in the old directory, which stays until the next installation.

Below `Home.engine`:
    current                 the name of the published directory
    b11434-cpu-1a2b3c4d/    bin/, LICENSE, licenses/, build.json
    work/                   what makes an interrupted installation resumable
    install.log, lock
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from p2pmesh.engine import sources
from p2pmesh.engine.accelerators import Backend, Machine, choose_backend, missing_toolkit
from p2pmesh.engine.find import SERVER, Engine, examine_native, managed_directory
from p2pmesh.engine.sources import Tools
from p2pmesh.engine.subprocesses import CommandError, Progress, Report, run
from p2pmesh.errors import EngineError, LocalError
from p2pmesh.home import Home, write_atomic

TARGETS = (
    "llama-server", "ggml-rpc-server", "llama-imatrix", "llama-perplexity", "llama-quantize",
)  # fmt: skip

FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_RPC=ON",
    f"-DLLAMA_BUILD_NUMBER={sources.BUILD_NUMBER}",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
BACKEND_FLAGS: dict[Backend, tuple[str, ...]] = {
    "cpu": ("-DGGML_METAL=OFF",),
    "cuda": ("-DGGML_CUDA=ON",),
    "rocm": ("-DGGML_HIP=ON",),
    "vulkan": ("-DGGML_VULKAN=ON",),
    "metal": ("-DGGML_METAL=ON", "-DGGML_METAL_EMBED_LIBRARY=ON"),
}

# Sources 180 MB, build folder 120 MB, package 40 MB; kernels for accelerators come on top.
ROOM_BYTES: dict[Backend, int] = {"cpu": 600_000_000, "metal": 600_000_000}
ROOM_ACCELERATOR_BYTES = 3_000_000_000
# The largest file of llama-server takes its compiler 1.2 GB.
JOB_BYTES = 1_500_000_000

_NINJA_STEP = re.compile(r"^\[(\d+)/(\d+)\] ?(.*)$")
# What a killed installation may leave in `work`.
_TEMPORARY = ("download-*", "unpack-*", "tools-*", "publish-*")
_NAME = re.compile(r"^b\d+-[a-z]+-[0-9a-f]{8}$")


def install(
    home: Home, *, report: Report, force: bool = False, backend: Backend | None = None
) -> Engine:
    """Builds and publishes the managed engine unless the published one is what it would build.

    Blocks for minutes; can be ended at any time and goes on where it stopped when called again.

    Args:
        home: Where caches are.
        report: Called often, with how far it is.
        force: Build again from the beginning, whatever there is.
        backend: What to build for; None takes the best that this machine has a toolkit for.

    Raises:
        LocalError: A tool, room or the network is missing, or another installation is running.
        EngineError: The source is not the pinned one, or what was built does not work.
    """
    root = home.engine
    machine = Machine(environ=os.environ)
    backend = backend or choose_backend(machine)
    try:
        (root / "work").mkdir(parents=True, exist_ok=True)
        with _locked(root / "lock"):
            if not force and _is_current(root, backend):
                report(Progress(step="done", detail="this engine is installed already"))
            elif missing := missing_toolkit(backend, machine):
                raise LocalError(
                    f"An engine with --backend {backend} needs {missing}; install it, or choose "
                    f"another: this machine can build {choose_backend(machine)}"
                )
            else:
                _install(root, backend, report, force=force)
    except OSError as exc:
        if exc.errno == errno.ENOSPC:
            raise LocalError(f"The disk of {root} is full; make room and run it again") from exc
        raise LocalError(f"Cannot write {exc.filename or root}: {exc.strerror}") from exc
    return _published(root)


def _install(root: Path, backend: Backend, report: Report, *, force: bool) -> None:
    work, log = root / "work", root / "install.log"
    source, build = work / f"source-{sources.VERSION}", work / f"build-{sources.VERSION}-{backend}"
    for pattern in _TEMPORARY:
        for leftover in work.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)
    if force:
        shutil.rmtree(build, ignore_errors=True)
    _check_room(root, backend)
    tools = sources.find_tools(work, report)
    log.write_bytes(b"")
    sources.unpack(sources.fetch_source(work, report), source, report)
    flags = [*FLAGS, *BACKEND_FLAGS[backend]]
    report(Progress(step="configure"))
    _configure(tools, source, build, flags, backend=backend, log=log)
    report(Progress(step="build"))
    _compile(tools, build, report=report, log=log)
    report(Progress(step="check"))
    _publish(root, build, source, backend, flags)
    report(Progress(step="done"))
    for leftover in (build, source):
        shutil.rmtree(leftover, ignore_errors=True)


def _configure(
    tools: Tools, source: Path, build: Path, flags: list[str], *, backend: Backend, log: Path
) -> None:
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools.ninja}"]
    try:
        run([tools.cmake, "-S", str(source), "-B", str(build), *generator, *flags], log=log)
    except CommandError as exc:
        if backend == "cpu":
            raise LocalError(f"{exc}; all of it is in {log}") from exc
        raise LocalError(
            f"An engine with --backend {backend} cannot be built here: its toolkit is incomplete "
            f"or this machine has no such accelerator ({exc}; all of it is in {log}); mend that, "
            "or build one with --backend cpu"
        ) from exc


def _compile(tools: Tools, build: Path, *, report: Report, log: Path) -> None:
    def on_line(line: str) -> None:
        match = _NINJA_STEP.match(line)
        if match:
            report(Progress(step="build", done=int(match[1]), total=int(match[2]), detail=match[3]))

    try:
        run(
            [tools.ninja, "-C", str(build), "-j", str(_jobs()), *TARGETS],
            on_line=on_line,
            log=log,
            extra_environ={"NINJA_STATUS": "[%f/%t] "},
        )
    except CommandError as exc:
        raise LocalError(f"{exc}; all of it is in {log}") from exc


def _publish(root: Path, build: Path, source: Path, backend: Backend, flags: list[str]) -> None:
    """Makes what was built visible, if it runs."""
    with tempfile.TemporaryDirectory(dir=root / "work", prefix="publish-") as name:
        staged = Path(name, "engine")
        (staged / "bin").mkdir(parents=True)
        shutil.copyfile(source / "LICENSE", staged / "LICENSE")
        if (source / "licenses").is_dir():  # of the libraries inside llama.cpp
            shutil.copytree(source / "licenses", staged / "licenses")
        for target in TARGETS:
            shutil.copy(build / "bin" / _program(target), staged / "bin")
        finding = examine_native("managed", staged / "bin" / SERVER, os.environ)
        if finding.engine is None:
            raise EngineError(f"The engine was built and does not run: {finding.problem}")
        binaries = {path.name: sources.sha256_of(path) for path in (staged / "bin").iterdir()}
        description = {
            "package": sources.PACKAGE,
            "version": sources.VERSION,
            "backend": backend,
            "flags": flags,
            "rpc": finding.engine.rpc,
            "binaries": binaries,
        }
        write_atomic(staged / "build.json", json.dumps(description, indent=1).encode())
        digest = binaries[SERVER][:8]
        published = root / f"b{sources.BUILD_NUMBER}-{backend}-{digest}"
        if published.exists():  # the same bytes, damaged or complete: the new ones are checked
            published.replace(Path(name, "old"))
        staged.replace(published)
    previous = managed_directory(root)
    write_atomic(root / "current", published.name.encode())
    kept = {published.name, previous.parent.name if previous else ""}
    for other in root.iterdir():
        if _NAME.match(other.name) and other.name not in kept:
            shutil.rmtree(other, ignore_errors=True)


def _is_current(root: Path, backend: Backend) -> bool:
    """Whether the published engine is the one that would be built, byte for byte intact."""
    directory = managed_directory(root)
    if directory is None:
        return False
    try:
        description: dict[str, Any] = json.loads((directory.parent / "build.json").read_bytes())
        wanted = (sources.VERSION, backend, [*FLAGS, *BACKEND_FLAGS[backend]])
        found = tuple(description[key] for key in ("version", "backend", "flags"))
        return found == wanted and description["binaries"] == {
            _program(name): sources.sha256_of(directory / _program(name)) for name in TARGETS
        }
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _published(root: Path) -> Engine:
    directory = managed_directory(root)
    assert directory is not None
    finding = examine_native("managed", directory / SERVER, os.environ)
    if finding.engine is None:
        raise EngineError(
            f"The installed engine does not run ({finding.problem}); "
            "p2pmesh engine install --force builds it again"
        )
    return finding.engine


def _jobs() -> int:
    """As many compilers as there are cores, and as fit into memory."""
    fitting = int(psutil.virtual_memory().available) // JOB_BYTES
    return max(1, min(os.cpu_count() or 1, fitting))


def _check_room(root: Path, backend: Backend) -> None:
    need_bytes = ROOM_BYTES.get(backend, ROOM_ACCELERATOR_BYTES)
    free_bytes = shutil.disk_usage(root).free
    if free_bytes < need_bytes:
        raise LocalError(
            f"Building needs {need_bytes / 1e9:.1f} GB in {root} and {free_bytes / 1e9:.1f} GB "
            "are free; make room or choose another --home"
        )


def _program(target: str) -> str:
    return f"{target}.exe" if sys.platform == "win32" else target


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One installation at a time; the lock ends with the process, however it ends."""
    with path.open("ab") as file:
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise LocalError("Another p2pmesh engine install is running; wait for it") from exc
        yield
