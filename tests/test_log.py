"""Log events: where they go, in which form, and that they never get in the way."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from p2pmesh import log
from p2pmesh.errors import LocalError
from p2pmesh.log import LOG_FILES, configure


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """The log as it was before."""
    root = logging.getLogger()
    handlers, level, raising = root.handlers, root.level, logging.raiseExceptions
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers, logging.raiseExceptions = handlers, raising
    root.setLevel(level)
    structlog.reset_defaults()


def lines(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines()


def test_an_event_is_a_line_of_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure(tmp_path / "node.log", debug=False)
    structlog.get_logger("p2pmesh.some.part").info("link_opened", node="küche", rtt_ms=1.5)
    (line,) = lines(tmp_path / "node.log")
    timestamp, _, rest = line.partition(" ")
    assert timestamp.startswith("timestamp=2")
    assert timestamp.endswith("Z")
    assert rest.startswith("level=info event=link_opened ")
    assert {"logger=p2pmesh.some.part", "node=küche", "rtt_ms=1.5"} <= set(rest.split())
    assert capsys.readouterr() == ("", "")


def test_what_a_peer_says_cannot_begin_a_line_of_its_own(tmp_path: Path) -> None:
    configure(tmp_path / "node.log", debug=False)
    said = 'over\ntimestamp=1 level=error event="forged"'
    structlog.get_logger("x").info("hello_refused", reason=said)
    (line,) = lines(tmp_path / "node.log")
    assert " event=hello_refused " in line


def test_a_traceback_is_one_field_of_one_line(tmp_path: Path) -> None:
    configure(tmp_path / "node.log", debug=False)
    try:
        raise RuntimeError("deep down")
    except RuntimeError:
        structlog.get_logger("x").exception("connection_failed")
    (line,) = lines(tmp_path / "node.log")
    assert " level=error event=connection_failed " in line
    assert "RuntimeError: deep down" in line


def test_debug_events_are_for_debug_only(tmp_path: Path) -> None:
    configure(tmp_path / "node.log", debug=False)
    structlog.get_logger("x").debug("dial_refused")
    assert lines(tmp_path / "node.log") == []


def test_debug_shows_everything_on_standard_error_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(tmp_path / "node.log", debug=True)
    structlog.get_logger("x").debug("dial_refused")
    (line,) = lines(tmp_path / "node.log")
    assert " event=dial_refused " in line
    assert capsys.readouterr() == ("", line + "\n")


def test_without_a_file_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    configure(None, debug=False)
    structlog.get_logger("x").error("disk_full")
    logging.getLogger("library").error("and its own words")
    assert capsys.readouterr() == ("", "")


def test_libraries_log_to_the_same_file(tmp_path: Path) -> None:
    configure(tmp_path / "node.log", debug=False)
    logging.getLogger("hypercorn").warning("something %s", "odd")
    assert lines(tmp_path / "node.log") == ["something odd"]


def test_the_file_is_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "LOG_BYTES_MAX", 1000)
    configure(tmp_path / "node.log", debug=False)
    for number in range(100):
        structlog.get_logger("x").info("event_happened", number=number)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["node.log", *(f"node.log.{n}" for n in range(1, LOG_FILES + 1))]
    assert all(path.stat().st_size <= 1000 for path in tmp_path.iterdir())
    assert " number=99" in lines(tmp_path / "node.log")[-1]


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(LocalError) as caught:
        configure(tmp_path, debug=False)
    assert str(caught.value) == (
        f"Cannot write {tmp_path} (Is a directory); choose another place with --home"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("debug", [False, True])
def test_a_full_disk_stops_nothing_and_is_silent_without_debug(
    capsys: pytest.CaptureFixture[str], *, debug: bool
) -> None:
    configure(Path("/dev/full"), debug=debug)
    structlog.get_logger("x").warning("address_book_not_saved")
    said = capsys.readouterr()
    assert said.out == ""
    assert ("No space left on device" in said.err) == debug
    # What is still buffered would be tried again by close().
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            with pytest.raises(OSError, match="No space left"):
                handler.close()
