"""Text that others wrote, as it may be shown, stored and sent on. Pure.

Invariant: what a peer, a file or an engine calls itself passes here where it enters this node.
"""

from __future__ import annotations

import re

NAME_CHARACTERS_MAX = 120  # longer names are a description; it is shown in one line

# Control and direction characters, invisible ones and lone surrogates: none may reach a terminal
# or the wire. Written out, since what counts as printable differs between Python versions.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\uffff"
    "\ud800-\udfff\U000e0000-\U000e007f]+"
)


def plain_text(text: str, limit: int = NAME_CHARACTERS_MAX) -> str:
    """Return `text` on one line, without control characters, at most `limit` characters long."""
    return _UNSAFE.sub(" ", text).strip()[:limit].strip()
