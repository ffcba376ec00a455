"""Texts from others: whatever they hold, one harmless line comes out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.wire.text import NAME_CHARACTERS_MAX, plain_text


@given(st.text())
def test_plain_text_is_one_short_line_and_settled(text: str) -> None:
    plain = plain_text(text)
    assert len(plain) <= NAME_CHARACTERS_MAX
    assert plain == plain_text(plain)
    assert not any(c in plain for c in "\x00\x1b\n\r\x7f\x9b\u061c\u202e\u2028\u2066\ud800")
    plain.encode()


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Größe 模型 (v1.5) 🦙", "Größe 模型 (v1.5) 🦙"),
        ("evil\x1b[31m\nname", "evil [31m name"),
        ("\x1b[2J\x1b]0;pwned\x07 no entry", "[2J ]0;pwned  no entry"),
        ("gpj.\u202eexe", "gpj. exe"),
        ("a\U000e0041b", "a b"),
        ("\r\n\t", ""),
        ("x" * 10_000, "x" * NAME_CHARACTERS_MAX),
    ],
)
def test_plain_text_keeps_what_people_write_and_nothing_else(text: str, plain: str) -> None:
    assert plain_text(text) == plain
