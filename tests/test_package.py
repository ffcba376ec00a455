"""The package as pip sees it: locks, build, and what the wheel carries."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement

import p2pmesh

ROOT = Path(__file__).resolve().parent.parent
HASH = "0" * 64


@pytest.fixture(scope="module")
def lock() -> ModuleType:
    """The program .ci/lock as a module."""
    loader = SourceFileLoader("lock", str(ROOT / ".ci" / "lock"))
    spec = importlib.util.spec_from_loader("lock", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["lock"] = module  # its dataclasses look themselves up there
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """A wheel of the working tree, built without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        yield archive


def pin(lock: ModuleType, name: str, version: str, marker: str = "") -> Any:
    return lock.Pin(name=name, version=version, marker=marker, hashes=(HASH,))


# The locks


def test_the_locks_agree_with_the_project(lock: ModuleType, project: dict[str, Any]) -> None:
    assert lock.problems(project, lock.read(lock.RUNTIME), lock.read(lock.TESTS)) == []


def test_the_pins_need_nothing_that_is_not_pinned(
    lock: ModuleType, project: dict[str, Any]
) -> None:
    """Follows what is installed here; `.ci/lock --platforms` does it for every platform."""
    python = ".".join(platform.python_version_tuple()[:2])
    here = lock.Cell(python=python, system=sys.platform, machine=platform.machine())
    pins = [*lock.read(lock.RUNTIME), *lock.read(lock.TESTS)]
    installed = {
        p.name: Metadata.from_email(
            importlib.metadata.distribution(p.name).read_text("METADATA") or "", validate=False
        )
        for p in pins
        if here in lock.cells_of(p.marker)
    }
    roots = [need for group in lock.needs(project) for need in group]
    assert installed
    assert lock.unmet(roots, installed, here) == []


def test_no_plugin_takes_trio_tests_for_asyncio(lock: ModuleType) -> None:
    names = {p.name for p in (*lock.read(lock.RUNTIME), *lock.read(lock.TESTS))}
    assert "pytest-trio" in names
    assert names.isdisjoint({"pytest-asyncio", "pytest-playwright", "pytest-aiohttp"})


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "--index-url https://example.invalid/simple\n" + text,
        lambda text: text + "extra==1.0\n",
        lambda text: text + f"extra @ https://example.invalid/x.whl \\\n    --hash=sha256:{HASH}\n",
        lambda text: text.replace("--only-binary :all:\n", ""),
        lambda text: text.replace(HASH, HASH[1:]),
        lambda text: text.replace("b==", "a==").replace("a==", "b==", 1),
        lambda text: text + "\n",
    ],
    ids=["index", "no hash", "url", "source packages", "short hash", "order", "blank line"],
)
def test_a_lock_in_another_form_is_refused(lock: ModuleType, damage: Any) -> None:
    pins = [pin(lock, "a", "1.0"), pin(lock, "b", "2.0", "python_version < '3.13'")]
    text = lock.render(reversed(pins))
    assert lock.parse(text) == pins
    with pytest.raises(lock.LockError, match="sorted pins with hashes"):
        lock.parse(damage(text))


@pytest.mark.parametrize(
    ("pins", "complaint"),
    [
        ([("a", "1.5", "")], None),
        ([("a", "1.5", "python_version < '3.13'"), ("a", "1.6", "python_version >= '3.13'")], None),
        ([], "No pin for Python 3.11 on linux x86_64: a<2,>=1"),
        ([("a", "2.0", "")], "No pin for Python 3.11 on linux x86_64: a<2,>=1"),
        (
            [("a", "1.5", "sys_platform != 'win32'")],
            "No pin for Python 3.11 on win32 AMD64: a<2,>=1",
        ),
        ([("a", "1.5", ""), ("a", "1.6", "sys_platform == 'win32'")], "pinned twice"),
    ],
)
def test_pins_out_of_step_are_named(
    lock: ModuleType, pins: list[tuple[str, str, str]], complaint: str | None
) -> None:
    project = {"project": {"dependencies": ["a>=1,<2"]}, "build-system": {"requires": []}}
    tests = lock.read(lock.TESTS)
    found = lock.problems(project, [pin(lock, *each) for each in pins], tests)
    assert found == [] if complaint is None else any(complaint in text for text in found)


def package(*wheels: str, marker: str = "") -> dict[str, Any]:
    files = [{"url": f"x/{name}", "hashes": {"sha256": name}} for name in wheels]
    return {"name": "a", "version": "1", "wheels": files, **({"marker": marker} if marker else {})}


