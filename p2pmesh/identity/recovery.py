"""Recovery codes: the private key of a mesh, as a person keeps it on paper.

Pure. The key of a mesh makes its first admin, and can make another one when that is lost. It is
forgotten when the mesh has been founded, unless the founder asks for it then. A code is
`p2pmesh-recovery1-` and base32 of the seed of the key and a checksum.
"""

from __future__ import annotations

from p2pmesh.errors import ConfigError
from p2pmesh.identity.keys import SEED_BYTES, SigningKey
from p2pmesh.identity.spelling import read_spelling, spell

RECOVERY_PREFIX = "p2pmesh-recovery1-"
RECOVERY_CHARS_MAX = 256  # four times what a code has


def recovery_code(seed: bytes) -> str:
    """Return the code for the key of a mesh, by the 32 secret bytes that made it."""
    return RECOVERY_PREFIX + spell(seed)


def parse_recovery_code(text: str) -> SigningKey:
    """Return the key of a mesh, however its code was broken into lines or spelt.

    Raises:
        ConfigError: It is no code, cut short or misspelt.
    """
    plain = "".join(text.split()).lower()
    if not plain.startswith(RECOVERY_PREFIX):
        raise ConfigError(f"a recovery code begins with {RECOVERY_PREFIX}")
    try:
        if len(plain) > RECOVERY_CHARS_MAX:
            raise ValueError("length")
        seed = read_spelling(plain.removeprefix(RECOVERY_PREFIX))
        if len(seed) != SEED_BYTES:
            raise ValueError("length")
    except ValueError as exc:
        raise ConfigError(
            "this recovery code is incomplete or misspelt; copy the whole of it again"
        ) from exc
    return SigningKey(seed)
