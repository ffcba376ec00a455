from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import structlog
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from p2pmesh.engine import process as process_module
from p2pmesh.engine.find import Engine
from p2pmesh.gossip.core import PAUSE_S
from p2pmesh.gossip.settling import ALONE_AFTER_S
from p2pmesh.home import Home
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.parts import PartId, ReplicaKey
from p2pmesh.models.store import Store
from p2pmesh.node import proofs
from p2pmesh.node.holding import Holding, Opened
from p2pmesh.node.serving import DRAIN_S, Serving, compute_threads
from p2pmesh.wire.registers import MEMBER
from tests.engine.samples import EMBEDDED, lives
from tests.engine.supervised import ask
from tests.models.make import tiny_gguf
from tests.node.hearsay import GIB, ME, SLOTS, Hearsay, Parts, make_parts, serving, wanted
from tests.state.make import NODES, card, digest, held, member

DEMO, ALPHA = digest(0), digest(1)
STEP_S = 0.5  # longer than a look at the requests in flight


# Starting


async def test_a_node_alone_serves_the_demo_model(parts: Parts) -> None:
    async with serving(parts):
        assert parts.serving.planned.is_set()
        assert parts.serving.plan.on(ME) == (PartId(DEMO),)
        assert parts.hearsay.served() == {DEMO: ("loading", "starting")}
        assert parts.serving.status(PartId(DEMO)) is None
        parts.engine(0).become("ready", port=81)
        assert parts.hearsay.served() == {DEMO: ("ready", "")}
        status = parts.serving.status(PartId(DEMO))
        assert status is not None
        assert (status.port, status.api_key) == (81, "secret")
        assert parts.serving.status(PartId(ALPHA)) is None
        parts.engine(0).become("loading", "starting again: it died")
        assert parts.serving.status(PartId(DEMO)) is None
        assert parts.hearsay.served() == {DEMO: ("loading", "starting again: it died")}
        assert len(parts.engines) == 1, "starting again is the engine's own affair"


async def test_nothing_starts_before_the_mesh_was_heard(parts: Parts) -> None:
    parts.mesh.settled = trio.Event()
    async with serving(parts):
        assert parts.engines == []
        assert not parts.serving.planned.is_set()
        parts.mesh.settled.set()
        await wait_all_tasks_blocked()
        assert parts.running() == ["model-0"]


async def test_the_others_are_told_the_plan(parts: Parts) -> None:
    async with serving(parts):
        before = parts.serving.plan.digest
        assert parts.mesh._core.plan == before
        parts.hearsay.want(1, wanted(5))
        await wait_all_tasks_blocked()
        assert parts.mesh._core.plan == parts.serving.plan.digest != before


async def test_a_lease_that_is_only_renewed_wakes_nobody(parts: Parts) -> None:
    parts.hearsay.join(1, budget_bytes=GIB)
    async with serving(parts):
        before = parts.mesh.changes.count, parts.mesh.view, parts.serving.plan
        parts.hearsay.say(1, MEMBER, member("node-1", addresses=()).to_wire())
        await wait_all_tasks_blocked()
        assert (parts.mesh.changes.count, parts.mesh.view, parts.serving.plan) == before
        parts.hearsay.say(1, MEMBER, member("node-one", addresses=()).to_wire())
        assert parts.mesh.changes.count > before[0]
        assert parts.mesh.view.name_of(NODES[1]) == "node-one"


