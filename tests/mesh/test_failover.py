"""What happens to requests when the node that serves them dies or freezes."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from openai import OpenAI

from tests.mesh.nodes import Node, assert_gone, owners, running, wait_until

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
LONG = "Tell me a story"


def ask(node: Node, question: str = QUESTION) -> tuple[str, str]:
    """The answer and the node that gave it."""
    with OpenAI(base_url=node.api, api_key="none", max_retries=0, timeout=60) as client:
        raw = client.chat.completions.with_raw_response.create(
            model="p2pmesh-demo-tiny",
            messages=[{"role": "user", "content": question}],
            temperature=0,
        )
        content = raw.parse().choices[0].message.content
        return content or "", raw.headers["x-p2pmesh-served-by"].partition("/")[0]


def test_the_official_client_streams_through_a_node_that_does_not_serve(tmp_path: Path) -> None:
    with running(tmp_path, 3) as nodes:
        assert ask(nodes[1]) == (ANSWER, "node-1")
        with OpenAI(base_url=nodes[2].api, api_key="none") as client:
            stream = client.chat.completions.create(
                model="auto",
                messages=[{"role": "user", "content": QUESTION}],
                temperature=0,
                stream=True,
            )
            parts = [event.choices[0].delta.content or "" for event in stream if event.choices]
            assert "".join(parts) == ANSWER
            assert len(parts) > 5
            assert [model.id for model in client.models.list()] == ["p2pmesh-demo-tiny"]
            text = client.completions.create(
                model="p2pmesh-demo-tiny", prompt="Once", max_tokens=5, temperature=0
            )
            assert text.choices[0].text


@pytest.mark.parametrize(
    "sign",
    [
        pytest.param(signal.SIGKILL, id="kill -9"),
        pytest.param(signal.SIGSTOP, id="SIGSTOP", marks=pytest.mark.full),
    ],
)
def test_the_next_request_after_the_owners_death_is_answered_by_another(
    tmp_path: Path, sign: signal.Signals
) -> None:
    with running(tmp_path, 3) as nodes:
        assert ask(nodes[1]) == (ANSWER, "node-1")
        engines = nodes[0].engines()
        nodes[0].process.send_signal(sign)
        started = time.monotonic()
        answer, by = ask(nodes[1])
        assert answer == ANSWER
        assert by in ("node-2", "node-3")
        assert time.monotonic() - started < 15
        assert ask(nodes[2])[0] == ANSWER
        if sign is signal.SIGKILL:
            assert_gone(engines, within_s=1.0)


@pytest.mark.full
def test_a_node_that_comes_back_joins_again(tmp_path: Path) -> None:
    with running(tmp_path, 2) as nodes:
        nodes[1].process.send_signal(signal.SIGSTOP)
        wait_until(
            lambda: (
                [n["state"] for n in nodes[0].status()["nodes"] if n["name"] == "node-2"]
                == ["dead"]
            ),
            "the frozen node is given up",
        )
        nodes[1].process.send_signal(signal.SIGCONT)
        wait_until(
            lambda: (
                all(n["state"] == "live" for n in nodes[0].status()["nodes"])
                and owners(nodes[0].status()) == ["node-1"]
            ),
            "the node is back and there is one owner again",
            within_s=60,
        )
        assert ask(nodes[1]) == (ANSWER, "node-1")


def test_a_client_that_leaves_frees_the_slot(tmp_path: Path) -> None:
    with (
        running(tmp_path, 2, "--slots", "1") as nodes,
        OpenAI(base_url=nodes[1].api, api_key="none") as client,
    ):
        for _ in range(3):
            stream = client.chat.completions.create(
                model="auto",
                messages=[{"role": "user", "content": LONG}],
                max_tokens=20_000,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            next(iter(stream))
            stream.close()
        started = time.monotonic()
        assert ask(nodes[1])[0] == ANSWER
        assert time.monotonic() - started < 3


def test_a_graceful_stop_finishes_what_runs_and_says_goodbye(tmp_path: Path) -> None:
    with running(tmp_path, 2) as nodes, OpenAI(base_url=nodes[1].api, api_key="none") as client:
        stream = client.chat.completions.create(
            model="auto",
            messages=[{"role": "user", "content": LONG}],
            max_tokens=800,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        events = iter(stream)
        next(events)
        engines = nodes[0].engines()
        nodes[0].process.send_signal(signal.SIGTERM)
        finished = [event.choices[0].finish_reason for event in events if event.choices]
        assert finished[-1] == "length"
        assert nodes[0].process.wait(15) == 0
        assert_gone(engines)
        assert not nodes[0].run_file().exists()
        wait_until(lambda: len(nodes[1].status()["nodes"]) == 1, "the goodbye was heard")
        assert ask(nodes[1]) == (ANSWER, "node-2")
