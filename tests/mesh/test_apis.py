"""The engines' other APIs, through a node that does not serve the model."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import openai
import pytest

from tests.mesh.hostile import ANSWER, QUESTION, answers
from tests.mesh.nodes import Node, running

MESSAGES = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node that forwards all that it is asked to the other one."""
    with running(tmp_path_factory.mktemp("pair"), 2) as nodes:
        assert answers(*nodes)
        yield nodes[1]


def post(node: Node, path: str, **body: Any) -> tuple[int, bytes, str]:
    """The status of an answer, its bytes, and who served it."""
    host, _, port = str(node.me["api"]).rpartition(":")
    with closing(http.client.HTTPConnection(host, int(port), timeout=30)) as connection:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        return reply.status, reply.read(), reply.getheader("x-p2pmesh-served-by") or ""


def test_anthropics_messages(entry: Node) -> None:
    asked = {"messages": MESSAGES, "max_tokens": 20, "temperature": 0}
    status, body, served_by = post(entry, "/v1/messages", model="p2pmesh-demo-tiny", **asked)
    assert (status, served_by) == (200, "node-1/whole")
    assert json.loads(body)["content"][0]["text"] == ANSWER
    status, body, _ = post(entry, "/v1/messages", stream=True, **asked)
    events = [line for line in body.decode().splitlines() if line.startswith("event: ")]
    assert events[0] == "event: message_start"
    assert events[-1] == "event: message_stop"
    status, body, _ = post(entry, "/v1/messages/count_tokens", messages=MESSAGES)
    assert status == 200
    assert json.loads(body)["input_tokens"] > len(QUESTION.split())


def test_anthropics_errors(entry: Node) -> None:
    status, body, _ = post(entry, "/v1/messages", model="claude", messages=MESSAGES)
    assert status == 404
    said = json.loads(body)
    assert (said["type"], said["error"]["type"]) == ("error", "not_found_error")
    assert "p2pmesh-demo-tiny" in said["error"]["message"]


def test_responses(entry: Node) -> None:
    with openai.OpenAI(base_url=entry.api, api_key="none", max_retries=0) as client:
        reply = client.responses.create(model="auto", input=QUESTION, temperature=0)
        assert reply.output_text == ANSWER
        with client.responses.create(
            model="auto", input=QUESTION, temperature=0, stream=True
        ) as stream:
            pieces = [one.delta for one in stream if one.type == "response.output_text.delta"]
        assert "".join(pieces) == ANSWER
        with pytest.raises(openai.NotFoundError, match="'gpt' is not in this mesh"):
            client.responses.create(model="gpt", input=QUESTION)


def test_tokens_and_templates(entry: Node) -> None:
    status, body, _ = post(entry, "/tokenize", content=QUESTION)
    assert status == 200
    tokens = json.loads(body)["tokens"]
    assert len(tokens) > 3
    status, body, _ = post(entry, "/v1/detokenize", tokens=tokens)
    assert (status, json.loads(body)["content"].strip()) == (200, QUESTION)
    status, body, _ = post(entry, "/apply-template", messages=MESSAGES)
    assert status == 200
    assert QUESTION in json.loads(body)["prompt"]


def test_a_model_that_cannot_rerank_is_not_asked_to(entry: Node) -> None:
    status, body, _ = post(entry, "/v1/rerank", query="a", documents=["b"])
    assert status == 503
    assert "No model for rerank" in json.loads(body)["error"]["message"]
    asked = {"model": "p2pmesh-demo-tiny", "query": "a", "documents": ["b"]}
    status, body, _ = post(entry, "/v1/rerank", **asked)
    assert status == 400
    assert "p2pmesh-demo-tiny is a model for chat" in json.loads(body)["error"]["message"]


def test_the_list_says_the_context_that_a_request_gets(entry: Node) -> None:
    with openai.OpenAI(base_url=entry.api, api_key="none") as client:
        (listed,) = client.models.list().data
    assert listed.model_extra is not None
    context = listed.model_extra["context_length"]
    assert context == listed.model_extra["max_model_len"] > 0
    long = [{"role": "user", "content": "word " * context}]
    status, body, _ = post(entry, "/v1/chat/completions", messages=long)
    assert status == 400
    assert str(context) in json.loads(body)["error"]["message"]
