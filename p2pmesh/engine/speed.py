"""How fast an engine generated tokens, from the lines that it logs after each answer.

The figures are in its log at the default verbosity, so nothing has to be parsed on the way of an
answer, and no engine has to be asked. The log is read when somebody wants to know, from its end.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from p2pmesh.engine.server import LISTENING

TAIL_BYTES = 256 * 1024  # some hundred answers
ANSWERS_MAX = 16  # the latest ones: the machine may have been busier before
# The question of a start has one token, and the first ones of an answer are no measure.
TOKENS_MIN = 8

_LISTENING = re.compile(LISTENING)
# "prompt eval time" is how fast it reads, not how fast it writes.
_EVAL = re.compile(
    r"(?<!prompt )\beval time =\s*([0-9]+(?:\.[0-9]+)?) ms /\s*([0-9]+) (?:tokens|runs)"
)


def tokens_per_s(lines: Iterable[str]) -> float | None:
    """Return the speed over the latest answers of an engine's present process; None without any.

    Args:
        lines: Of its log, oldest first; those before its last start count for nothing.
    """
    answers: deque[tuple[float, int]] = deque(maxlen=ANSWERS_MAX)
    for line in lines:
        if _LISTENING.search(line):
            answers.clear()
        elif (match := _EVAL.search(line)) and int(match[2]) >= TOKENS_MIN:
            answers.append((float(match[1]), int(match[2])))
    spent_ms = sum(ms for ms, _ in answers)
    return sum(count for _, count in answers) * 1000 / spent_ms if spent_ms > 0 else None


def read_speed(log_path: Path) -> float | None:
    """Return the same from the end of a log file, None also without the file; blocks shortly.

    Raises:
        OSError: It cannot be read.
    """
    if not log_path.exists():  # the engine has said nothing yet
        return None
    with log_path.open("rb") as file:
        size_bytes = file.seek(0, os.SEEK_END)
        file.seek(max(size_bytes - TAIL_BYTES, 0))
        text = file.read(TAIL_BYTES).decode("utf-8", "replace")
    return tokens_per_s(text.splitlines())
