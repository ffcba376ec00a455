from __future__ import annotations

import pytest

from p2pmesh.errors import ConfigError
from p2pmesh.identity.keys import SigningKey
from p2pmesh.identity.recovery import RECOVERY_PREFIX, parse_recovery_code, recovery_code
from p2pmesh.identity.spelling import spell
from tests.identity.test_tokens import TOKEN

SEED = bytes(range(32))
CODE = recovery_code(SEED)


def test_a_code_reads_back_however_it_is_spelt() -> None:
    assert len(CODE) == 76
    for spelt in (CODE, CODE.upper(), f" {CODE[:30]}\n{CODE[30:]} "):
        assert parse_recovery_code(spelt).id == SigningKey(SEED).id


@pytest.mark.parametrize(
    "text",
    [
        CODE[:-1],
        CODE[:-1] + ("a" if CODE[-1] != "a" else "b"),
        RECOVERY_PREFIX,
        RECOVERY_PREFIX + spell(SEED[:-1]),
        RECOVERY_PREFIX + spell(SEED + b"x"),
        RECOVERY_PREFIX + "a" * 10_000,
        RECOVERY_PREFIX + "ä",
    ],
)
def test_what_is_misspelt_is_noticed(text: str) -> None:
    with pytest.raises(ConfigError, match="copy the whole of it again"):
        parse_recovery_code(text)


@pytest.mark.parametrize("text", ["", "abc", str(TOKEN), "p2pmesh-recovery2-abc"])
def test_what_is_something_else_is_said(text: str) -> None:
    with pytest.raises(ConfigError, match="a recovery code begins with p2pmesh-recovery1-"):
        parse_recovery_code(text)
