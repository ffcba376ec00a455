from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.gateway import scan
from p2pmesh.gateway.scan import top_level

WANTED = frozenset({"model", "stream"})

_scalars = st.none() | st.booleans() | st.integers() | st.text()
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
_keys = st.sampled_from(["model", "stream", 'mo"del', "messages", "\\"]) | st.text()


@given(value=st.dictionaries(_keys, _values), indent=st.sampled_from([None, 1]))
def test_it_reads_what_a_parser_reads(value: dict[str, Any], indent: int | None) -> None:
    body = json.dumps(value, indent=indent).encode()
    expected = {
        key: ([] if isinstance(value[key], list | dict) else value[key])
        for key in WANTED & value.keys()
    }
    assert top_level(body, WANTED) == expected


@given(value=st.dictionaries(_keys, _values), ascii_only=st.booleans(), cut=st.integers(1, 30))
def test_a_cut_object_is_refused(value: dict[str, Any], *, ascii_only: bool, cut: int) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    with pytest.raises(ValueError, match="the body"):
        top_level(body[: max(0, len(body) - cut)], frozenset())


@given(st.binary(max_size=200))
def test_junk_is_refused_or_read_and_nothing_else(body: bytes) -> None:
    for text in (body, b"{" + body, b'{"model":' + body):
        try:
            found = top_level(text, WANTED)
        except ValueError:
            continue
        assert found.keys() <= WANTED


def test_the_last_of_equal_keys_counts() -> None:
    assert top_level(b'{"model": "a", "x": {"model": "b"}, "model": "c"}', WANTED) == {"model": "c"}


def test_a_string_value_is_no_key() -> None:
    assert top_level(b'{"x": "model", "y": ["model"], "z": "stream" }', WANTED) == {}


def test_text_after_the_object_is_refused() -> None:
    with pytest.raises(ValueError, match="more text follows"):
        top_level(b'{"model": "a"} {', WANTED)


def test_a_long_value_of_a_wanted_key_is_not_read() -> None:
    assert top_level(b'{"model": "%s"}' % (b"x" * 10_000), WANTED) == {"model": None}


def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "MARKS_MAX", 100)
    with pytest.raises(ValueError, match="more than 100 values"):
        top_level(b'{"x":' + b"[" * 1000, WANTED)
