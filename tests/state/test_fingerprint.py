from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.state.fingerprint import (
    CHANGES_KEPT_S,
    FINGERPRINT_BYTES,
    Fingerprint,
    fingerprint_of,
    term_of,
)

NOTHING = bytes(FINGERPRINT_BYTES)
ids = st.binary(min_size=FINGERPRINT_BYTES, max_size=FINGERPRINT_BYTES)
lives = st.tuples(ids, st.integers(0, 20), st.none() | st.integers(0, 20))


@given(st.lists(ids))
def test_it_is_the_sum_of_the_terms(items: list[bytes]) -> None:
    total = sum(term_of(item) for item in items) % (1 << 128)
    assert fingerprint_of(items) == total.to_bytes(FINGERPRINT_BYTES, "big")


@given(st.lists(lives), st.randoms(use_true_random=False))
def test_it_can_be_told_as_of_any_second_that_is_kept(
    items: list[tuple[bytes, int, int | None]], rng: object
) -> None:
    fingerprint = Fingerprint()
    for item, born, died in items:
        fingerprint.add(item, born)
        if died is not None:
            fingerprint.remove(item, born, died)
    fingerprint.advance(20)
    assert fingerprint.value == fingerprint_of([item for item, _, died in items if died is None])
    for cutoff in range(22):
        counted = [i for i, born, d in items if born <= cutoff and (d is None or d > cutoff)]
        kept = cutoff >= 20 - CHANGES_KEPT_S
        assert fingerprint.at(cutoff) == (fingerprint_of(counted) if kept else None)


def test_what_died_before_it_was_born_never_counted() -> None:
    fingerprint = Fingerprint()
    fingerprint.add(b"a" * 16, 10)
    fingerprint.remove(b"a" * 16, 10, 5)
    assert [fingerprint.at(second) for second in (4, 7, 12)] == [NOTHING] * 3


def test_only_the_last_seconds_are_kept() -> None:
    fingerprint = Fingerprint()
    for second in range(100_000):
        fingerprint.advance(second)
        fingerprint.add(b"a" * 16, second)
    assert len(fingerprint._changes) <= CHANGES_KEPT_S + 1
    fingerprint.advance(50_000)  # time does not go back
    assert fingerprint.at(60_000) is None
    for old in range(1000):  # as in a snapshot
        fingerprint.add(b"b" * 16, old)
    assert len(fingerprint._changes) <= CHANGES_KEPT_S + 1