def test_only_wheels_that_fit_a_cell_are_hashed(lock: ModuleType) -> None:
    wheels = (
        "a-1-cp311-abi3-manylinux_2_34_x86_64.manylinux_2_28_x86_64.whl",
        "a-1-cp311-abi3-manylinux2014_aarch64.whl",
        "a-1-cp311-abi3-macosx_10_9_universal2.whl",
        "a-1-cp311-abi3-win_amd64.whl",
    )
    others = (
        "a-1-cp311-abi3-win32.whl",
        "a-1-cp311-abi3-musllinux_1_2_x86_64.whl",
        "a-1-cp310-cp310-win_amd64.whl",
        "a-1-cp313-cp313t-win_amd64.whl",
    )
    (made,) = lock.pins_of([package(*wheels, *others)])
    assert (made.marker, made.hashes) == ("", tuple(sorted(wheels)))
    with pytest.raises(lock.LockError, match=r"a 1 has no wheel for Python 3\.1\d on win32 AMD64"):
        lock.pins_of([package(*wheels[:-1])])


def test_a_resolver_s_marker_becomes_the_plain_one_for_what_is_left(lock: ModuleType) -> None:
    pure = "a-1-py3-none-any.whl"
    windows = package(pure, marker="os_name == 'nt' and implementation_name != 'pypy'")
    (made,) = lock.pins_of([windows])
    assert made.marker == "sys_platform == 'win32'"
    (rest,) = lock.pins_of([package(pure)], known=[made])
    assert rest.marker == "sys_platform != 'win32'"
    assert lock.pins_of([windows], known=[made]) == []
    with pytest.raises(lock.LockError, match="No plain marker says where a 1 belongs"):
        lock.pins_of([package(pure, marker="python_version == '3.12'")])


def test_needs_are_followed_through_extras_and_markers(lock: ModuleType) -> None:
    def wheel_of(name: str, *needs: str) -> Metadata:
        fields = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0"]
        lines = (*fields, *(f"Requires-Dist: {need}" for need in needs))
        return Metadata.from_email("\n".join(lines), validate=False)

    windows = lock.Cell(python="3.13", system="win32", machine="AMD64")
    linux = lock.Cell(python="3.13", system="linux", machine="x86_64")
    wheels = {
        "a": wheel_of("a", "b[speed]", "d; sys_platform == 'win32'"),
        "b": wheel_of("b", "c>=2; extra == 'speed'", "e; extra == 'other'", "a"),
        "c": wheel_of("c"),
    }
    too_old = 'Not among the wheels for Python 3.13 on linux x86_64: c>=2; extra == "speed"'
    assert lock.unmet([Requirement("a")], wheels, linux) == [too_old]
    assert len(lock.unmet([Requirement("a")], wheels, windows)) == 2
    unasked = [Requirement("c"), Requirement("z; sys_platform == 'linux'")]
    assert lock.unmet(unasked, wheels, windows) == []


# The build


def test_the_build_is_pinned_to_the_last_tool(project: dict[str, Any]) -> None:
    pins = [Requirement(text) for text in project["build-system"]["requires"]]
    assert all(re.fullmatch(r"==[\w.]+", str(need.specifier)) for need in pins)
    todo, needed = ["hatchling"], set()
    while todo:
        name = todo.pop()
        needed.add(name)
        further = [Requirement(text) for text in importlib.metadata.requires(name) or ()]
        todo += [n.name for n in further if n.marker is None or n.marker.evaluate({"extra": ""})]
    assert {need.name for need in pins} == needed


def test_the_pythons_that_are_promised_are_locked(
    lock: ModuleType, project: dict[str, Any]
) -> None:
    named = re.findall(r":: Python :: (3\.\d+)", " ".join(project["project"]["classifiers"]))
    assert project["project"]["requires-python"] == f">={named[0]}"
    assert set(named) <= set(lock.PYTHONS)


def test_the_wheel_carries_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {"p2pmesh/py.typed", "p2pmesh/web/index.html"} <= names
    assert any(re.fullmatch(r"p2pmesh/models/data/[^/]+\.gguf", name) for name in names)
    assert all(name.startswith("p2pmesh/") for name in names)
    assert not any(re.search(r"(^|/)tests?/|__pycache__|\.pyc$", name) for name in names)
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "p2pmesh").rglob("*.py")}
    pages = {f"p2pmesh/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "web").rglob("*.*")}
    assert sources | pages <= names


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    prefix = f"p2pmesh-{p2pmesh.__version__}.dist-info"
    metadata = Metadata.from_email(wheel.read(f"{prefix}/METADATA"), validate=True)
    assert str(metadata.version) == p2pmesh.__version__
    assert metadata.license_expression == "MIT"
    assert wheel.read(f"{prefix}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert b"p2pmesh = p2pmesh.cli:main" in wheel.read(f"{prefix}/entry_points.txt")


def test_the_changelog_knows_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    headings = re.findall(r"^## \[?([^\s\]]+)", text, flags=re.MULTILINE)
    assert headings[0] in {"Unreleased", p2pmesh.__version__}
