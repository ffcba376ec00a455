"""The form of the repository: sizes, mirrors, and what must not be left lying about."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatch

import pytest

from tests.repository import ROOT, Source, ignored, python_sources, text_files

MODULE_LINES_MAX = 500
FUNCTION_LINES_MAX = 60
LINE_COLUMNS_MAX = 100

TOP_LEVEL = frozenset(
    [
        ".ci",
        ".git",
        ".gitignore",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "README.md",
        "constraints.txt",
        "p2pmesh",
        "pyproject.toml",
        "simulations",
        "tests",
        "web",
    ]
)

WITHOUT_A_TEST_OF_ITS_OWN: Mapping[str, str] = {
    "p2pmesh/__init__.py": "a version; tests/test_package.py compares it",
    "p2pmesh/*/__init__.py": "docstrings only, checked here",
    "p2pmesh/__main__.py": "one call; every test that starts a process goes through it",
    "p2pmesh/errors.py": "classes without behaviour",
    "p2pmesh/gossip/events.py": "values without behaviour; tests/gossip/ talks in them",
    "p2pmesh/transport/base.py": "an interface; tests/contract/test_transport.py is its test",
    "p2pmesh/transport/memory.py": "tests/contract/test_transport.py runs on it",
}
"""Modules (or patterns of them) that need no test file of their name, and why."""

REMINDER = re.compile(r"\b(?:T[O]DO|F[I]XME|X[X]X|H[A]CK)\b")
ELSEWHERE = {
    "a path of one machine": re.compile(r"(?<![\w.$}/-])/(?:work|root|tmp/v\d+)/"),
    "a package host": re.compile(r"\b(?:py(?:pi|thonhosted)|npm(?:js)?|crates)\.(?:org|com|io)\b"),
}

Rule = Callable[[Source], Iterable[str]]


def long_module(source: Source) -> Iterable[str]:
    lines = source.text.count("\n")
    if lines > MODULE_LINES_MAX:
        yield f"{source.path}: {lines} lines"


def long_function(source: Source) -> Iterable[str]:
    for function in source.functions:
        assert function.end_lineno is not None
        lines = function.end_lineno - function.lineno + 1
        first = function.body[0]
        if ast.get_docstring(function, clean=False) is not None:
            assert first.end_lineno is not None
            lines -= first.end_lineno - first.lineno + 1
        if lines > FUNCTION_LINES_MAX:
            yield f"{source.path}:{function.lineno}: {function.name} has {lines} lines"


def wide_line(source: Source) -> Iterable[str]:
    for number, line in enumerate(source.text.splitlines(), 1):
        if len(line) > LINE_COLUMNS_MAX:
            yield f"{source.path}:{number}: {len(line)} columns"


def left_reminder(source: Source) -> Iterable[str]:
    for number, line in enumerate(source.text.splitlines(), 1):
        if REMINDER.search(line):
            yield f"{source.path}:{number}: {line.strip()}"


def foreign_place(source: Source) -> Iterable[str]:
    for number, line in enumerate(source.text.splitlines(), 1):
        for what, pattern in ELSEWHERE.items():
            if pattern.search(line):
                yield f"{source.path}:{number}: {what}"


def idle_test(source: Source) -> Iterable[str]:
    """Tests that cannot fail: no assert or `raises`, not even in a helper of the same file."""
    functions = list(source.functions)
    checking: set[str] = set()
    while True:
        more = {f.name for f in functions if any(_checks(i, checking) for i in ast.walk(f))}
        if more == checking:
            break
        checking = more
    for function in functions:
        if function.name.startswith("test_") and function.name not in checking:
            yield f"{source.path}:{function.lineno}: {function.name} checks nothing"


def code_in_package(source: Source) -> Iterable[str]:
    """A package's `__init__` says what it is; only the top one also holds the version."""
    if fnmatch(source.path, "p2pmesh/*/__init__.py") and len(source.tree.body) > 1:
        yield f"{source.path}: code in a package's docstring module"


def _checks(item: ast.AST, helpers: Collection[str]) -> bool:
    """Whether a statement can fail a test: an assert of something, `raises`, a checking helper."""
    if isinstance(item, ast.Assert):
        return not isinstance(item.test, ast.Constant)
    if isinstance(item, ast.Call):
        called = item.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        known = {"raises", "warns", "fail", "RaisesGroup", *helpers}
        return name in known or name.startswith("assert_")
    return False


