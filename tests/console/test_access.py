from __future__ import annotations

import pytest
from werkzeug.datastructures import Headers

from p2pmesh.console import access

NAMES = access.host_names("Kitchen-PC.fritz.box")


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:3131",
        "127.0.0.1",
        "[::1]:3131",
        "[fe80::1]",
        "192.168.1.20:80",
        "localhost:3131",
        "LOCALHOST",
        "localhost.:3131",
        "kitchen-pc:3131",
        "kitchen-pc.local:3131",
        "kitchen-pc.fritz.box",
    ],
)
def test_own_names_and_addresses_are_allowed(host: str) -> None:
    assert access.host_allowed(host, NAMES)


@pytest.mark.parametrize(
    "host",
    [
        "",
        ":3131",
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example:3131",
        "kitchen-pc.evil.example",
        "[::1.evil]:3131",
        "127.0.0.1@evil.example",
        "2130706433.evil",
        "[",
    ],
)
def test_names_that_anybody_can_register_are_refused(host: str) -> None:
    assert not access.host_allowed(host, NAMES)


def test_a_machine_without_a_name_has_only_localhost() -> None:
    assert access.host_names("") == {"localhost"}


@pytest.mark.parametrize(
    ("origin", "fine"),
    [
        (None, True),
        ("http://127.0.0.1:3131", True),
        ("http://127.0.0.1:3132", False),
        ("https://127.0.0.1:3131", False),
        ("http://localhost:3131", False),
        ("http://evil.example", False),
        ("null", False),
        ("", False),
    ],
)
def test_only_the_own_page_may_call(origin: str | None, *, fine: bool) -> None:
    headers = Headers({"Host": "127.0.0.1:3131"})
    if origin is not None:
        headers["Origin"] = origin
    assert (access.refusal(headers, NAMES) is None) is fine


@pytest.mark.parametrize(
    ("site", "foreign"),
    [
        (None, False),
        ("none", False),
        ("same-origin", False),
        ("same-site", True),
        ("cross-site", True),
    ],
)
def test_fetches_of_other_sites_are_told_apart(site: str | None, *, foreign: bool) -> None:
    headers = Headers({} if site is None else {"Sec-Fetch-Site": site})
    assert access.foreign_fetch(headers) is foreign


@pytest.mark.parametrize(
    "given",
    [
        "",
        "secret",
        "bearer secret",
        "Bearer",
        "Bearer ",
        "Bearer secre",
        "Bearer secret ",
        "Bearer \xe4",
    ],
)
def test_everything_but_the_exact_token_is_refused(given: str) -> None:
    assert not access.holds_token(Headers({"Authorization": given}), "secret")


def test_the_token_is_accepted_and_an_empty_one_never_is() -> None:
    assert access.holds_token(Headers({"Authorization": "Bearer secret"}), "secret")
    assert not access.holds_token(Headers({"Authorization": "Bearer "}), "")
    assert not access.holds_token(Headers(), "secret")
