from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.gateway.guard import allowed_origin, check_host
from p2pmesh.gateway.openai import ApiError

GOOD_HOSTS = [
    None, "", "localhost", "localhost:9337", "LOCALHOST:1", "127.0.0.1:9337", "[::1]:9337", "[::1]",
    "192.168.1.5:9337", "10.0.0.1", "203.0.113.9:80", "kitchen-pc", "kitchen-pc:9337",
    "kitchen-pc.local:9337", "host.docker.internal:9337", "box.lan", "x.localhost", "a.home.arpa",
    "kitchen-pc.local.",
]  # fmt: skip
BAD_HOSTS = [
    "evil.com",
    "evil.com:9337",
    "localhost.evil.com",
    "127.0.0.1.nip.io",
    "local.host.tv.",
]


def passes(host: str | None) -> bool:
    try:
        check_host(host)
    except ApiError:
        return False
    return True


@pytest.mark.parametrize("host", GOOD_HOSTS)
def test_addresses_and_private_names_pass(host: str | None) -> None:
    assert passes(host)


@pytest.mark.parametrize("host", BAD_HOSTS)
def test_public_names_are_refused_unless_allowed(host: str) -> None:
    with pytest.raises(ApiError, match="use an IP address or localhost") as caught:
        check_host(host)
    assert caught.value.status == 403
    check_host(host, allowed=[host.partition(":")[0].rstrip(".")])


@given(st.text())
def test_any_text_is_a_decision(text: str) -> None:
    assert isinstance(allowed_origin(text, text), bool)
    with suppress(ApiError):
        check_host(text)


@pytest.mark.parametrize(
    ("origin", "host", "allowed"),
    [
        (None, "localhost", True),
        ("http://localhost:3131", "127.0.0.1:9337", True),
        ("http://127.0.0.1:3131", "localhost:9337", True),
        ("http://[::1]:3131", "localhost:9337", True),
        ("https://localhost", None, True),
        ("http://192.168.1.5:3131", "192.168.1.5:9337", True),
        ("http://192.168.1.6:3131", "192.168.1.5:9337", False),
        ("app://obsidian.md", "localhost:9337", True),
        ("vscode-webview://abc", "localhost:9337", True),
        ("https://evil.com", "localhost:9337", False),
        ("http://localhost.evil.com", "localhost:9337", False),
        ("http://evil.com", None, False),
        ("null", "localhost", False),
        ("", "localhost", False),
        ("file://", "localhost", False),
        ("http://[", "localhost", False),
        ("https://chat.example", "localhost", True),
    ],
)
def test_origins(origin: str | None, host: str | None, *, allowed: bool) -> None:
    assert allowed_origin(origin, host, ["https://chat.example"]) is allowed
