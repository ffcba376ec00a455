"""llama-server under supervision: the embedded one for real, and a server that misbehaves."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import trio

from p2pmesh.engine import supervisor as supervisor_module
from p2pmesh.engine.argv import Launch
from p2pmesh.engine.find import SERVER, managed_directory
from p2pmesh.engine.server import LOAD_BASE_S, LOAD_BYTES_PER_S, LlamaServer
from p2pmesh.errors import ModelError
from tests.engine.samples import BUILT, EMBEDDED, MODEL, Plain, lives, wait_until
from tests.engine.supervised import ask, is_ready, supervised, tiny


async def test_it_serves_and_leaves_nothing_behind(tmp_path: Path) -> None:
    await serve_and_look(tmp_path, EMBEDDED)


async def test_a_built_engine_does_the_same(tmp_path: Path) -> None:
    directory = managed_directory(BUILT.engine)
    if directory is None:
        pytest.skip("no engine was built: P2PMESH_TESTS=full builds one")
    await serve_and_look(tmp_path, (str(directory / SERVER),))


async def serve_and_look(tmp_path: Path, command: tuple[str, ...]) -> None:
    async with supervised(tmp_path, tiny(command)) as watched:
        status = await watched.wait(is_ready)
        assert status.pid is not None
        assert lives(status.pid)
        answer = await trio.to_thread.run_sync(ask, status, status.api_key)
        assert answer == "The capital of France is Paris."
        launcher = psutil.Process(status.pid).parent()
        assert launcher is not None
        assert launcher.ppid() == os.getpid()
    assert watched.states() == ["loading", "ready", "stopping", "stopped"]
    assert not lives(status.pid)
    assert not launcher.is_running()
    assert watched.engine.status.port == 0
    log = watched.engine.log_path.read_text()
    assert "listening on http://127.0.0.1:" in log
    assert status.api_key not in log


async def test_only_who_has_the_key_is_answered(tmp_path: Path) -> None:
    async with supervised(tmp_path, tiny()) as watched:
        status = await watched.wait(is_ready)
        with pytest.raises(urllib.error.HTTPError) as refused:
            await trio.to_thread.run_sync(ask, status, "wrong")
        refused.value.close()
        assert refused.value.code == 401
        process = psutil.Process(status.pid)
        assert status.api_key not in " ".join(process.cmdline())
        assert status.api_key not in repr(status)
        assert process.environ()["GGML_NO_BACKTRACE"] == "1"


@pytest.mark.full
async def test_a_stopped_engine_is_soon_not_ready_and_ready_again_when_it_goes_on(
    tmp_path: Path,
) -> None:
    async with supervised(tmp_path, tiny()) as watched:
        first = await watched.wait(is_ready)
        engine = psutil.Process(first.pid)
        began = trio.current_time()
        engine.suspend()
        await watched.wait(lambda s: s.state == "loading")
        assert trio.current_time() - began < 7
        engine.resume()
        again = await watched.wait(is_ready)
        assert (again.pid, again.port) == (first.pid, first.port)


async def test_a_model_that_cannot_be_loaded_fails_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "RETRY_S", (0.01, 0.02))
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"this is not a model")
    async with supervised(tmp_path, tiny(model=junk, alias="../a b")) as watched:
        status = await watched.wait(lambda s: s.state == "failed")
    assert status.detail == (
        "invalid magic characters: 'this', expected 'GGUF' (it ended with exit code 1)"
    )
    assert sum(s.detail == "starting" for s in watched.history) == 3
    assert watched.engine.log_path == tmp_path / "engine-.._a_b.log"


async def test_ready_means_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that listens, says 503 twice and then refuses is never called ready."""
    monkeypatch.setattr(supervisor_module, "RETRY_S", ())
    program = """
        import http.server
        answers = [503, 503, 400]
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = b'{"error": {"message": "Pooling type none"}}'
                self.send_response(answers.pop(0))
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            def log_message(self, *args): pass
        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        print(f"listening on http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()
    """
    command = (sys.executable, "-c", textwrap.dedent(program))
    async with supervised(tmp_path, tiny(command)) as watched:
        status = await watched.wait(lambda s: s.state == "failed")
    assert status.detail == "the engine answered a first request with 400: Pooling type none"
    assert "ready" not in watched.states()


