from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.identity.spelling import read_spelling, spell


@given(st.binary(max_size=100))
def test_what_is_spelt_reads_back(body: bytes) -> None:
    text = spell(body)
    assert text.isalnum()
    assert text == text.lower()
    assert read_spelling(text) == body
    assert read_spelling(f" {text[:5]}\n{text[5:].upper()} ") == body


@given(st.binary(max_size=40), st.data())
def test_one_wrong_letter_or_a_missing_one_is_noticed(body: bytes, data: st.DataObject) -> None:
    text = spell(body)
    place = data.draw(st.integers(0, len(text) - 1))
    letter = data.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz234567"))
    wrong = text[:place] + letter + text[place + 1 :]
    for one in {wrong, text[:place] + text[place + 1 :]} - {text}:
        if one != text:
            with pytest.raises(ValueError, match=r"base32|checksum"):
                read_spelling(one)


@pytest.mark.parametrize("text", ["", "a", "1", "ä", "========", "aa======"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"base32|checksum"):
        read_spelling(text)
