"""Real cmake, ninja and compiler on a project that builds in a second; the real one in full."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import trio

from p2pmesh.engine import build as build_module
from p2pmesh.engine import sources
from p2pmesh.engine.accelerators import Backend
from p2pmesh.engine.build import TARGETS, install
from p2pmesh.engine.find import find_engine, managed_directory
from p2pmesh.engine.subprocesses import Progress
from p2pmesh.errors import EngineError, LocalError
from p2pmesh.home import Home
from tests.engine.packages import RPC_SERVER, SERVER, source_package
from tests.engine.samples import BUILT
from tests.engine.supervised import ask, is_ready, supervised, tiny

needs_tools = pytest.mark.skipif(
    sys.platform == "win32" or not all(map(shutil.which, ("cmake", "ninja", "c++"))),
    reason="cmake, ninja and a compiler",
)
pytestmark = needs_tools


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.at(tmp_path)


@pytest.fixture
def offer(home: Home, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Puts a package where a finished download would lie."""

    def put(changed: dict[str, str]) -> None:
        source_package(home.engine / "work", monkeypatch, changed)

    return put


class Steps(list[Progress]):
    """What was reported."""

    def names(self) -> list[str]:
        """The steps, each once."""
        return list(dict.fromkeys(progress.step for progress in self))


def build(home: Home, *, force: bool = False) -> tuple[Path, Steps]:
    steps = Steps()
    engine = install(home, report=steps.append, force=force, backend="cpu")
    assert (engine.source, engine.kind, engine.version) == ("managed", "native", "b11434")
    assert engine.rpc == "7.0.0"
    return Path(engine.command[0]), steps


def test_it_builds_publishes_and_is_found(
    home: Home, offer: Callable[[dict[str, str]], None]
) -> None:
    offer({})
    server, steps = build(home)
    assert steps.names() == ["download", "unpack", "configure", "build", "check", "done"]
    counted = [(p.done, p.total) for p in steps if p.total and p.step == "build"]
    assert counted[-1] == (10, 10)
    published = server.parent.parent
    assert sorted(path.name for path in server.parent.iterdir()) == sorted(TARGETS)
    assert (published / "LICENSE").read_text() == "MIT License\n"
    assert (published / "licenses" / "LICENSE-other").read_text() == "Other\n"
    description = json.loads((published / "build.json").read_bytes())
    assert description["version"] == sources.VERSION
    assert description["backend"] == "cpu"
    assert description["rpc"] == "7.0.0"
    assert description["binaries"] == {
        name: sources.sha256_of(server.parent / name) for name in TARGETS
    }
    assert published.name == f"b11434-cpu-{description['binaries']['llama-server'][:8]}"
    assert find_engine(None, home.engine, {"PATH": ""}).command == (str(server),)
    left = sorted(path.name for path in (home.engine / "work").iterdir())
    assert left == [sources.SOURCE_FILE]


def test_again_there_is_nothing_to_do(home: Home, offer: Callable[[dict[str, str]], None]) -> None:
    offer({})
    first, _ = build(home)
    begun_s = time.monotonic()
    second, steps = build(home)
    assert time.monotonic() - begun_s < 1.0
    assert second == first
    assert [p.detail for p in steps] == ["this engine is installed already"]


