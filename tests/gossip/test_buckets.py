from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.gossip.buckets import Bucket, Buckets


def test_a_bucket_begins_full_and_refills() -> None:
    bucket = Bucket(2, 3)
    assert [bucket.take(10.0) for _ in range(4)] == [True, True, True, False]
    assert not bucket.take(10.4)
    assert bucket.take(10.5)
    assert not bucket.take(10.5)
    assert [bucket.take(1000.0) for _ in range(4)] == [True, True, True, False]


def test_what_is_refused_takes_nothing() -> None:
    bucket = Bucket(1, 5)
    assert not bucket.take(0.0, 6)
    assert bucket.take(0.0, 4)
    assert not bucket.take(0.0, 2)
    assert bucket.take(0.0)


def test_time_that_goes_back_stands_still() -> None:
    bucket = Bucket(1, 1)
    assert bucket.take(100.0)
    assert not bucket.take(50.0)
    assert not bucket.take(100.5)
    assert bucket.take(101.0)


@given(
    st.integers(1, 50),
    st.integers(1, 50),
    st.lists(st.tuples(st.integers(-3, 10), st.integers(1, 20)), max_size=60),
)
def test_never_more_than_the_burst_and_the_rate(
    rate_per_s: int, burst: int, takes: list[tuple[int, int]]
) -> None:
    bucket, now, latest, taken = Bucket(rate_per_s, burst), 0, 0, 0
    bucket.tokens(now)
    for elapsed_s, n in takes:
        now += elapsed_s
        latest = max(latest, now)
        taken += n * bucket.take(now, n)
        assert taken <= burst + rate_per_s * latest
        assert bucket.tokens(now) <= burst


def test_each_key_has_its_own() -> None:
    buckets = Buckets[str](1, 1)
    assert buckets.take("a", 0.0)
    assert not buckets.take("a", 0.0)
    assert buckets.take("b", 0.0)
    buckets.forget("a")
    buckets.forget("c")
    assert buckets.take("a", 0.0)


def test_full_buckets_are_forgotten_first() -> None:
    buckets = Buckets[int](1, 10, keys_max=8)
    for key in range(8):
        assert buckets.take(key, 0.0, 10 if key < 2 else 1)
    assert buckets.take(8, 5.0, 10)
    assert len(buckets) == 3
    assert not buckets.take(0, 5.0, 6)
    assert not buckets.take(1, 5.0, 6)
    assert not buckets.take(8, 5.0, 1)


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 2)), max_size=200))
def test_there_are_never_too_many(takes: list[tuple[int, int]]) -> None:
    buckets, now = Buckets[int](1, 5, keys_max=10), 0
    for key, elapsed_s in takes:
        now += elapsed_s
        buckets.take(key, now)
        assert len(buckets) <= 10


def test_a_flood_of_keys_forgets_those_that_were_used_least() -> None:
    buckets = Buckets[int](0, 10, keys_max=8)
    assert buckets.take(-1, 0.0, 10)
    for key in range(100):
        assert buckets.take(key, 0.0, 1)
    assert not buckets.take(-1, 0.0)
    assert len(buckets) <= 8
