from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from quart.typing import TestClientProtocol as Client
from quart_trio import QuartTrio
from quart_trio.testing import TrioTestApp

from p2pmesh.console.api import BODY_BYTES_MAX, SECURITY_HEADERS, create_app
from p2pmesh.errors import ConfigError, LinkError, LocalError, MeshError, PeerError
from p2pmesh.web_policy import WebPolicy
from tests.console.fake import TOKEN, FakeNode, three_nodes

PROXIED = WebPolicy(hosts={"ai.example.org"}, origins={"https://chat.example"})
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def node() -> FakeNode:
    return FakeNode()


@pytest.fixture
def app(node: FakeNode) -> QuartTrio:
    return create_app(node, policy=PROXIED)


@pytest.fixture
async def client(app: QuartTrio) -> AsyncIterator[Client]:
    testing = TrioTestApp(app)
    async with testing:
        yield app.test_client()


async def get(client: Client, path: str, **headers: str) -> Any:
    return await client.get(path, headers={"Host": "127.0.0.1:3131", **headers})


async def test_the_status_is_readable_without_a_token(client: Client) -> None:
    answer = await get(client, "/api/status")
    assert answer.status_code == 200
    assert answer.content_type == "application/json"
    assert await answer.get_json() == three_nodes()


async def test_the_token_is_in_no_answer(client: Client) -> None:
    for path in ("/", "/api/status", "/api/models", "/app.js", "/api/nothing"):
        assert TOKEN.encode() not in await (await get(client, path)).get_data()


async def test_models_are_a_part_of_the_status(client: Client) -> None:
    answer = await (await get(client, "/api/models")).get_json()
    assert answer == {"models": three_nodes()["models"]}


async def test_the_page_is_served_with_type_tag_and_condition(client: Client) -> None:
    page = await get(client, "/")
    assert page.content_type == "text/html; charset=utf-8"
    assert b"<!doctype html>" in (await page.get_data()).lower()
    again = await get(client, "/", **{"If-None-Match": page.headers["ETag"]})
    assert again.status_code == 304
    assert await again.get_data() == b""


@pytest.mark.parametrize("path", ["/nothing.js", "/../pyproject.toml", "/%2e%2e/x", "/api/nothing"])
async def test_unknown_paths_are_404_as_json(client: Client, path: str) -> None:
    answer = await get(client, path)
    assert answer.status_code == 404
    error = (await answer.get_json())["error"]
    assert error["code"] == 404
    assert error["message"].startswith("There is no /")


async def test_a_wrong_method_is_405_as_json(client: Client) -> None:
    answer = await client.post("/api/status", headers={"Host": "localhost"})
    assert answer.status_code == 405
    assert "GET" in answer.headers["Allow"]
    assert (await answer.get_json())["error"]["message"] == "/api/status does not take POST"


@pytest.mark.parametrize("path", ["/", "/app.js", "/api/status", "/api/nothing", "/api/events"])
async def test_every_answer_carries_the_security_headers(client: Client, path: str) -> None:
    answer = await client.head(path, headers={"Host": "localhost"})
    assert {name: answer.headers[name] for name in SECURITY_HEADERS} == dict(SECURITY_HEADERS)
    assert "unsafe" not in answer.headers["Content-Security-Policy"]
    assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example:3131"},
        {"Host": "localhost:3131", "Origin": "http://evil.example"},
        {"Host": "localhost:3131", "Origin": "null"},
        {"Host": "localhost:3131", "Sec-Fetch-Site": "cross-site"},
    ],
)
async def test_pages_from_elsewhere_can_neither_read_nor_call(
    client: Client, node: FakeNode, headers: dict[str, str]
) -> None:
    read = await client.get("/api/status", headers=headers)
    assert read.status_code == 403
    assert "nodes" not in await read.get_json()
    call = await client.post("/api/stop", headers={**headers, **BEARER})
    assert call.status_code == 403
    assert not node.stopped.is_set()


async def test_a_refusal_names_the_setting_that_would_let_it_in(client: Client) -> None:
    for headers, hint in (
        ({"Host": "b.example:3131"}, "--hosts b.example"),
        ({"Host": "localhost", "Origin": "https://b.example"}, "--origins https://b.example"),
    ):
        answer = await client.get("/", headers=headers)
        assert answer.status_code == 403
        assert (await answer.get_json())["error"]["message"].endswith(hint)


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "ai.example.org", "Origin": "https://ai.example.org"},
        {"Host": "localhost:3131", "Origin": "https://chat.example"},
    ],
)
async def test_names_and_pages_of_the_settings_are_let_in(
    client: Client, node: FakeNode, headers: dict[str, str]
) -> None:
    assert (await client.get("/api/status", headers=headers)).status_code == 200
    call = await client.post("/api/stop", headers={**headers, **BEARER})
    assert call.status_code == 202
    assert node.stopped.is_set()


