from __future__ import annotations

import pytest
from werkzeug.datastructures import Headers

from p2pmesh.console import access


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
