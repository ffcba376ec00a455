"""Tools below the launcher, with small Python programs in their place."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import trio

from p2pmesh.engine.find import Engine
from p2pmesh.engine.tools import check_text, is_too_short, started, too_short, tool_program
from p2pmesh.errors import ConfigError, EngineError, LocalError
from tests.engine.samples import lives, wait_until

DEADLINE_S = 60.0


def python(source: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", source]


async def test_what_a_tool_says_is_heard_line_by_line() -> None:
    said: list[str] = []
    source = "print('KLD:   0.5'); print(); print('pid 7'); print('end'); raise SystemExit(3)"
    with trio.fail_after(DEADLINE_S):
        async with started(python(source), said.append) as tool:
            await tool.listen()
    assert said == ["KLD:   0.5", "pid 7", "end"]
    assert tool.exit_code == 3
    assert tool.pid > 7
    assert tool.complaint("look again") == "it ended with 3 and did not say why; look again"


async def test_a_complaint_is_what_it_said_of_errors() -> None:
    source = "print('fine'); print('0.01 E cannot load'); print('Error: no'); print('error 3')"
    async with started(python(source), lambda _said: None) as tool:
        await tool.listen()
    assert tool.complaint("") == "cannot load; Error: no"


async def test_a_program_that_is_none_says_so() -> None:
    async with started(["nowhere/tool"], lambda _said: None) as tool:
        await tool.listen()
    assert tool.exit_code == 127
    assert "cannot start nowhere/tool" in tool.complaint("")


async def test_the_end_of_the_block_ends_the_tool() -> None:
    said: list[str] = []
    with trio.fail_after(DEADLINE_S), trio.CancelScope() as scope:

        def hear(line: str) -> None:
            said.append(line)
            scope.cancel()

        source = "import time; print('here', flush=True); time.sleep(600)"
        async with started(python(source), hear) as tool:
            await tool.listen()
    assert said == ["here"]
    assert wait_until(lambda: not lives(tool.pid), DEADLINE_S)
    assert tool.exit_code is None


async def test_texts_that_no_tool_would_read_are_named(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    with pytest.raises(LocalError, match=r"Cannot read .*text\.txt .*; check the path"):
        await check_text(text)
    text.write_bytes(b"a" * 511)
    with pytest.raises(ConfigError, match="less than 512 tokens"):
        await check_text(text)
    text.write_bytes(b"a" * 512)
    await check_text(text)
    assert "text.txt is too short" in str(too_short(text))
    assert is_too_short("0.00.020.772 E perplexity: you need at least 512 tokens to evaluate")


def test_an_engine_without_the_tool_says_how_to_get_it(tmp_path: Path) -> None:
    engine = Engine(
        command=(str(tmp_path / "llama-server"),), source="path", kind="native", version="b1"
    )
    with pytest.raises(EngineError, match="without llama-x; p2pmesh engine install builds one"):
        tool_program(engine, "llama-x")
    name = "llama-x.exe" if sys.platform == "win32" else "llama-x"
    (tmp_path / name).touch()
    assert tool_program(engine, "llama-x") == tmp_path / name