async def test_a_link_from_elsewhere_opens_the_page(client: Client) -> None:
    answer = await get(client, "/", **{"Sec-Fetch-Site": "cross-site"})
    assert answer.status_code == 200


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Cookie": TOKEN}])
async def test_stopping_needs_the_token(
    client: Client, node: FakeNode, headers: dict[str, str]
) -> None:
    answer = await client.post("/api/stop", headers={"Host": "localhost", **headers})
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert "token" in (await answer.get_json())["error"]["message"]
    assert not node.stopped.is_set()


async def test_stopping_with_the_token_stops(client: Client, node: FakeNode) -> None:
    answer = await client.post("/api/stop", headers={"Host": "localhost", **BEARER})
    assert answer.status_code == 202
    assert await answer.get_json() == {"stopping": True}
    assert node.stopped.is_set()


async def order(client: Client, name: str, body: bytes, **headers: str) -> Any:
    return await client.post(
        f"/api/orders/{name}", headers={"Host": "localhost", **headers}, data=body
    )


async def test_an_order_reaches_the_node_and_its_answer_the_caller(
    client: Client, node: FakeNode
) -> None:
    answer = await order(client, "revoke", b'{"target": "anna", "below": true}', **BEARER)
    assert answer.status_code == 200
    assert await answer.get_json() == {"sentences": ["revoke target=anna", "revoke below=True"]}
    assert node.orders == [("revoke", {"target": "anna", "below": True})]


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Cookie": TOKEN}])
async def test_an_order_needs_the_token(
    client: Client, node: FakeNode, headers: dict[str, str]
) -> None:
    answer = await order(client, "invite", b"{}", **headers)
    assert answer.status_code == 401
    assert node.orders == []


async def test_a_page_from_elsewhere_gives_no_orders(client: Client, node: FakeNode) -> None:
    headers = {**BEARER, "Origin": "http://evil.example"}
    assert (await order(client, "invite", b"{}", **headers)).status_code == 403
    assert node.orders == []


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"5", b'"text"', b"\xff\xfe", b"[" * 50_000]
)
async def test_an_order_that_is_no_object_is_400(
    client: Client, node: FakeNode, body: bytes
) -> None:
    answer = await order(client, "invite", body, **BEARER)
    assert answer.status_code == 400
    assert (await answer.get_json())["error"]["message"] == "An order is a JSON object"
    assert node.orders == []


@pytest.mark.parametrize(
    ("refusal", "status"),
    [
        (ConfigError("there is no node 'anna'"), 400),
        (LocalError("this node may not invite anybody"), 409),
        (LinkError("nobody answers there"), 409),
        (PeerError("that is no node"), 409),
    ],
)
async def test_an_order_that_cannot_be_carried_out_says_why(
    client: Client, node: FakeNode, refusal: MeshError, status: int
) -> None:
    node.refusal = refusal
    answer = await order(client, "invite", b"{}", **BEARER)
    assert answer.status_code == status
    assert (await answer.get_json())["error"]["message"] == str(refusal)


async def test_orders_are_posted(client: Client, node: FakeNode) -> None:
    answer = await client.get("/api/orders/invite", headers={"Host": "localhost", **BEARER})
    assert answer.status_code == 405
    assert "POST" in answer.headers["Allow"]
    assert node.orders == []


async def test_a_long_order_is_413(client: Client, node: FakeNode) -> None:
    answer = await order(client, "invite", b" " * (BODY_BYTES_MAX + 1), **BEARER)
    assert answer.status_code == 413
    assert node.orders == []


async def test_a_long_body_is_413_and_ends_the_connection(client: Client, node: FakeNode) -> None:
    answer = await client.post(
        "/api/stop", headers={"Host": "localhost", **BEARER}, data=b"x" * (BODY_BYTES_MAX + 1)
    )
    assert answer.status_code == 413
    assert answer.headers["Connection"] == "close"
    assert not node.stopped.is_set()


async def test_a_failing_source_is_500_as_json_without_details(
    client: Client, node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> dict[str, Any]:
        raise RuntimeError("private detail")

    monkeypatch.setattr(node, "snapshot", fail)
    answer = await get(client, "/api/status")
    assert answer.status_code == 500
    body = await answer.get_data()
    assert b"private" not in body
    assert json.loads(body)["error"]["code"] == 500
