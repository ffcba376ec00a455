"""An engine's last words: which of its lines say why it ended.

Pure: lines in, one sentence out. llama.cpp reports one failure many times on its way out, so the
*first* complaint names the cause and the last ones only that there was one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# "0.00.004.186 E srv    load_model: text": time since start, level, and mostly a component.
_LEVELLED = re.compile(r"^[\d.]+ (?P<level>[DITWE]) (?P<text>.*)$")
# Where it was said: "srv    load_model: ", "gguf_init_from_file: ".
_COMPONENT = re.compile(r"^(?:(?:srv|cmn|slot|que|res)\s+)?(?:\w+_\w+: )?")
_COMPLAINT = re.compile(
    r"\berror\b|\bfailed\b|GGML_ASSERT|terminate called|what\(\)|out of memory", re.IGNORECASE
)
_WORDS_MAX = 300

_SIGNALS = {
    4: "it used an instruction that this processor lacks",
    6: "it aborted",
    7: "it could not read its memory-mapped file",
    9: "it was killed, perhaps for want of memory",
    11: "it crashed",
}


def last_words(lines: Iterable[str], exit_code: int | None) -> str:
    """Why the engine ended, as well as it said itself.

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


def _first_complaint(lines: Iterable[str]) -> str:
    for line in lines:
        match = _LEVELLED.match(line)
        text = match["text"] if match else line
        if match["level"] == "E" if match else _COMPLAINT.search(line):
            return _COMPONENT.sub("", text).strip()[:_WORDS_MAX]
    return ""
