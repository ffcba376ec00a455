"""Engines that were taken over, and what they cannot do then: all of it works unconfined.

The intruder is Python under the rules of a stage, with Python's own library to read besides.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from p2pmesh.engine import confine
from p2pmesh.engine.argv import Launch
from p2pmesh.engine.confined import confined, confinement_of, machine_confinement
from p2pmesh.engine.confinement import Access, Confinement
from p2pmesh.engine.find import find_engine
from p2pmesh.engine.rpc_server import RpcServer
from p2pmesh.engine.server import LlamaServer
from tests.engine import intruder
from tests.engine.rpc_frames import BUILD
from tests.engine.samples import EMBEDDED, MODEL, Plain, native, wait_until
from tests.engine.supervised import ask, is_ready, supervised

needs_full = pytest.mark.skipif(
    not machine_confinement().is_full, reason=f"on this machine: {machine_confinement()}"
)
PYTHON = os.path.realpath(sys.executable)


def attempt(name: str, on: object, access: Access | None) -> int:
    """How the attempt of an intruder ends; unconfined without `access`."""
    command = [PYTHON, "-I", "-S", intruder.__file__, name, str(on)]
    environ = {"PATH": os.defpath}
    if access is not None:
        needed = (Path(intruder.__file__), Path(sys.base_prefix, "lib"))
        all_files = Access(files=(*needed, *access.files), bind=access.bind, connect=access.connect)
        command = confined(command, all_files, environ)
    done = subprocess.run(command, env=environ, timeout=30, check=False, capture_output=True)
    assert done.returncode in (0, intruder.REFUSED, intruder.UNAVAILABLE), done
    return done.returncode


def assert_refused(name: str, on: object, access: Access) -> None:
    """Only the confinement keeps the intruder from it."""
    unconfined = attempt(name, on, None)
    if unconfined != 0:
        pytest.skip("this system refuses it to everybody")
    assert attempt(name, on, access) == intruder.REFUSED


@pytest.fixture
def listener() -> Iterator[int]:
    """The port of a server that a stage has nothing to do with."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text("secret")
    path.chmod(0o600)
    return path


@needs_full
@pytest.mark.parametrize("name", ["read_file", "write_file", "chmod", "touch", "truncate"])
def test_the_nodes_files_are_neither_read_nor_changed(key: Path, name: str) -> None:
    assert_refused(name, key, Access())


@needs_full
def test_nothing_is_created_or_listed(tmp_path: Path) -> None:
    assert_refused("list_folder", tmp_path, Access())
    assert attempt("write_file", tmp_path / "new", Access()) == intruder.REFUSED
    assert not (tmp_path / "new").exists()
    assert attempt("write_file", tmp_path / "new", None) == 0


