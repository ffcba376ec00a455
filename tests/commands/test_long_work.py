from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import trio

from p2pmesh.commands.long_work import domains, scratch, show, stoppable
from p2pmesh.errors import ConfigError, LocalError


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_ends_the_work_in_order(number: signal.Signals, tmp_path: Path) -> None:
    async def work() -> None:
        signal.raise_signal(number)
        await trio.sleep_forever()

    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(LocalError, match="Stopped; nothing was made"),
        stoppable("Stopped; nothing was made"),
        scratch(tmp_path, "work") as folder,
    ):
        assert folder.is_dir()
        trio.run(work)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not list(tmp_path.iterdir())


def test_other_errors_stay_as_they_are() -> None:
    with pytest.raises(ConfigError, match="no"), stoppable("Stopped"):
        raise ConfigError("no")


def test_what_killed_runs_left_is_deleted(tmp_path: Path) -> None:
    for name in ("work-999999999-a", f"work-{os.getpid()}-a", "other-999999999-a", "work-x-a"):
        (tmp_path / name).mkdir()
    with scratch(tmp_path, "work"):
        pass
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f"work-{os.getpid()}-a", "other-999999999-a", "work-x-a"}


def test_files_name_domains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a.md", "a.txt", "x\x7f"):
        Path(name).touch()
    assert domains([]) == {}
    assert domains([Path("b.txt"), Path("a.md")]) == {"b": Path("b.txt"), "a": Path("a.md")}
    for names, words in (
        (["a.md", "a.txt"], "same name"),
        (["none.txt"], "There is no file none.txt"),
        (["x\x7f"], "names no domain"),
        ([f"{number}.txt" for number in range(17)], "17 files; there can be 16 domains at most"),
    ):
        with pytest.raises(ConfigError, match=words):
            domains([Path(name) for name in names])


def test_progress_is_shown_on_terminals_only(capsys: pytest.CaptureFixture[str]) -> None:
    show("Text", "chunks", 1, 2)
    assert capsys.readouterr().err == ""
