"""A node behind a reverse proxy: the names and web pages that its settings let in."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.mesh.nodes import Node, end, start

NAME, PAGE = "ai.example.org", "https://chat.example"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    home = tmp_path_factory.mktemp("home")
    started = start(home, "--memory=1MiB", f"--hosts={NAME}", f"--origins={PAGE}/")
    yield started
    end(started)


def get(node: Node, port: str, path: str, **headers: str) -> tuple[int, str]:
    """The status of an answer, and its error's sentence if it is one."""
    host, _, number = str(node.me[port]).rpartition(":")
    with closing(http.client.HTTPConnection(host, int(number), timeout=10)) as connection:
        connection.request("GET", path, headers=headers)
        reply = connection.getresponse()
        body = json.loads(reply.read())
        return reply.status, body["error"]["message"] if "error" in body else ""


@pytest.mark.parametrize(("port", "path"), [("api", "/v1/models"), ("console", "/api/status")])
def test_api_and_console_let_the_same_names_and_pages_in(node: Node, port: str, path: str) -> None:
    assert get(node, port, path) == (200, "")
    assert get(node, port, path, Host=NAME, Origin=f"https://{NAME}") == (200, "")
    assert get(node, port, path, Origin=PAGE) == (200, "")
    status, message = get(node, port, path, Host="b.example")
    assert (status, message.rpartition(" start ")[2]) == (403, "the node with --hosts b.example")
    status, message = get(node, port, path, Origin="https://b.example")
    assert (status, message.rpartition(" start ")[2]) == (
        403,
        "it with --origins https://b.example",
    )
