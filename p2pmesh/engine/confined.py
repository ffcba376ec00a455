"""Whether and how engines are confined on this machine.

What is confined are programs of llama.cpp itself, ELF files. A script that starts one (`--engine`
may name it) needs its interpreter and whatever else it touches, so it runs with all rights of the
user, as does the embedded engine, which is a Python program. Both are always said.
"""

from __future__ import annotations

import functools
import itertools
import os
import platform
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from p2pmesh.engine import confine
from p2pmesh.engine.confinement import (
    ACCELERATORS,
    Access,
    Confinement,
    Program,
    grade,
    rules,
)

_CONFINE = (sys.executable, "-I", "-S", confine.__file__)
_ELF = b"\x7fELF\x02\x01"  # 64 bits, little-endian: all that is confined
_INTERPRETER = 3  # PT_INTERP


@functools.cache
def machine_confinement() -> Confinement:
    """Return how far engines can be confined on this machine."""
    abi, filters = confine.landlock_abi(), confine.has_filters()
    machine = platform.machine()
    known = confine.is_known_machine(machine)
    return grade(sys.platform, machine, abi, known=known, filters=filters)


def confinement_of(command: Sequence[str]) -> Confinement:
    """Return how far an engine with this command is confined.

    Args:
        command: The words before an engine's flags.
    """
    here = machine_confinement()
    if here.level == "none":
        return here
    if command[0] == sys.executable:
        return Confinement("none", "the embedded engine is a Python program")
    if _loader(Path(command[0])) is None:
        return Confinement("none", "the engine is a script, not an ELF program")
    return here


def confined(argv: Sequence[str], access: Access, environ: Mapping[str, str]) -> list[str]:
    """Return the command line that starts an engine confined; it must be one that can be.

    Args:
        argv: Its own command line.
        access: What it needs.
        environ: Its environment.
    """
    path = Path(argv[0])
    folder = path.resolve().parent
    named = filter(os.path.isabs, environ.get("LD_LIBRARY_PATH", "").split(":"))
    beside = (folder.parent / name for name in ("lib", "lib64") if folder.name == "bin")
    program = Program(
        path=argv[0],
        loader=_loader(path) or "",
        libraries=_shared_objects({folder, path.parent, *beside, *map(Path, named)}),
        folder=str(folder),
    )
    kinds = ACCELERATORS.values()
    devices = _present(pattern for kind in kinds for pattern in kind.devices)
    files = _present(pattern for kind in kinds for pattern in kind.files)
    return [*_CONFINE, *rules(program, access, devices, files), "--", *argv]


def _present(patterns: Iterable[str]) -> list[str]:
    """Return the paths that these patterns match here."""
    root = Path("/")
    return sorted({str(path) for one in patterns for path in root.glob(one.removeprefix("/"))})


def _shared_objects(folders: Iterable[Path]) -> tuple[str, ...]:
    """Return the libraries right in these folders: one of them may be a home with keys below."""
    found = itertools.chain.from_iterable(folder.glob("*.so*") for folder in folders)
    return tuple(sorted(map(str, found)))


def _loader(path: Path) -> str | None:
    """Return what loads the libraries of a program, "" when it has none; None for a script."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
            if len(head) < 64 or not head.startswith(_ELF):
                return None
            table_at, size, count = (
                *struct.unpack_from("<Q", head, 32),
                *struct.unpack_from("<HH", head, 54),
            )
            file.seek(table_at)
            table = file.read(size * count)
            for number in range(count):
                kind, _, at, _, _, length = struct.unpack_from("<IIQQQQ", table, number * size)
                if kind == _INTERPRETER:
                    file.seek(at)
                    return file.read(length).rstrip(b"\0").decode("utf-8", "surrogateescape")
    except (OSError, struct.error):
        return None
    return ""
