"""The reason why an engine ended, from the last lines that it wrote.

Pure: lines in, one sentence out. llama.cpp reports one failure many times on its way out, so the
*first* complaint of a kind names the cause and the last ones only that there was one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# What comes before a message: "0.00.178.334 E ", "srv    load_model: ", "gguf_init_from_file: ".
_PREFIX = re.compile(r"^(?:[\d.]+ [A-Z] )?(?:(?:srv|cmn|slot|que|res)\s+)?(?:\w+_\w+: )?")
# What names a cause, the surest kind first: an abort, an error of llama.cpp, anybody's complaint
# (its log is written by a thread of its own, so others may speak before it).
_COMPLAINTS = (
    re.compile(r"GGML_ASSERT|terminate called|what\(\)"),
    re.compile(r"^[\d.]+ E "),
    re.compile(r"\berror\b|\bfailed\b|out of memory", re.IGNORECASE),
)
_WORDS_MAX = 300

_SIGNALS = {
    4: "it used an instruction that this processor lacks",
    6: "it aborted",
    7: "it could not read its memory-mapped file",
    9: "it was killed, perhaps for want of memory",
    11: "it crashed",
}


def exit_reason(lines: Sequence[str], exit_code: int | None) -> str:
    """Return why the engine ended, as well as it said itself.

    Args:
        lines: The last lines of its output, oldest first.
        exit_code: Negative for a signal; None when nobody knows.
    """
    complaint = _first_complaint(lines)
    if exit_code is not None and exit_code < 0:
        end = _SIGNALS.get(-exit_code, f"it was ended by signal {-exit_code}")
    elif exit_code is None:
        end = "it disappeared"
    else:
        end = f"it ended with exit code {exit_code}"
    return f"{complaint} ({end})" if complaint else end


def _first_complaint(lines: Sequence[str]) -> str:
    for pattern in _COMPLAINTS:
        for line in lines:
            if pattern.search(line):
                return _PREFIX.sub("", line).strip()[:_WORDS_MAX]
    return ""