@pytest.mark.parametrize("damage", ["binary", "description", "flags"])
def test_a_damaged_engine_is_built_again(
    home: Home,
    offer: Callable[[dict[str, str]], None],
    damage: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offer({})
    server, _ = build(home)
    if damage == "binary":
        (server.parent / "llama-quantize").write_bytes(b"")
    elif damage == "description":
        (server.parent.parent / "build.json").write_bytes(b"[]")
    else:
        monkeypatch.setattr(build_module, "FLAGS", (*build_module.FLAGS, "-DNEW=1"))
    again, steps = build(home)
    assert "build" in steps.names()
    assert again == server
    assert (server.parent / "llama-quantize").stat().st_size > 0


def test_force_builds_again_and_a_new_engine_leaves_the_old_one_running(
    home: Home, offer: Callable[[dict[str, str]], None]
) -> None:
    offer({})
    first, _ = build(home)
    servers = [first]
    for number in range(2):
        offer({"llama-server.cpp": SERVER + f"int number_{number} = {number};\n"})
        server, steps = build(home, force=True)
        assert "build" in steps.names()
        servers.append(server)
    assert len(set(servers)) == 3
    # The one before stays for engines that run from it; what is older goes.
    assert [server.is_file() for server in servers] == [False, True, True]


def test_an_interrupted_build_goes_on_where_it_stopped(
    home: Home, offer: Callable[[dict[str, str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    offer({})
    monkeypatch.setattr(build_module, "_jobs", lambda: 1)

    def interrupt(progress: Progress) -> None:
        if progress.step == "build" and progress.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        install(home, report=interrupt, backend="cpu")
    assert managed_directory(home.engine) is None
    _, steps = build(home)
    total = max(p.total for p in steps if p.step == "build")
    assert total <= 7  # of 10
    assert "unpack" not in steps.names()


def test_what_does_not_compile_is_one_sentence(
    home: Home, offer: Callable[[dict[str, str]], None]
) -> None:
    offer({"llama-imatrix.cpp": "int main() { return missing; }\n"})
    with pytest.raises(LocalError, match=r"ninja failed: .*error: .*all of it is in .*install.log"):
        build(home)
    assert managed_directory(home.engine) is None
    assert "missing" in (home.engine / "install.log").read_text()


@pytest.mark.parametrize("backend", ["cuda", "cpu"])
def test_what_cannot_be_configured_is_one_sentence(
    home: Home,
    offer: Callable[[dict[str, str]], None],
    monkeypatch: pytest.MonkeyPatch,
    backend: Backend,
) -> None:
    monkeypatch.setattr(build_module, "missing_toolkit", lambda *_: "")
    monkeypatch.setattr(build_module, "ROOM_ACCELERATOR_BYTES", 1)
    offer({"CMakeLists.txt": 'message(FATAL_ERROR "no GPU was detected")\n'})
    with pytest.raises(LocalError) as caught:
        install(home, report=Steps().append, backend=backend)
    assert re.search(r"cmake failed: CMake Error .*: no GPU was detected", str(caught.value))
    assert str(home.engine / "install.log") in str(caught.value)
    assert ("cannot be built here: its toolkit is incomplete" in str(caught.value)) is (
        backend == "cuda"
    )


def test_what_does_not_run_is_never_published(
    home: Home, offer: Callable[[dict[str, str]], None]
) -> None:
    offer({})
    server, _ = build(home)
    offer({"llama-server.cpp": "int main() { return 1; }\n"})
    with pytest.raises(EngineError, match="was built and does not run"):
        build(home, force=True)
    assert managed_directory(home.engine) == server.parent


def test_an_rpc_server_that_says_nothing_is_no_reason_to_fail(
    home: Home, offer: Callable[[dict[str, str]], None]
) -> None:
    offer({"ggml-rpc-server.cpp": RPC_SERVER.replace("Starting", "Ending")})
    assert install(home, report=Steps().append, backend="cpu").rpc is None


def test_leftovers_of_a_killed_run_are_removed(
    home: Home, offer: Callable[[dict[str, str]], None]
) -> None:
    offer({})
    for name in ("download-abc", "unpack-abc", "publish-abc", "tools-abc"):
        (home.engine / "work" / name).mkdir()
    build(home)
    assert [p.name for p in (home.engine / "work").iterdir()] == [sources.SOURCE_FILE]


def test_two_at_once_do_not_collide(home: Home) -> None:
    home.engine.mkdir(parents=True)
    with build_module._locked(home.engine / "lock"):
        code = (
            "import sys; from pathlib import Path; from p2pmesh.home import Home;"
            "from p2pmesh.engine.build import install;"
            "install(Home.at(Path(sys.argv[1])), report=print)"
        )
        other = subprocess.run(
            [sys.executable, "-c", code, str(home.root)],
            capture_output=True,
            text=True,
            check=False,
        )
    assert "LocalError: Another p2pmesh engine install is running; wait for it" in other.stderr


def test_too_little_room_is_said_before_anything_is_done(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000_000))
    with pytest.raises(LocalError, match=r"needs 0\.6 GB in .* and 0\.1 GB are free; make room"):
        build(home)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full")
def test_a_backend_without_its_toolkit_is_one_sentence(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        build_module, "missing_toolkit", lambda *_: "the CUDA toolkit: nvcc is missing"
    )
    monkeypatch.setattr(build_module, "choose_backend", lambda _: "cpu")
    steps = Steps()
    with pytest.raises(LocalError) as caught:
        install(home, report=steps.append, backend="cuda")
    assert str(caught.value) == (
        "An engine with --backend cuda needs the CUDA toolkit: nvcc is missing; install it, or "
        "choose another: this machine can build cpu"
    )
    assert list(steps) == []


def test_a_disk_that_fills_up_is_one_sentence(
    home: Home, offer: Callable[[dict[str, str]], None]
) -> None:
    offer({})
    (home.engine / "install.log").symlink_to("/dev/full")
    with pytest.raises(LocalError, match=r"^The disk of .* is full; make room and run it again$"):
        build(home)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(LocalError, match=r"^Cannot write .*: Not a directory$"):
        build(Home.at(tmp_path))


def test_jobs_are_bounded_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for available, jobs in ((100, 1), (4_000_000_000, 2), (1_000_000_000_000, 64)):
        memory = SimpleNamespace(available=available)
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: memory)
        assert build_module._jobs() == jobs


@pytest.mark.full
@pytest.mark.skipif(os.environ.get("P2PMESH_TESTS") != "full", reason="P2PMESH_TESTS=full")
async def test_the_real_engine_is_built_and_serves(tmp_path: Path) -> None:
    """Some minutes on a bare machine; found in the user's cache the next time."""
    server, _ = await trio.to_thread.run_sync(build, BUILT)
    assert (server.parent.parent / "LICENSE").read_text().startswith("MIT License")
    async with supervised(tmp_path, tiny((str(server),))) as watched:
        status = await watched.wait(is_ready)
        answer = await trio.to_thread.run_sync(ask, status, status.api_key)
        assert answer == "The capital of France is Paris."
