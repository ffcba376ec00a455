from __future__ import annotations

from p2pmesh.gateway.headers import (
    cors_headers,
    preflight_headers,
    request_headers,
    response_headers,
)
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.parts import PartId


def test_what_goes_to_an_engine() -> None:
    came = [
        (b"host", b"localhost:9337"),
        (b"authorization", b"Bearer secret"),
        (b"x-api-key", b"secret"),
        (b"cookie", b"a=b"),
        (b"origin", b"http://localhost"),
        (b"connection", b"keep-alive, X-Private"),
        (b"x-private", b"1"),
        (b"keep-alive", b"timeout=5"),
        (b"transfer-encoding", b"chunked"),
        (b"expect", b"100-continue"),
        (b"te", b"trailers"),
        (b"upgrade", b"h2c"),
        (b"x-p2pmesh-part", b"forged"),
        (b"x-p2pmesh-where", b"local"),
        (b"content-type", b"application/json"),
        (b"accept-encoding", b"gzip"),
        (b"x-request-id", b"7"),
    ]
    assert request_headers(came, body_bytes=5, key="k", part=None) == [
        (b"content-type", b"application/json"),
        (b"accept-encoding", b"gzip"),
        (b"x-request-id", b"7"),
        (b"host", b"p2pmesh"),
        (b"content-length", b"5"),
        (b"authorization", b"Bearer k"),
    ]


def test_a_peer_learns_the_digest_and_no_key() -> None:
    sent = dict(request_headers([], body_bytes=0, key=None, part=PartId(ModelDigest("abc"))))
    assert sent[b"x-p2pmesh-part"] == b"abc/whole"
    assert b"authorization" not in sent


ANSWER = [
    (b"server", b"llama.cpp"),
    (b"access-control-allow-origin", b"*"),
    (b"set-cookie", b"a=b"),
    (b"connection", b"close"),
    (b"keep-alive", b"timeout=5"),
    (b"transfer-encoding", b"chunked"),
    (b"content-type", b"text/event-stream"),
    (b"x-p2pmesh-served-by", b"kitchen/whole"),
]


def test_what_comes_back_from_an_engine_and_from_a_peer() -> None:
    assert response_headers(ANSWER, served_by="küche/whole") == [
        (b"content-type", b"text/event-stream"),
        (b"x-p2pmesh-served-by", b"k%C3%BCche/whole"),
    ]


def test_of_two_lengths_the_encoding_counts() -> None:
    both = [(b"content-length", b"5"), (b"transfer-encoding", b"chunked")]
    assert b"content-length" not in dict(response_headers(both, served_by="a/whole"))
    assert dict(response_headers(both[:1], served_by="a/whole"))[b"content-length"] == b"5"


def test_a_name_cannot_break_the_header() -> None:
    named = dict(response_headers([], served_by="a\r\nx: y/whole"))
    assert named[b"x-p2pmesh-served-by"] == b"a%0D%0Ax%3A y/whole"


def test_cors_is_for_pages_only() -> None:
    assert cors_headers(None) == []
    page = dict(cors_headers(b"http://localhost:3131"))
    assert page[b"access-control-allow-origin"] == b"http://localhost:3131"
    assert b"X-P2PMesh-Served-By" in page[b"access-control-expose-headers"]
    assert page[b"vary"] == b"Origin"
    asked = dict(preflight_headers(b"authorization, content-type", "POST, OPTIONS"))
    assert asked[b"access-control-allow-headers"] == b"authorization, content-type"
    assert asked[b"access-control-allow-methods"] == b"POST, OPTIONS"
    assert b"access-control-allow-headers" not in dict(preflight_headers(None, "GET"))
