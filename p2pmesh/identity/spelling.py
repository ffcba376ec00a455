"""Secrets as people copy them: base32 with a checksum, so that a slip is noticed.

Pure. Neither case nor line breaks matter.
"""

from __future__ import annotations

import base64
from hashlib import blake2b

CHECKSUM_BYTES = 4


def spell(body: bytes) -> str:
    """Return letters and digits for some bytes and their checksum."""
    text = base64.b32encode(body + _checksum(body)).decode("ascii")
    return text.rstrip("=").lower()


def read_spelling(text: str) -> bytes:
    """Return the bytes that `spell` spelt.

    Raises:
        ValueError: It is cut short or misspelt.
    """
    letters = "".join(text.split()).upper()
    try:
        data = base64.b32decode(letters + "=" * (-len(letters) % 8))
    except ValueError as exc:
        raise ValueError("not base32") from exc
    body, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
    if checksum != _checksum(body) or spell(body).upper() != letters:
        raise ValueError("a wrong checksum")
    return body


def _checksum(body: bytes) -> bytes:
    return blake2b(body, digest_size=CHECKSUM_BYTES, person=b"p2pmesh token").digest()