@needs_full
def test_model_files_are_read_through_links_and_not_changed(tmp_path: Path, key: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(key)
    access = Access(files=(link,))
    assert attempt("read_file", link, access) == 0
    assert attempt("read_file", key, access) == 0
    assert_refused("write_file", key, access)


@needs_full
@pytest.mark.parametrize("name", ["read_file", "list_folder"])
def test_other_processes_are_not_looked_into(name: str) -> None:
    on = f"/proc/{os.getpid()}/" + ("environ" if name == "read_file" else "fd")
    assert_refused(name, on, Access())


@needs_full
@pytest.mark.parametrize("name", ["connect", "connect_fast"])
def test_nothing_is_connected_to_but_named_ports(name: str, listener: int, free_port: int) -> None:
    assert_refused(name, listener, Access())
    assert_refused(name, listener, Access(connect=(free_port,)))


@needs_full
def test_the_ports_of_a_pipeline_are_connected_to(listener: int) -> None:
    assert attempt("connect", listener, Access(connect=(listener,))) == 0


@needs_full
def test_it_listens_on_its_own_port_alone(free_port: int) -> None:
    assert attempt("listen", free_port, Access(bind=free_port)) == 0
    assert_refused("listen", free_port, Access(bind=free_port + 1))
    assert_refused("listen", free_port, Access(bind=0))
    assert attempt("listen", 0, Access(bind=0)) == 0


@needs_full
@pytest.mark.parametrize("name", ["udp", "unix", "netlink", "mptcp", "pair"])
def test_there_are_no_other_sockets(name: str) -> None:
    assert_refused(name, "", Access())


@needs_full
@pytest.mark.parametrize("path", [shutil.which("true"), PYTHON])
def test_nothing_is_executed_not_even_the_engine_again(path: str) -> None:
    assert_refused("execute", path, Access())


@needs_full
@pytest.mark.parametrize("name", ["kill", "signal_by_file", "limit"])
def test_the_node_is_not_signalled_or_limited(name: str) -> None:
    assert_refused(name, os.getpid(), Access())


@needs_full
def test_its_own_group_is_not_signalled() -> None:
    assert_refused("kill", 0, Access())


@needs_full
@pytest.mark.parametrize("name", ["trace", "read_memory", "shared_memory"])
def test_no_memory_of_other_processes_is_reached(name: str) -> None:
    assert_refused(name, "", Access())


@needs_full
@pytest.mark.parametrize("name", ["namespace", "io_uring"])
def test_dangerous_parts_of_the_kernel_are_closed(name: str) -> None:
    assert_refused(name, "", Access())


@needs_full
def test_threads_and_forks_go_on_working() -> None:
    assert attempt("thread_and_fork", "", Access()) == 0


@needs_full
async def test_a_stage_is_confined_and_says_so(tmp_path: Path) -> None:
    command = (str(native() / "ggml-rpc-server"),)
    here = confinement_of(command)
    kind = RpcServer(command, BUILD, name="stage", in_use=bool, confinement=here)
    async with supervised(tmp_path, kind) as watched:
        status = await watched.wait(is_ready)
        assert status.confinement == Confinement("full")
        assert is_confined(status.pid)


@needs_full
async def test_a_confined_engine_ends_with_its_launcher(tmp_path: Path) -> None:
    command = (str(native() / "ggml-rpc-server"),)
    here = confinement_of(command)
    kind = RpcServer(command, BUILD, name="stage", in_use=bool, confinement=here)
    async with supervised(tmp_path, kind) as watched:
        status = await watched.wait(is_ready)
        engine = psutil.Process(status.pid)
        launcher = engine.parent()
        assert launcher is not None
        launcher.kill()
        await watched.wait(lambda status: status.state == "loading")
        wait_until(lambda: not engine.is_running(), within_s=5.0)


@needs_full
async def test_a_confined_llama_server_serves(tmp_path: Path) -> None:
    link = tmp_path / "models" / "link.gguf"
    link.parent.mkdir()
    link.symlink_to(MODEL)
    launch = Launch(model_paths=(link,), alias="tiny", context=512)
    kind = LlamaServer(Plain((str(native() / "llama-server"),)), launch)
    async with supervised(tmp_path, kind) as watched:
        status = await watched.wait(is_ready)
        assert status.confinement == Confinement("full")
        assert is_confined(status.pid)
        assert ask(status, kind.api_key)
        assert "ermission denied" not in watched.engine.log_path.read_text()
        assert "not permitted" not in watched.engine.log_path.read_text()


def is_confined(pid: int | None) -> bool:
    """Whether the kernel says that a process has a filter and gets no new rights."""
    assert pid is not None
    text = Path(f"/proc/{pid}/status").read_text()
    return "Seccomp:\t2\n" in text and "NoNewPrivs:\t1\n" in text


@needs_full
def test_an_engine_beside_a_home_reads_no_more_of_it_than_libraries(
    tmp_path: Path, key: Path
) -> None:
    """Programs lie in home directories, right above the keys."""
    python = tmp_path / "llama-server"
    shutil.copy(PYTHON, python)
    library = tmp_path / "libggml.so.1"
    library.write_text("")
    needed = Access(files=(Path(intruder.__file__), Path(sys.base_prefix, "lib")))
    for path, allowed in ((key, False), (library, True)):
        argv = [str(python), "-I", "-S", intruder.__file__, "read_file", str(path)]
        environ = {"PYTHONHOME": sys.base_prefix}
        done = subprocess.run(confined(argv, needed, {}), env=environ, check=False, timeout=30)
        assert (done.returncode == 0) == allowed


@needs_full
def test_an_engine_that_cannot_be_confined_does_not_start(tmp_path: Path) -> None:
    text = (
        "import resource, sys\n"
        "from p2pmesh.engine import confine\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
        "sys.exit(confine.main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", text, "bind", "1", "--", "/bin/echo", "started"]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=30, check=False)
    assert done.returncode == confine.CANNOT_CONFINE
    assert done.stdout.startswith("error: the engine cannot be confined: Landlock: ")


def commands(tmp_path: Path) -> Sequence[tuple[tuple[str, ...], str]]:
    script = tmp_path / "llama-server"
    script.write_text("#!/bin/sh\nexec llama-server\n")
    return (
        (EMBEDDED, "not confined: the embedded engine is a Python program"),
        ((str(script),), "not confined: the engine is a script, not an ELF program"),
        ((str(tmp_path / "none"),), "not confined: the engine is a script, not an ELF program"),
    )


@needs_full
def test_scripts_and_the_embedded_engine_say_that_they_are_not(tmp_path: Path) -> None:
    for command, said in commands(tmp_path):
        assert str(confinement_of(command)) == said
    assert confinement_of((str(native() / "llama-server"),)) == Confinement("full")


def test_this_machine_says_why_not() -> None:
    here = machine_confinement()
    assert here.is_full == (here.reason == "")
    assert psutil.LINUX or here.level == "none"


@needs_full
def test_a_native_engine_confines_its_stages(tmp_path: Path) -> None:
    engine = find_engine(native(), tmp_path, {"PATH": os.defpath})
    assert engine.confinement == engine.rpc_confinement == Confinement("full")
    assert engine.confines_stages
