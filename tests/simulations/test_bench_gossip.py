from __future__ import annotations

import json

import pytest

from p2pmesh.state.document import Document
from p2pmesh.wire.records import RecordCheck
from simulations.bench_gossip import (
    MESH,
    NAMES,
    NOW_S,
    TARGETS,
    accept,
    main,
    records,
    show,
)


def test_every_figure_is_measured_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert list(figures) == list(NAMES)
    assert all(value > 0 for value in figures.values())
    # A signature costs many times what it takes to see that a record is known, or old.
    assert max(figures["stale_us"], figures["older_us"]) < figures["signature_us"] / 4
    assert figures["signature_us"] < 2 * figures["accept_us"]


def test_what_is_measured_is_what_it_says() -> None:
    document, check = Document(MESH), RecordCheck()
    older, newer = records(40, seq=1), records(40, seq=2)
    assert [one.key for one in older] == [one.key for one in newer]
    assert all(accept(document, check, one.raw) for one in newer)
    assert not any(accept(document, check, one.raw) for one in newer + older)
    assert sorted(one.raw for one in document.records()) == sorted(one.raw for one in newer)
    forged = bytearray(records(40, seq=3)[0].raw)
    forged[0] ^= 1
    assert not accept(document, check, bytes(forged))
    assert document.fingerprint_at(NOW_S + 1) == Document(MESH).fingerprint


def test_the_report_says_what_was_missed() -> None:
    figures = dict.fromkeys(NAMES, 1.0)
    assert "MISSED" not in show(figures)
    assert show({**figures, "stale_us": TARGETS["stale_us"] + 1}).count("MISSED") == 1
