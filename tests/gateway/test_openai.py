from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.gateway.openai import (
    BEGINNING_BYTES,
    ENDPOINTS,
    MODEL,
    PARSE_BYTES_MAX,
    ApiError,
    ambiguous_model,
    find_endpoint,
    health,
    model_entry,
    model_list,
    not_ready,
    read_request,
    unknown_model,
)
from p2pmesh.gateway.route import ShardsServed
from tests.gateway.fake import BETA, model

JSON = "application/json"


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.path)
def test_every_path_is_found_with_and_without_prefix_slash_and_query(endpoint: object) -> None:
    assert endpoint in ENDPOINTS
    if endpoint is MODEL:
        return
    path = getattr(endpoint, "path", "")
    bare = path.removeprefix("/v1")
    for spelling in (
        path,
        bare,
        f"/v1{bare}",
        path + "/",
        path + "?a=b",
        f"http://a:1{path}",
    ):
        assert find_endpoint(spelling) == (endpoint, "")


def test_a_model_path_carries_the_id() -> None:
    assert find_endpoint("/v1/models/alpha") == (MODEL, "alpha")
    assert find_endpoint("/models/org%2Falpha") == (MODEL, "org/alpha")
    assert find_endpoint("/v1/models/org/alpha?x") == (MODEL, "org/alpha")


@pytest.mark.parametrize(
    "path", ["/", "", "*", "/v1", "/v2/models", "/v1/models/{id}x/..", "/slots"]
)
def test_other_paths_are_404_with_the_list(path: str) -> None:
    if path.startswith("/v1/models/"):
        assert find_endpoint(path)[0] is MODEL
        return
    with pytest.raises(ApiError, match=r"/v1/chat/completions") as caught:
        find_endpoint(path)
    assert caught.value.status == 404


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b'{"model": "alpha"}', "alpha"),
        (b'{"model": "auto"}', None),
        (b'{"model": ""}', None),
        (b'{"model": null}', None),
        (b"{}", None),
        (b' {"stream": true, "model": "\\u00e4"} ', "ä"),
    ],
)
def test_the_model_of_a_request(body: bytes, name: str | None) -> None:
    assert read_request(body, JSON).model == name
    padding = b'"x": "%s", ' % (b"y" * PARSE_BYTES_MAX)
    if body.strip() != b"{}":
        assert read_request(body.replace(b"{", b"{" + padding, 1), "").model == name


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "no body"),
        (b"  ", "no body"),
        (b"{bad", "line 1 column 2"),
        (b'{"a": 1,\n  b}', "line 2 column 3"),
        (b"[1]", "must be an object"),
        (b"3", "must be an object"),
        (b"\xff\xfe\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"model": 3}', "must be a string"),
        (b'{"model": ["a"]}', "must be a string"),
    ],
)
def test_a_bad_body_is_400_and_says_where(body: bytes, says: str) -> None:
    with pytest.raises(ApiError, match=says) as caught:
        read_request(body, JSON)
    assert caught.value.status == 400


def test_a_form_is_415_and_curls_default_type_is_not() -> None:
    assert read_request(b'{"model": "a"}', "application/x-www-form-urlencoded").model == "a"
    with pytest.raises(ApiError) as caught:
        read_request(b"--x", "Multipart/form-data; boundary=x")
    assert caught.value.status == 415


@given(st.binary())
def test_junk_is_400_or_read(body: bytes) -> None:
    try:
        read_request(body, "")
    except ApiError as exc:
        status, message = exc.status, exc.message
    else:
        return
    assert status == 400
    assert message


def test_an_unknown_model_is_404_with_the_names_of_others() -> None:
    error = unknown_model("gamma", [model(), model(BETA, "beta")])
    assert (error.status, error.type, error.param) == (404, "invalid_request_error", "model")
    assert error.code == "model_not_found"
    assert error.message == "The model 'gamma' is not in this mesh; there are: alpha, beta"
    assert "none yet" in unknown_model("gamma", []).message


