"""The repository's own files, as the tests of its form see them."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON_DIRECTORIES = ("p2pmesh", "simulations", "tests", ".ci")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".js", ".css", ".html", ".json", ".yml", ""}
GENERATED = {"__pycache__", "node_modules"}


@dataclass(frozen=True)
class Source:
    """A text file: where it lies, with slashes, from the root; and what it says."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def module(self) -> str:
        """`p2pmesh/wire/codec.py` as `p2pmesh.wire.codec`, a package by its own name."""
        return self.path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")

    @property
    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        for item in ast.walk(self.tree):
            if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
                yield item


def ignored() -> set[str]:
    """What .gitignore names, without slashes and stars."""
    lines = (ROOT / ".gitignore").read_text("utf-8").split()
    return {line.strip("/*") for line in lines}


def python_sources(*directories: str) -> list[Source]:
    """Every Python file below the directories of the repository."""
    return [
        _source(path)
        for directory in directories or PYTHON_DIRECTORIES
        for path in sorted((ROOT / directory).rglob("*.py"))
        if not GENERATED & set(path.parts)
    ]


def text_files() -> list[Source]:
    """Every text file that could be committed."""
    skipped = ignored() | GENERATED | {".git"}
    return [
        _source(path)
        for path in sorted(ROOT.rglob("*"))
        if path.suffix in TEXT_SUFFIXES
        and path.is_file()
        and not skipped & set(path.relative_to(ROOT).parts)
    ]


def imported(source: Source) -> set[tuple[str, str]]:
    """All that a file imports, at its top or later: module and name, "" for the whole module."""
    found = set()
    for item in ast.walk(source.tree):
        if isinstance(item, ast.Import):
            found |= {(alias.name, "") for alias in item.names}
        elif isinstance(item, ast.ImportFrom) and item.module:
            found |= {(item.module, alias.name) for alias in item.names}
    return found


def imports(source: Source, known: Iterable[str] = ()) -> set[str]:
    """The full names of the modules that a file imports.

    Args:
        known: Modules that exist: `from p2pmesh.wire import codec` imports `p2pmesh.wire.codec`
            if that is one, else the name `codec` of `p2pmesh.wire`.
    """
    modules = set(known)
    return {
        f"{module}.{name}" if f"{module}.{name}" in modules else module
        for module, name in imported(source)
    }


def _source(path: Path) -> Source:
    return Source(path.relative_to(ROOT).as_posix(), path.read_text("utf-8"))
