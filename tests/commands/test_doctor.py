from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from p2pmesh.commands import doctor as module
from p2pmesh.commands.doctor import doctor
from p2pmesh.commands.doctor_checks import Check
from p2pmesh.config import Settings
from p2pmesh.errors import LocalError

OK = Check(name="python", state="ok", detail="3.11.7")
WARN = Check(name="disk", state="warn", detail="1.0 GiB free", fix="make room")
FAIL = Check(name="engine", state="fail", detail="none\nworks", fix="p2pmesh engine install")


def call(monkeypatch: pytest.MonkeyPatch, checks: list[Check], *arguments: str) -> Result:
    class Found:
        def __init__(self, *_: object) -> None: ...

        def run(self) -> Iterator[Check]:
            yield from checks

    monkeypatch.setattr(module, "Doctor", Found)
    return CliRunner().invoke(doctor, list(arguments), obj=Settings(home=Path("nowhere")))


def test_warnings_are_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    result = call(monkeypatch, [OK, WARN])
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "ok    python   3.11.7",
        "warn  disk     1.0 GiB free",
        "               -> make room",
    ]


def test_a_failure_is_exit_code_1_after_everything_was_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = call(monkeypatch, [FAIL, OK])
    assert isinstance(result.exception, LocalError)
    assert result.exception.exit_code == 1
    assert str(result.exception) == "1 check failed; see above what to do"
    assert result.stdout.splitlines() == [
        "fail  engine   none works",
        "               -> p2pmesh engine install",
        "ok    python   3.11.7",
    ]


def test_json(monkeypatch: pytest.MonkeyPatch) -> None:
    result = call(monkeypatch, [FAIL], "--json")
    assert isinstance(result.exception, LocalError)
    found = json.loads(result.stdout)
    assert found["ok"] is False
    assert found["checks"][0]["fix"] == "p2pmesh engine install"
    assert json.loads(call(monkeypatch, [OK], "--json").stdout)["ok"] is True