def test_a_load_has_time_for_its_size_and_says_how_far_it_is(tmp_path: Path) -> None:
    model = tmp_path / "half.gguf"
    with model.open("wb") as file:
        file.truncate(5_000_000_000)
    launch = Launch(model_paths=(model, tmp_path / "missing.gguf"), alias="half")
    server = LlamaServer(Plain(("x",)), launch)
    assert server.prepare() == LOAD_BASE_S + 5_000_000_000 / LOAD_BYTES_PER_S
    assert server.progress(0) == "loading 5,000 MB, 0 % in memory"
    assert server.progress(2_600_000_000) == "loading 5,000 MB, 50 % in memory"
    assert server.progress(6_000_000_000) == "loading 5,000 MB, 100 % in memory"


def test_a_model_that_fails_its_check_is_not_started() -> None:
    def check() -> None:
        raise ModelError("it is damaged")

    server = LlamaServer(Plain(("x",)), Launch(model_paths=(MODEL,), alias="x"), check=check)
    with pytest.raises(ModelError, match="it is damaged"):
        server.prepare()


def test_each_server_has_a_key_of_its_own_unless_one_is_given() -> None:
    launch = Launch(model_paths=(MODEL,), alias="x")
    first, second = (LlamaServer(Plain(("x",)), launch, environ={}) for _ in range(2))
    assert len({first.api_key, second.api_key, ""}) == 3
    assert first.environ["LLAMA_API_KEY"] == first.api_key == first.launch.api_key
    given = Launch(model_paths=(MODEL,), alias="x", api_key="given")
    assert LlamaServer(Plain(("x",)), given).api_key == "given"


NODE = """
import sys, trio
from pathlib import Path
from p2pmesh.engine.argv import Launch
from p2pmesh.engine.confinement import UNKNOWN
from p2pmesh.engine.server import LlamaServer
from p2pmesh.engine.supervisor import Supervisor

class Engine:
    command = (sys.executable, "-P", "-m", "p2pmesh.engine.embedded")
    confinement = UNKNOWN

def told(status):
    if status.state == "ready":
        print(status.pid, flush=True)

launch = Launch(model_paths=(Path(sys.argv[1]),), alias="tiny", context=512)
server = LlamaServer(Engine(), launch)
trio.run(Supervisor(server, logs=Path(sys.argv[2]), on_change=told).run)
"""


def node_with_engine(tmp_path: Path) -> tuple[subprocess.Popen[bytes], int]:
    node = subprocess.Popen(
        [sys.executable, "-c", NODE, str(MODEL), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert node.stdout is not None
    for line in node.stdout:  # log events come before the process id
        if line.strip().isdigit():
            return node, int(line)
    raise AssertionError("the engine never became ready")


def end_and_look(node: subprocess.Popen[bytes], engine_pid: int) -> None:
    launcher = psutil.Process(engine_pid).parent()
    assert launcher is not None
    node.kill()
    assert wait_until(lambda: not lives(engine_pid) and not lives(launcher.pid), 1.0)
    node.wait()
    assert node.stdout is not None
    node.stdout.close()


def test_no_engine_survives_its_killed_node(tmp_path: Path) -> None:
    end_and_look(*node_with_engine(tmp_path))


def all_threads_stopped(pid: int) -> bool:
    """The kernel takes a process for stopped once its last thread is."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return all("\nState:\tT" in (task / "status").read_text() for task in tasks)


@pytest.mark.skipif(sys.platform != "linux", reason="orphaned process groups")
@pytest.mark.parametrize("whom", ["engine", "launcher"])
def test_nor_does_one_that_is_stopped_or_whose_launcher_is(tmp_path: Path, whom: str) -> None:
    node, engine_pid = node_with_engine(tmp_path)
    launcher = psutil.Process(engine_pid).parent()
    assert launcher is not None
    stopped = psutil.Process(engine_pid) if whom == "engine" else launcher
    stopped.suspend()
    assert wait_until(lambda: all_threads_stopped(stopped.pid), 5.0)
    end_and_look(node, engine_pid)


@pytest.mark.full
@pytest.mark.skipif(os.environ.get("P2PMESH_TESTS") != "full", reason="P2PMESH_TESTS=full")
def test_an_engine_outlives_30_s_of_an_idle_node_and_not_its_end(tmp_path: Path) -> None:
    """trio's worker threads end after 10 s: a death signal tied to one would strike here."""
    node, engine_pid = node_with_engine(tmp_path)
    assert not wait_until(lambda: not lives(engine_pid), 30.0)
    end_and_look(node, engine_pid)
