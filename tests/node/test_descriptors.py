from __future__ import annotations

import sys

import pytest

from p2pmesh.node.descriptors import WANTED, Bounds, budget, raise_limit


@pytest.mark.parametrize(
    ("limit", "bounds"),
    [
        (256, Bounds(connections=53, in_flight=17, pool_idle=8, console=8,
                     unauthenticated=8, holding=4)),
        (1024, Bounds(connections=232, in_flight=77, pool_idle=38, console=38,
                      unauthenticated=19, holding=19)),
        (65536, Bounds(connections=768, in_flight=256, pool_idle=128, console=128,
                       unauthenticated=64, holding=64)),
    ],
)  # fmt: skip
def test_the_bounds_follow_from_the_limit(limit: int, bounds: Bounds) -> None:
    assert budget(limit) == bounds
    gateway = budget(limit).gateway
    assert gateway.connections == bounds.connections
    assert (gateway.in_flight, gateway.pool_idle) == (bounds.in_flight, bounds.pool_idle)


@pytest.mark.parametrize(
    ("limit", "reserve"), [(256, 60), (512, 128), (1024, 192), (2048, 192), (2688, 192)]
)
def test_all_bounds_together_leave_a_reserve(limit: int, reserve: int) -> None:
    assert limit - budget(limit).total >= reserve


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limit")
@pytest.mark.parametrize(
    ("soft", "hard", "raised"),
    [(256, 1024, 1024), (1024, 524288, WANTED), (100_000, 524288, 100_000), (1024, -1, WANTED)],
)
def test_the_limit_is_raised_as_far_as_is_allowed_and_of_use(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, raised: int
) -> None:
    import resource

    now = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: now[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: now.append(limits))
    assert raise_limit() == raised
    assert now[-1] == (raised, hard)


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limit")
def test_a_system_that_refuses_leaves_the_limit_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    def refuse(*_: object) -> None:
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert raise_limit() == 256
