from __future__ import annotations

from pathlib import Path

import pytest

from p2pmesh.commands.orders import give
from p2pmesh.config import Settings
from p2pmesh.control import NoNodeError
from p2pmesh.errors import ConfigError, LocalError


def test_what_the_node_says_is_printed_a_sentence_a_line(
    running_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    give(Settings(home=running_home), "grant", target="an\x1b[2Jna\n", what="invite")
    assert capsys.readouterr() == ("grant target=an[2Jna\ngrant what=invite\n", "")


@pytest.mark.parametrize(("word", "error"), [("nonsense", ConfigError), ("impossible", LocalError)])
def test_whose_fault_a_refusal_is_can_be_told(
    running_home: Path, word: str, error: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(error) as caught:
        give(Settings(home=running_home), "grant", target=word)
    assert type(caught.value) is error
    assert capsys.readouterr() == ("", "")


def test_without_a_node_nobody_is_told(tmp_path: Path) -> None:
    with pytest.raises(NoNodeError, match="No node is running here: p2pmesh up"):
        give(Settings(home=tmp_path), "leave")
