from __future__ import annotations

from simulations.trace import TAIL, Trace
from simulations.world import World


def traced(seed: int, note: str = "") -> Trace:
    world = World(seed, 3)
    trace = Trace(world)
    world.watchers.append(trace)
    world.start_all()
    world.run(3)
    if note:
        trace.note(note)
    return trace


def test_equal_runs_have_equal_digests() -> None:
    assert traced(1).digest() == traced(1).digest()
    assert traced(1).digest() != traced(2).digest()
    assert traced(1).digest() != traced(1, "a fault").digest()


def test_the_last_steps_are_told_in_words() -> None:
    trace = traced(1, "a fault")
    assert trace.steps > TAIL == len(trace.tail)
    assert trace.tail[-1].endswith("a fault")
    assert any("bytes, from" in line for line in trace.tail)
