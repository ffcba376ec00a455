"""Which Host and Origin headers pass, for the API and the console alike."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.web_policy import THIS_MACHINE, Refusal, WebPolicy, parse_host, parse_origin

GOOD_HOSTS = [
    None, "", "localhost", "localhost:9337", "LOCALHOST:1", "127.0.0.1:9337", "[::1]:9337", "[::1]",
    "192.168.1.5:9337", "10.0.0.1", "203.0.113.9:80", "kitchen-pc", "kitchen-pc:9337",
    "kitchen-pc.local:9337", "host.docker.internal:9337", "box.lan", "x.localhost", "a.home.arpa",
    "kitchen-pc.local.", "localhost.:3131", "[fe80::1]",
]  # fmt: skip
BAD_HOSTS = [
    "evil.com",
    "evil.com:9337",
    "localhost.evil.com",
    "127.0.0.1.nip.io",
    "127.0.0.1.evil.example:3131",
    "local.host.tv.",
    "kitchen-pc.evil.example",
    "[::1.evil]:3131",
    "127.0.0.1@evil.example",
    "2130706433.evil",
]
PROXIED = WebPolicy(
    hosts=frozenset({"kitchen-pc.fritz.box", "ai.example.org"}),
    origins=frozenset({"https://chat.example", "chrome-extension://abcdef"}),
)


@pytest.mark.parametrize("host", GOOD_HOSTS)
def test_addresses_and_private_names_pass(host: str | None) -> None:
    assert THIS_MACHINE.refusal(host, None) is None


@pytest.mark.parametrize("host", BAD_HOSTS)
def test_names_that_anybody_can_register_are_refused(host: str) -> None:
    for policy in (THIS_MACHINE, PROXIED):
        refused = policy.refusal(host, None)
        assert refused is not None
        assert refused.code == "host_not_allowed"
        assert "use an IP address or localhost" in refused.message


@pytest.mark.parametrize(
    "host", ["ai.example.org", "AI.example.org:443", "ai.example.org.", "kitchen-pc.fritz.box:3131"]
)
def test_names_of_this_machine_and_of_the_settings_pass(host: str) -> None:
    assert PROXIED.refusal(host, None) is None
    assert PROXIED.refusal(host, "https://" + host.rstrip(".").lower()) is None, "its own pages"
    refused = PROXIED.refusal(host, "https://evil.com")
    assert refused is not None
    assert refused.code == "origin_not_allowed"
    assert THIS_MACHINE.refusal(host, None) is not None


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
        ("http://chat.example", "localhost", False),
        ("https://chat.example:8443", "localhost", False),
        ("chrome-extension://abcdef", "localhost", True),
    ],
)
def test_origins(origin: str | None, host: str | None, *, allowed: bool) -> None:
    assert (PROXIED.refusal(host, origin) is None) is allowed


@pytest.mark.parametrize(
    ("host", "origin", "hint"),
    [
        ("AI.example.org:9337", None, ", or start the node with --hosts ai.example.org"),
        ("localhost", "https://chat.example", "start it with --origins https://chat.example"),
        ("localhost", "http://b.example:3000", "start it with --origins http://b.example:3000"),
    ],
)
def test_a_refusal_names_the_setting_that_would_let_it_in(
    host: str, origin: str | None, hint: str
) -> None:
    refused = THIS_MACHINE.refusal(host, origin)
    assert refused is not None
    assert refused.message.endswith(hint)
    value = hint.rpartition(" ")[2]
    added = WebPolicy(hosts={value}) if origin is None else WebPolicy(origins={value})
    assert added.refusal(host, origin) is None


@pytest.mark.parametrize(
    ("host", "origin"), [("evil.com;reboot", None), ("localhost", "null"), ("localhost", "")]
)
def test_what_no_setting_can_name_gets_no_advice(host: str, origin: str | None) -> None:
    refused = THIS_MACHINE.refusal(host, origin)
    assert refused is not None
    assert "--" not in refused.message


@given(st.text(), st.text())
def test_any_text_is_a_decision(host: str, origin: str) -> None:
    refused = THIS_MACHINE.refusal(host, origin)
    assert refused is None or isinstance(refused, Refusal)


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("ai.example.org", "ai.example.org"),
        (" AI.Example.org. ", "ai.example.org"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("box", "box"),
    ],
)
def test_hosts_are_spelt_as_browsers_do(text: str, host: str) -> None:
    assert parse_host(text) == host


@pytest.mark.parametrize(
    "text",
    ["", " ", "*", "*.a.example", "https://a.example", "a.example:443", "a b", "a..b", "x" * 300],
)
def test_what_is_no_host_is_said(text: str) -> None:
    with pytest.raises(ValueError, match="is not a host name: write it without scheme and port"):
        parse_host(text)


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("https://ai.example.org", "https://ai.example.org"),
        ("HTTPS://AI.example.org/", "https://ai.example.org"),
        ("https://ai.example.org:443", "https://ai.example.org"),
        ("http://ai.example.org:80/", "http://ai.example.org"),
        ("http://ai.example.org:443", "http://ai.example.org:443"),
        ("https://bücher.example:8443", "https://xn--bcher-kva.example:8443"),
        ("http://[fd00::1]:3000", "http://[fd00::1]:3000"),
        ("chrome-extension://abcdef", "chrome-extension://abcdef"),
    ],
)
def test_origins_are_spelt_as_browsers_do(text: str, origin: str) -> None:
    assert parse_origin(text) == origin


@pytest.mark.parametrize(
    "text", ["", "*", "null", "a.example", "https://", "https://a.example/chat", "https://a b"]
)
def test_what_is_no_origin_is_said(text: str) -> None:
    with pytest.raises(ValueError, match="is not a web page's origin: write it like https://"):
        parse_origin(text)
