"""The wheel's server behind llama-server's flags, as a process of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import PurePath

import pytest

from p2pmesh.engine.argv import Launch, Modality, environment_of, needed_flags, server_argv
from p2pmesh.engine.devices import has_device_list
from tests.engine.samples import EMBEDDED, MODEL, Plain


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*EMBEDDED, *flags], capture_output=True, text=True, check=False)


def test_it_says_its_version_and_devices() -> None:
    assert re.match(r"version: \d+\.\d+\.\d+ \(xllamacpp\)\n", run("--version").stderr)
    assert has_device_list(run("--list-devices").stdout)


def test_it_knows_every_flag_of_a_launch() -> None:
    assert needed_flags() <= set(re.findall(r"--[a-z-]+", run("--help").stdout))


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--model", "x", "--unknown"],
        ["--model", "x", "--port", "many"],
        ["--model", "x", "--device", "CUDA0"],
        ["--model", "x", "--embeddings", "--reranking"],
        ["--mod", "x"],
    ],
)
def test_flags_that_it_does_not_know_are_refused(flags: list[str]) -> None:
    done = run(*flags)
    assert done.returncode == 2
    assert "llama-server: error:" in done.stderr


def test_a_model_that_is_not_there_ends_it() -> None:
    done = run("--model", "/nowhere/x.gguf")
    assert done.returncode == 1
    assert "failed to open GGUF file '/nowhere/x.gguf'" in done.stderr


@pytest.mark.parametrize("modality", ["chat", "completion", "embedding"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_every_argument_list_is_understood_and_a_signal_ends_it(
    modality: Modality, number: signal.Signals
) -> None:
    launch = Launch(
        model_paths=(PurePath(MODEL),),
        alias="tiny",
        modality=modality,
        context=128,
        slots=2,
        threads=1,
        devices=("none",),
    )
    with subprocess.Popen(
        server_argv(Plain(EMBEDDED), launch),
        env=environment_of(launch, {}),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if "listening on http://127.0.0.1:" in line:
                break
        assert any("n_slots = 2, n_ctx_slot = " in line for line in said)
        process.send_signal(number)
        assert process.wait(10) == -number
