from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.commands import formatting


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (-1, "0 B"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536 * 2**20, "1.5 GiB"),
        (150 * 2**30, "150 GiB"),
        (2**62, "4096 PiB"),
    ],
)
def test_sizes(size_bytes: int, text: str) -> None:
    assert formatting.size(size_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (4210, "1 h 10 min"), (90_000, "1 d 1 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert formatting.duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (1.84, "1.8 ms"), (38.2, "38 ms")])
def test_milliseconds(value: float | None, text: str) -> None:
    assert formatting.milliseconds(value) == text


def test_counts() -> None:
    assert [formatting.count(n, "node") for n in (0, 1, 2)] == ["0 nodes", "1 node", "2 nodes"]


@given(st.text())
def test_nothing_from_outside_steers_a_terminal(text: str) -> None:
    assert all(char.isprintable() for char in formatting.line(text))
    assert all(char.isprintable() or char in "\n\t" for char in formatting.clean(text))


def test_what_people_write_stays() -> None:
    assert formatting.clean("Grüße,\n\t世界 ✓") == "Grüße,\n\t世界 ✓"
    assert formatting.line("a\x1b[31m\n b\r") == "a[31m b"


def test_an_engine_in_words() -> None:
    status: dict[str, Any] = {"kind": "native", "version": "b1", "source": "path", "devices": []}
    assert formatting.engine(status) == "native b1 (path)"
    status["devices"] = [{"id": "CUDA0", "description": "RTX"}]
    assert formatting.engine(status) == "native b1 (path), CUDA0 RTX"


def test_the_confinement_of_an_engine_in_words() -> None:
    status: dict[str, Any] = {"confinement": {"level": "full", "reason": ""}}
    for stages, said in (
        (None, "confined"),
        ({"level": "full", "reason": ""}, "confined"),
        ({"level": "none", "reason": "why"}, "confined; stages are not confined: why"),
    ):
        status["rpc_confinement"] = stages
        assert formatting.confinement(status) == said


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("127.0.0.1:9337", "http://127.0.0.1:9337"),
        ("0.0.0.0:9337", "http://127.0.0.1:9337"),
        ("[::]:9337", "http://[::1]:9337"),
        ("[fe80::1]:80", "http://[fe80::1]:80"),
    ],
)
def test_a_listener_is_shown_as_a_place_to_go_to(address: str, shown: str) -> None:
    assert formatting.url(address) == shown


@pytest.mark.parametrize(
    ("found", "text"), [(None, ""), ([1, 1], " layer 1"), ([2, 24], " layers 2-24")]
)
def test_layers_are_named_where_it_is_not_all(found: list[int] | None, text: str) -> None:
    assert formatting.layers(found) == text