def unmirrored(modules: Iterable[str], tests: Iterable[str]) -> list[str]:
    """Modules without a test file of their name, and excuses that excuse nothing."""
    files, existing = list(modules), set(tests)
    missing = [
        path
        for path in files
        if re.sub(r"^p2pmesh/(.*?)([^/]+)$", r"tests/\1test_\2", path) not in existing
    ]
    unused = [
        f"{pattern}: an excuse for nothing"
        for pattern in WITHOUT_A_TEST_OF_ITS_OWN
        if not any(fnmatch(path, pattern) for path in missing)
    ]
    excused = WITHOUT_A_TEST_OF_ITS_OWN
    return [p for p in missing if not any(fnmatch(p, pattern) for pattern in excused)] + unused


# The repository


@pytest.mark.parametrize(
    ("rule", "directories"),
    [
        (long_module, ("p2pmesh", "simulations")),
        (long_function, ("p2pmesh", "simulations")),
        (wide_line, ("p2pmesh", "simulations", "tests", ".ci")),
        (idle_test, ("tests",)),
        (code_in_package, ("p2pmesh",)),
    ],
)
def test_python_is_tidy(rule: Rule, directories: tuple[str, ...]) -> None:
    sources = python_sources(*directories)
    assert sources
    faults = [fault for source in sources for fault in rule(source)]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("rule", [left_reminder, foreign_place])
def test_text_is_tidy(rule: Rule) -> None:
    files = text_files()
    assert {"README.md", "pyproject.toml", ".ci/run", "tests/test_tidy.py"} <= {
        file.path for file in files
    }
    faults = [fault for file in files for fault in rule(file)]
    assert not faults, "\n".join(faults)


def test_every_module_has_its_tests() -> None:
    modules = [source.path for source in python_sources("p2pmesh")]
    faults = unmirrored(modules, [source.path for source in python_sources("tests")])
    assert not faults, "\n".join(faults)


def test_the_top_level_is_what_it_is() -> None:
    assert {path.name for path in ROOT.iterdir()} - ignored() <= TOP_LEVEL
    assert (ROOT / "CHANGELOG.md").read_text("utf-8").startswith("# Changelog")


# The checks themselves


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        (long_module, "\n" * 500, "\n" * 501),
        (
            long_function,
            'def f():\n    """' + "\n" * 99 + '"""\n' + "    pass\n" * 59,
            "async def f():\n" + "    pass\n" * 60,
        ),
        (long_function, "def f():\n" + "    pass\n" * 59, "def f():\n" + "    pass\n" * 60),
        (wide_line, "x" * 100, "x" * 101),
        (left_reminder, "# mktemp XXXXXX, todos", "# TO~DO: later"),
        (left_reminder, "", "x = 1  # FIX~ME"),
        (foreign_place, "see work/x and {home}/root/x, a/work/b", "/wo~rk/main"),
        (foreign_place, "/roots/x", 'open("/ro~ot/.cache")'),
        (foreign_place, "the registry pypi", "files.py~thonhosted.org"),
        (idle_test, "def helper(): pass", "def test_x(): pass"),
        (
            idle_test,
            "def test_x(): ok()\ndef ok():\n    assert x",
            "def test_x(): ok()\ndef ok(): 1",
        ),
        (idle_test, "def test_x():\n    assert x", "def test_x():\n    assert True"),
        (idle_test, "def test_x():\n    with raises(E): f()", "async def test_x():\n    await f()"),
        (idle_test, "class T:\n    def test_x(self):\n        assert_ok()", "def test_x(): ok()"),
    ],
)
def test_a_fault_is_found(rule: Rule, good: str, bad: str) -> None:
    # Without the tildes, which keep the checks from finding these very lines.
    good, bad = good.replace("~", ""), bad.replace("~", "")
    assert list(rule(Source("some/file.py", good))) == []
    assert len(list(rule(Source("some/file.py", bad)))) == 1


def test_code_in_a_package_is_found() -> None:
    docstring = '"""What it is."""\n'
    assert list(code_in_package(Source("p2pmesh/wire/__init__.py", docstring))) == []
    assert list(code_in_package(Source("p2pmesh/wire/__init__.py", docstring + "x = 1")))


def test_a_module_without_tests_is_found() -> None:
    excused = [pattern.replace("*", "wire") for pattern in WITHOUT_A_TEST_OF_ITS_OWN]
    modules = [*excused, "p2pmesh/node.py", "p2pmesh/wire/codec.py"]
    tests = ["tests/test_node.py", "tests/wire/test_codec.py"]
    assert unmirrored(modules, tests) == []
    assert unmirrored(modules, tests[:1]) == ["p2pmesh/wire/codec.py"]
    assert unmirrored(modules, tests[1:]) == ["p2pmesh/node.py"]
    assert unmirrored(modules[1:], tests) == ["p2pmesh/__init__.py: an excuse for nothing"]


def test_what_gitignore_names_is_read() -> None:
    assert {"__pycache__", ".venv", "dist"} <= ignored()