def test_an_ambiguous_name_is_409_with_the_choices() -> None:
    error = ambiguous_model("m", ["m@1", "m@2"])
    assert (error.status, error.code) == (409, "model_ambiguous")
    assert "m@1, m@2" in error.message


def test_not_ready_says_the_state_and_the_reasons() -> None:
    error = not_ready(model(state="loading"), "kitchen: refused", retry_after_s=5)
    assert (error.status, error.type) == (503, "service_unavailable_error")
    assert error.message == "alpha cannot answer now (loading): kitchen: refused"
    assert error.retry_after_s == 5


def test_the_model_list_has_openais_fields_and_the_ready_first() -> None:
    listed = model_list([model(state="failed"), model(BETA, "beta")])
    assert listed["object"] == "list"
    assert [entry["id"] for entry in listed["data"]] == ["beta", "alpha"]
    entry = model_entry(model(BETA, "beta"))
    assert {key: entry[key] for key in ("id", "object", "created", "owned_by")} == {
        "id": "beta",
        "object": "model",
        "created": 0,
        "owned_by": "p2pmesh",
    }
    assert entry["p2pmesh"]["digest"] == BETA
    assert entry["p2pmesh"]["state"] == "ready"
    assert "context_length" not in entry, "it is not known"


def test_a_model_says_the_context_under_the_names_that_clients_read() -> None:
    entry = model_entry(model(context_tokens=8192))
    assert entry["context_length"] == entry["max_model_len"] == entry["p2pmesh"]["context"] == 8192


def test_a_model_says_how_it_is_served() -> None:
    shards = ShardsServed(experts=16, kept=(11, 10), divergence=None, coverage=0.93)
    entry = model_entry(model(layout="experts", shards=shards))
    assert entry["p2pmesh"]["layout"] == "experts"
    assert json.loads(json.dumps(entry["p2pmesh"]["shards"])) == {
        "experts": 16,
        "kept": [11, 10],
        "divergence": None,
        "coverage": 0.93,
    }
    assert model_entry(model(layout="whole"))["p2pmesh"]["shards"] is None


SYSTEM = {"role": "system", "content": "Be brief."}
FIRST = {"role": "user", "content": [{"type": "text", "text": "Hello"}]}
ANSWER = {"role": "assistant", "content": "Hi"}
NEXT = {"role": "user", "content": "Bye"}


@pytest.mark.parametrize(
    ("turns", "beginning"),
    [
        (
            [{"messages": [SYSTEM, FIRST]}, {"messages": [SYSTEM, FIRST, ANSWER, NEXT]}],
            [SYSTEM, FIRST],
        ),
        ([{"input": [FIRST, ANSWER]}, {"input": [FIRST], "stream": True}], [FIRST]),
        ([{"input": "Hello"}], "Hello"),
        ([{"prompt": "a" * 5000}, {"prompt": "a" * 5000 + "b"}], "a" * BEGINNING_BYTES),
        ([{"prompt": ["x", "y"]}], ["x"]),
        ([{}, {"messages": None}, {"messages": 7}], None),
        ([{"messages": []}], []),
    ],
)
def test_how_a_conversation_begins_stays_the_same_from_turn_to_turn(
    turns: list[dict[str, object]], beginning: object
) -> None:
    for turn in turns:
        body = json.dumps({"model": "alpha", **turn}).encode()
        assert read_request(body, JSON).beginning == beginning


def test_a_long_body_stands_for_its_conversation_by_its_beginning() -> None:
    long = {"role": "user", "content": "a" * PARSE_BYTES_MAX}
    turns = ([long], [long, ANSWER, NEXT])
    bodies = [json.dumps({"model": "a", "messages": turn}).encode() for turn in turns]
    first, second = (read_request(body, JSON).beginning for body in bodies)
    assert first == second == bodies[0][:BEGINNING_BYTES]


def test_health_is_200_when_something_can_answer() -> None:
    assert health([model(), model(BETA, state="loading")]) == (200, {"status": "ok", "models": 1})
    assert health([model(state="loading")])[0] == 503
