"""The main job, as a user starts it."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE

import psutil
import pytest
from openai import OpenAI

from tests.mesh.nodes import assert_gone, cli, environment, program, wait_until

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."


@contextmanager
def demo(*options: str) -> Iterator[subprocess.Popen[str]]:
    """A running demo; afterwards it and all that it started are gone."""
    command = [*program(), "demo", *options]
    with subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True, env=environment()) as run:
        try:
            yield run
        finally:
            if run.poll() is None:
                family = psutil.Process(run.pid).children(recursive=True)
                run.kill()
                wait_until(lambda: not any(one.is_running() for one in family), "all gone")


def lines_until(run: subprocess.Popen[str], start: str) -> list[str]:
    """What was printed, up to a line that starts so."""
    assert run.stdout is not None
    assert run.stderr is not None
    lines: list[str] = []
    for line in run.stdout:
        lines.append(line.rstrip())
        if line.startswith(start):
            return lines
    raise AssertionError(run.stderr.read())


def test_three_nodes_answer_and_leave_nothing_behind() -> None:
    with demo("--json") as run:
        ready = json.loads(lines_until(run, "{")[0])
        assert [node["name"] for node in ready["nodes"]] == ["kitchen", "attic", "garage"]
        served = set()
        for node in ready["nodes"]:
            with OpenAI(base_url=f"http://{node['api']}/v1", api_key="none") as client:
                answer = client.chat.completions.with_raw_response.create(
                    model="auto",
                    messages=[{"role": "user", "content": QUESTION}],
                    temperature=0,
                )
                assert answer.parse().choices[0].message.content == ANSWER
                served.add(answer.headers["x-p2pmesh-served-by"])
        assert served == {"kitchen/whole"}
        status = json.loads(cli("status", "--json", "--home", ready["nodes"][2]["home"]).stdout)
        assert [node["state"] for node in status["nodes"]] == ["live"] * 3
        family = psutil.Process(run.pid).children(recursive=True)
        assert len(family) >= 5  # three nodes, a launcher, an engine
        run.send_signal(signal.SIGINT)
        assert run.wait(30) == 0
        assert_gone(family)
        assert not Path(ready["nodes"][0]["home"]).exists()


@pytest.mark.full
def test_the_nodes_end_with_a_demo_that_is_killed() -> None:
    with demo("--json") as run:
        lines_until(run, "{")
        family = psutil.Process(run.pid).children(recursive=True)
        run.kill()
        run.wait()
        wait_until(lambda: not any(one.is_running() for one in family), "all gone")


@pytest.mark.full
def test_people_are_shown_an_answer_and_what_to_type() -> None:
    with demo() as run:
        lines = lines_until(run, "Ctrl-C")
        run.send_signal(signal.SIGINT)
        assert run.wait(30) == 0
    assert "Asked attic, answered by kitchen:" in lines
    assert f"  {ANSWER}" in lines
    assert any("curl http://127.0.0.1:" in line for line in lines)