@pytest.mark.parametrize(("asked", "launched"), [(2, 2), (0, SLOTS)])
async def test_a_model_that_another_node_wants_is_launched_as_it_asks(
    asked: int,
    launched: int,
    autojump_clock: MockClock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = make_parts(
        Hearsay(), tmp_path, monkeypatch, files=(0, 1), gives=frozenset({"embedding"})
    )
    parts.hearsay.want(1, wanted(1, slots=asked, context=1024))
    async with serving(parts):
        (engine,) = parts.engines
        assert engine.launch.alias == "model-1"
        assert engine.launch.modality == "embedding"
        assert engine.launch.context == 1024
        assert engine.launch.slots == launched
        assert engine.launch.model_paths == (Path("/models/model-1.gguf"),)


async def test_a_model_without_a_wish_for_its_context_gets_its_own(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(make_parts(Hearsay(), tmp_path, monkeypatch, context=2048)) as parts:
        assert parts.engine(0).launch.context == 2048
        assert parts.engine(0).launch.slots == SLOTS


async def test_what_others_call_a_model_cannot_keep_it_from_starting(parts: Parts) -> None:
    for number in range(1, len(NODES)):  # one of them sorts before this node
        parts.hearsay.join(number)
        parts.hearsay.hold(number, held(0, stem="\0--evil", card=card(context=0)))
        parts.hearsay.want(number, wanted(0, stem="\n\0", context=0, slots=0))
    async with serving(parts):
        (engine,) = parts.engines
        assert engine.launch.context == 4096
        assert "\0" not in engine.launch.alias


async def test_what_another_node_serves_is_not_started_until_that_node_dies(parts: Parts) -> None:
    parts.hearsay.join(1, budget_bytes=8 * GIB)
    parts.hearsay.hold(1, held(1))
    parts.hearsay.serve(1, 1)
    parts.hearsay.want(1, wanted(1))
    async with serving(parts):
        assert parts.engines == []
        parts.hearsay.suspect(1)
        await wait_all_tasks_blocked()
        assert parts.engines == [], "routing avoids it; placement waits"
        parts.hearsay.kill(1)
        await wait_all_tasks_blocked()
        assert parts.running() == ["model-1"]


async def test_a_file_that_is_gone_is_said_and_nothing_starts(parts: Parts) -> None:
    parts.holding._files.clear()  # the mesh was told of it, and it went since
    with structlog.testing.capture_logs() as logs:
        async with serving(parts):
            assert parts.engines == []
            assert parts.hearsay.served() == {}
    assert {"event": "part_gone", "log_level": "warning", "part": PartId(DEMO)} in logs


# Stopping


async def test_running_answers_are_finished_before_an_engine_stops(
    autojump_clock: MockClock, parts: Parts
) -> None:
    async with serving(parts):
        parts.engine(0).become("ready")
        parts.in_flight[DEMO] = 1
        parts.hearsay.want(1, wanted(1))
        await wait_all_tasks_blocked()
        assert parts.serving.status(PartId(DEMO)) is None, "nothing new is sent to it"
        assert parts.hearsay.served()[DEMO] == ("stopping", "")
        assert parts.running() == ["model-0", "model-1"]
        await trio.sleep(DRAIN_S / 2)
        assert "model-0" in parts.running()
        parts.in_flight[DEMO] = 0
        await trio.sleep(STEP_S)
        assert parts.running() == ["model-1"]
        assert parts.hearsay.served() == {ALPHA: ("loading", "starting")}


async def test_an_answer_without_end_does_not_hold_an_engine(
    autojump_clock: MockClock, parts: Parts
) -> None:
    async with serving(parts):
        parts.in_flight[DEMO] = 1
        parts.hearsay.want(1, wanted(1))
        await trio.sleep(DRAIN_S - STEP_S)
        assert parts.running() == ["model-0", "model-1"]
        await trio.sleep(2 * STEP_S)
        assert parts.running() == ["model-1"]


async def test_a_model_wanted_again_while_it_stops_starts_anew(
    autojump_clock: MockClock, parts: Parts
) -> None:
    parts.hearsay.want(1, wanted(1))
    async with serving(parts):
        parts.in_flight[ALPHA] = 1
        parts.hearsay.want(1)
        await wait_all_tasks_blocked()
        assert parts.hearsay.served()[ALPHA][0] == "stopping"
        parts.hearsay.want(1, wanted(1))
        await trio.sleep(STEP_S)
        assert parts.running() == ["model-1"]
        assert len(parts.engines) == 2, "one process per model: the old one first has to go"
        parts.in_flight[ALPHA] = 0
        await trio.sleep(STEP_S)
        assert [one.launch.alias for one in parts.engines] == ["model-1", "model-0", "model-1"]
        assert parts.running() == ["model-1"]
        await trio.sleep(STEP_S)
        parts.hearsay.pass_on()
        assert parts.hearsay.served() == {ALPHA: ("loading", "starting")}


async def test_who_slept_starts_but_stops_nothing_until_it_knows_what_it_missed(
    autojump_clock: MockClock, parts: Parts
) -> None:
    def now() -> tuple[bool, list[str]]:
        return parts.mesh.catching_up, parts.running()

    parts.hearsay.want(1, wanted(1))
    async with serving(parts):
        assert now() == (False, ["model-1"])
        await trio.sleep(2 * PAUSE_S)  # the machine sleeps: not even timers fire
        parts.hearsay.want(1)
        await wait_all_tasks_blocked()
        assert now() == (True, ["model-1", "model-0"])
        await parts.hearsay.stay_awake(ALONE_AFTER_S - PAUSE_S)
        assert now() == (True, ["model-1", "model-0"])
        await parts.hearsay.stay_awake(2 * PAUSE_S)
        assert now() == (False, ["model-0"])


def spare_copy(parts: Parts) -> None:
    """Model 1 runs here, and another node that the plan prefers says that it has it ready too."""
    parts.hearsay.join(1, budget_bytes=8 * GIB)
    parts.hearsay.hold(1, held(1))
    parts.hearsay.want(1, wanted(1))
    parts.hearsay.serve(1, 1, "ready")


async def test_a_copy_goes_only_when_the_other_has_answered(
    autojump_clock: MockClock, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proofs, "RETRY_S", STEP_S)
    parts.hearsay.want(1, wanted(1))
    async with serving(parts):
        parts.answering.clear()
        spare_copy(parts)  # ready is kept before loading: this one is to go
        await trio.sleep(STEP_S / 2)
        assert parts.asked == [ReplicaKey(NODES[1], PartId(ALPHA))]
        assert parts.running() == ["model-1"]
        parts.answering.add(NODES[1])
        await trio.sleep(STEP_S)
        assert parts.asked == [ReplicaKey(NODES[1], PartId(ALPHA))] * 2
        assert parts.running() == []


async def test_a_start_waits_for_the_memory_of_what_stops(
    autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget_bytes = 200 << 20  # one of the small models needs 128 MiB and a little
    parts = make_parts(Hearsay(), tmp_path, monkeypatch, files=(0, 1), budget_bytes=budget_bytes)
    async with serving(parts):
        parts.in_flight[DEMO] = 1
        parts.hearsay.want(1, wanted(1))
        await trio.sleep(STEP_S)
        assert parts.running() == ["model-0"]
        parts.in_flight[DEMO] = 0
        await trio.sleep(STEP_S)
        assert parts.running() == ["model-1"]


async def test_a_failed_engine_is_told_and_goes_when_nobody_wants_it(
    autojump_clock: MockClock, parts: Parts
) -> None:
    parts.hearsay.want(1, wanted(1))
    async with serving(parts):
        engine = parts.engine(1)
        engine.become("failed", "out of memory")
        await trio.sleep(STEP_S)
        assert parts.hearsay.served() == {ALPHA: ("failed", "out of memory")}
        assert parts.serving.status(PartId(ALPHA)) is None
        assert parts.engines == [engine], "its own back-off decides when it is tried again"
        parts.hearsay.want(1)
        await trio.sleep(STEP_S)
        assert engine.ended
        assert parts.running() == ["model-0"]


async def test_stop_ends_all_engines_and_starts_none(
    autojump_clock: MockClock, parts: Parts
) -> None:
    parts.hearsay.want(1, wanted(1), wanted(2))
    with trio.fail_after(1):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(parts.serving.run)
            await parts.serving.planned.wait()
            await wait_all_tasks_blocked()
            parts.in_flight[ALPHA] = 1
            assert parts.running() == ["model-1", "model-2"]
            await parts.serving.stop()
            assert parts.running() == []
            assert parts.hearsay.served() == {}
            parts.hearsay.want(1, wanted(1))
            await wait_all_tasks_blocked()
    assert len(parts.engines) == 2


async def test_stop_before_anything_ran_returns(autojump_clock: MockClock, parts: Parts) -> None:
    parts.mesh.settled = trio.Event()
    async with serving(parts):
        with trio.fail_after(1):
            await parts.serving.stop()
        parts.mesh.settled.set()
        await wait_all_tasks_blocked()
        assert parts.hearsay.served() == {}
        assert parts.running() == []


async def test_memory_is_that_of_the_processes_that_live(parts: Parts) -> None:
    async with serving(parts):
        assert parts.serving.used_bytes() == 0
        parts.engine(0).become("ready", pid=os.getpid())
        resident = psutil.Process().memory_info().rss
        assert parts.serving.used_bytes() == pytest.approx(resident, rel=0.2)
        parts.engine(0).become("ready", pid=2**30)  # it ended a moment ago
        assert parts.serving.used_bytes() == 0


# Real engines


async def until(true: Callable[[], object], serving: Serving) -> None:
    with trio.fail_after(30):
        while not true():
            await serving._mesh.changes.wait(serving._mesh.changes.count)


@pytest.mark.parametrize(("cores", "threads"), [(None, 1), (1, 1), (2, 1), (8, 7)])
def test_one_core_is_left_to_others(cores: int | None, threads: int) -> None:
    assert compute_threads(cores) == threads


async def nobody(_: ReplicaKey) -> None:
    raise AssertionError("there are no others")


def real(folder: Path, file: Path | None = None) -> tuple[Hearsay, Serving, ModelDigest]:
    """Serving with real engines, of the embedded model or of one in a file."""
    hearsay = Hearsay()
    store = Store(Home.at(folder), environ={})
    model = store.open(file) if file else store.embedded()
    sha256 = store.digest(model)
    opened = Opened(files={sha256: model}, demo=sha256, wanted=())
    holding = Holding(hearsay.mesh, store, opened)
    hearsay.give()
    engine = Engine(kind="embedded", command=EMBEDDED, source="wheel", version="1")
    serving = Serving(
        hearsay.mesh, engine, holding, slots=1, logs=folder, in_flight=lambda _: 0, ask=nobody
    )
    return hearsay, serving, sha256


async def test_a_real_engine_answers_and_is_gone_after_stop(tmp_path: Path) -> None:
    hearsay, serving, sha256 = real(tmp_path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serving.run)
        await until(lambda: serving.status(PartId(sha256)), serving)
        status = serving.status(PartId(sha256))
        assert status is not None
        assert status.pid is not None
        assert hearsay.served() == {sha256: ("ready", "")}
        assert serving.used_bytes() > 13_000_000
        answer = await trio.to_thread.run_sync(ask, status, status.api_key)
        assert answer == "The capital of France is Paris."
        await serving.stop()
        assert not lives(status.pid)
        assert hearsay.served() == {}


async def test_a_file_deleted_before_its_engine_starts_fails_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "RETRY_S", ())  # failed at the first try
    file = tiny_gguf(tmp_path / "gone.gguf")
    hearsay, serving, sha256 = real(tmp_path, file)
    file.unlink()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serving.run)
        await until(lambda: [s for s, _ in hearsay.served().values()] == ["failed"], serving)
        assert "gone.gguf" in hearsay.served()[sha256][1]
        nursery.cancel_scope.cancel()


async def test_a_file_that_became_another_is_not_served_as_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "RETRY_S", ())
    file = tiny_gguf(tmp_path / "first.gguf", seed=1)
    hearsay, serving, sha256 = real(tmp_path, file)
    tiny_gguf(file, seed=2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serving.run)
        await until(lambda: [s for s, _ in hearsay.served().values()] == ["failed"], serving)
        assert "first.gguf is not the file that was read" in hearsay.served()[sha256][1]
        nursery.cancel_scope.cancel()
