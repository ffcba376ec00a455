"""Models that people bring, and the engines that run them."""

from __future__ import annotations

from pathlib import Path

import pytest
from openai import NotFoundError, OpenAI

from p2pmesh.engine.build import install
from tests.engine.samples import BUILT
from tests.mesh.nodes import Node, end, start, wait_until
from tests.mesh.test_failover import ANSWER, ask
from tests.models.builders import tiny_gguf


def served(node: Node) -> dict[str, str]:
    return {model["id"]: model["state"] for model in node.status()["models"]}


def owners(node: Node, model: str) -> dict[str, str]:
    """Who runs a model, in which state."""
    found = [one for one in node.status()["models"] if one["id"] == model]
    return {one["name"]: one["state"] for each in found for one in each["replicas"]}


def test_what_a_user_names_is_served_by_whoever_has_it(tmp_path: Path) -> None:
    chat = tiny_gguf(tmp_path / "my-chat.gguf")
    meaning = tiny_gguf(tmp_path / "my-meaning.gguf", pooling="mean")
    first = start(tmp_path / "1", f"--model={chat}", f"--model={meaning}", name="one")
    second = start(tmp_path / "2", "--join", first.invite(), name="two")
    try:
        with OpenAI(base_url=second.api, api_key="none", max_retries=0) as client:
            assert {model.id for model in client.models.list()} == {"my-chat", "my-meaning"}
            chosen = client.chat.completions.with_raw_response.create(
                model="auto", messages=[{"role": "user", "content": "Hi"}], max_tokens=3
            )
            assert chosen.headers["x-p2pmesh-served-by"] == "one/whole"
            assert chosen.parse().model == "my-chat"
            vectors = client.embeddings.create(model="my-meaning", input=["one", "two"])
            one, two = (each.embedding for each in vectors.data)
            assert len(one) == len(two)
            assert one != two
            with pytest.raises(NotFoundError, match=r"p2pmesh-demo-tiny.*my-chat, my-meaning"):
                ask(second)  # the embedded model makes room for what people want
        assert served(second)["my-chat"] == "ready"
    finally:
        end(second)
        end(first)


def test_another_node_with_the_same_file_takes_over(tmp_path: Path) -> None:
    chat = tiny_gguf(tmp_path / "my-chat.gguf")
    first = start(tmp_path / "1", f"--model={chat}", name="one")
    models = tmp_path / "2" / "models"
    models.mkdir(parents=True)
    (models / "renamed.gguf").write_bytes(chat.read_bytes())
    second = start(tmp_path / "2", "--join", first.invite(), name="two")
    try:
        # What one node wants outlives it, and who has the file is known by its content.
        wait_until(lambda: "my-chat" in served(second), "the second node knows the model")
        first.process.kill()
        with OpenAI(base_url=second.api, api_key="none", max_retries=0) as client:
            answer = client.chat.completions.with_raw_response.create(
                model="my-chat", messages=[{"role": "user", "content": "Hi"}], max_tokens=3
            )
        assert answer.headers["x-p2pmesh-served-by"] == "two/whole"
    finally:
        end(second)
        end(first)


@pytest.mark.full
def test_a_node_whose_engine_is_broken_leaves_the_model_to_another(tmp_path: Path) -> None:
    chat = tiny_gguf(tmp_path / "my-chat.gguf")
    broken = tmp_path / "llama-server"
    server = install(BUILT, report=lambda _: None).command[0]
    broken.write_text(f"""#!/bin/sh
case "$*" in *--model*) exit 1;; esac
exec {server} "$@"
""")
    broken.chmod(0o755)
    # With the larger budget it is nearly always the one that the model belongs on.
    first = start(tmp_path / "1", f"--model={chat}", f"--engine={broken}", name="broken")
    options = f"--model={chat}", "--memory=512MiB"
    told = {"broken": "failed", "sound": "ready"}
    second = start(tmp_path / "2", *options, "--join", first.invite(), name="sound")
    try:
        wait_until(lambda: served(first)["my-chat"] == "ready", "it is served")
        with OpenAI(base_url=first.api, api_key="none", max_retries=0) as client:
            answer = client.chat.completions.with_raw_response.create(
                model="my-chat", messages=[{"role": "user", "content": "Hi"}], max_tokens=3
            )
        assert answer.headers["x-p2pmesh-served-by"] == "sound/whole"
        wait_until(lambda: owners(first, "my-chat") == told, "the other one gives up")
        warning = "my-chat is served elsewhere because it failed here: it ended with exit code 1"
        assert warning in first.status()["node"]["warnings"]
    finally:
        end(second)
        end(first)


@pytest.mark.full
def test_a_native_and_an_embedded_engine_work_in_one_mesh(tmp_path: Path) -> None:
    engine = install(BUILT, report=lambda _: None)
    first = start(tmp_path / "1", f"--engine={engine.command[0]}", name="native")
    second = start(tmp_path / "2", "--join", first.invite(), name="embedded")
    try:
        assert ask(second) == (ANSWER, "native")
        status = first.status()
        assert (status["node"]["engine"]["kind"], status["node"]["engine"]["source"]) == (
            "native",
            "option",
        )
        assert status["node"]["engine"]["rpc"] == "7.0.0"
        first.process.kill()
        assert ask(second) == (ANSWER, "embedded")
    finally:
        end(second)
        end(first)
