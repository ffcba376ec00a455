from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import structlog
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from p2pmesh.engine import supervisor as supervisor_module
from p2pmesh.engine.find import Engine
from p2pmesh.gossip.catch_up import ALONE_AFTER_S
from p2pmesh.gossip.core import PAUSE_S
from p2pmesh.home import Home
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.parts import PartId, ReplicaKey
from p2pmesh.models.store import Store
from p2pmesh.node import proofs
from p2pmesh.node.engines import DRAIN_S, EngineManager
from p2pmesh.node.inventory import InventoryPublisher, ModelInventory, Opened
from p2pmesh.node.pipelines import Pipelines
from p2pmesh.node.reconciler import Reconciler
from p2pmesh.node.shards import Shards
from p2pmesh.wire.registers import MEMBER
from tests.engine.samples import EMBEDDED, lives
from tests.engine.supervised import ask
from tests.models.builders import tiny_gguf
from tests.node.isolated_node import (
    GIB,
    ME,
    SLOTS,
    Hearsay,
    Parts,
    library_in,
    make_parts,
    obtain_nothing,
    serving,
    wanted,
)
from tests.state.builders import NODES, card, digest, held, member

DEMO, ALPHA = digest(0), digest(1)
STEP_S = 0.5  # longer than a look at the requests in flight


# Starting


async def test_a_node_alone_serves_the_demo_model(parts: Parts) -> None:
    async with serving(parts):
        assert parts.reconciler.planned.is_set()
        assert parts.reconciler.plan.on(ME) == (PartId(DEMO),)
        assert parts.hearsay.served() == {DEMO: ("loading", "starting")}
        assert parts.manager.status(PartId(DEMO)) is None
        parts.engine(0).become("ready", port=81)
        assert parts.hearsay.served() == {DEMO: ("ready", "")}
        status = parts.manager.status(PartId(DEMO))
        assert status is not None
        assert (status.port, status.api_key) == (81, "secret")
        assert parts.manager.status(PartId(ALPHA)) is None
        parts.engine(0).become("loading", "starting again: it died")
        assert parts.manager.status(PartId(DEMO)) is None
        assert parts.hearsay.served() == {DEMO: ("loading", "starting again: it died")}
        assert len(parts.engines) == 1, "starting again is the engine's own affair"


async def test_nothing_starts_before_the_mesh_was_heard(parts: Parts) -> None:
    parts.mesh.settled = trio.Event()
    async with serving(parts):
        assert parts.engines == []
        assert not parts.reconciler.planned.is_set()
        parts.mesh.settled.set()
        await wait_all_tasks_blocked()
        assert parts.running() == ["model-0"]


async def test_the_others_are_told_the_plan(parts: Parts) -> None:
    async with serving(parts):
        before = parts.reconciler.plan.digest
        assert parts.mesh._core.plan == before
        parts.hearsay.want(1, wanted(5))
        await wait_all_tasks_blocked()
        assert parts.mesh._core.plan == parts.reconciler.plan.digest != before


async def test_a_lease_that_is_only_renewed_wakes_nobody(parts: Parts) -> None:
    parts.hearsay.join(1, budget_bytes=GIB)
    async with serving(parts):
        before = parts.mesh.changes.count, parts.mesh.view, parts.reconciler.plan
        parts.hearsay.say(1, MEMBER, member("node-1", addresses=()).to_wire())
        await wait_all_tasks_blocked()
        assert (parts.mesh.changes.count, parts.mesh.view, parts.reconciler.plan) == before
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
        await parts.reconciler.planned.wait()
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
    parts.inventory._files.clear()  # the mesh was told of it, and it went since
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
        parts.manager.begin(PartId(DEMO))
        parts.hearsay.want(1, wanted(1))
        await wait_all_tasks_blocked()
        assert parts.manager.status(PartId(DEMO)) is None, "nothing new is sent to it"
        assert parts.hearsay.served()[DEMO] == ("stopping", "")
        assert parts.running() == ["model-0", "model-1"]
        await trio.sleep(DRAIN_S / 2)
        assert "model-0" in parts.running()
        parts.manager.end(PartId(DEMO))
        await trio.sleep(STEP_S)
        assert parts.running() == ["model-1"]
        assert parts.hearsay.served() == {ALPHA: ("loading", "starting")}


async def test_an_answer_without_end_does_not_hold_an_engine(
    autojump_clock: MockClock, parts: Parts
) -> None:
    async with serving(parts):
        parts.manager.begin(PartId(DEMO))
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
        parts.manager.begin(PartId(ALPHA))
        parts.hearsay.want(1)
        await wait_all_tasks_blocked()
        assert parts.hearsay.served()[ALPHA][0] == "stopping"
        parts.hearsay.want(1, wanted(1))
        await trio.sleep(STEP_S)
        assert parts.running() == ["model-1"]
        assert len(parts.engines) == 2, "one process per model: the old one first has to go"
        parts.manager.end(PartId(ALPHA))
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
        parts.manager.begin(PartId(DEMO))
        parts.hearsay.want(1, wanted(1))
        await trio.sleep(STEP_S)
        assert parts.running() == ["model-0"]
        parts.manager.end(PartId(DEMO))
        await trio.sleep(STEP_S)
        assert parts.running() == ["model-1"]


async def test_a_failed_engine_leaves_the_model_to_another_node_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = make_parts(Hearsay(), tmp_path, monkeypatch, files=(0, 1))
    parts.hearsay.want(1, wanted(1))
    async with serving(parts):
        assert parts.running() == ["model-1"]
        parts.hearsay.join(1, budget_bytes=8 * GIB)
        parts.hearsay.hold(1, held(1))
        await wait_all_tasks_blocked()
        assert parts.running() == ["model-1"], "what loads keeps its place"
        parts.engine(1).become("failed", "out of memory")
        await wait_all_tasks_blocked()
        assert parts.running() == []
        assert parts.hearsay.served() == {ALPHA: ("failed", "out of memory")}
        [assignment] = (a for a in parts.reconciler.plan.assignments if a.digest == ALPHA)
        assert assignment.nodes == (NODES[1],)


async def test_a_failed_engine_is_told_and_goes_when_nobody_wants_it(
    autojump_clock: MockClock, parts: Parts
) -> None:
    parts.hearsay.want(1, wanted(1))
    async with serving(parts):
        engine = parts.engine(1)
        engine.become("failed", "out of memory")
        await trio.sleep(STEP_S)
        assert parts.hearsay.served() == {ALPHA: ("failed", "out of memory")}
        assert parts.manager.status(PartId(ALPHA)) is None
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
            await nursery.start(parts.manager.run)
            nursery.start_soon(parts.reconciler.run)
            await parts.reconciler.planned.wait()
            await wait_all_tasks_blocked()
            parts.manager.begin(PartId(ALPHA))
            assert parts.running() == ["model-1", "model-2"]
            await parts.manager.stop()
            assert parts.running() == []
            assert parts.hearsay.served() == {}
            parts.hearsay.want(1, wanted(1))
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    assert len(parts.engines) == 2


async def test_stop_before_anything_ran_returns(autojump_clock: MockClock, parts: Parts) -> None:
    parts.mesh.settled = trio.Event()
    async with serving(parts):
        with trio.fail_after(1):
            await parts.manager.stop()
        parts.mesh.settled.set()
        await wait_all_tasks_blocked()
        assert parts.hearsay.served() == {}
        assert parts.running() == []


# Real engines


@dataclass
class Real:
    """A node with a real engine, of the embedded model or of a file, in one mesh at first."""

    hearsay: Hearsay
    engines: EngineManager
    inventory: ModelInventory
    digest: ModelDigest

    @classmethod
    def of(cls, folder: Path, file: Path | None = None) -> Real:
        store = Store(Home.at(folder), environ={})
        model = store.open(file) if file else store.embedded()
        sha256 = store.digest(model)
        opened = Opened(files={sha256: model}, demo=sha256, wanted=())
        engine = Engine(kind="embedded", command=EMBEDDED, source="wheel", version="1")
        engines = EngineManager(engine, logs=folder)
        return cls(Hearsay(), engines, ModelInventory(store, opened, library_in(folder)), sha256)

    @asynccontextmanager
    async def following(self) -> AsyncIterator[Hearsay]:
        """The engines follow the plan of the present mesh, until the block ends."""
        mesh = self.hearsay.mesh
        InventoryPublisher(mesh, self.inventory)
        self.hearsay.give()
        reconciler = Reconciler(
            mesh,
            self.engines,
            self.inventory,
            slots=1,
            ask=nobody,
            pipelines=Pipelines(mesh, self.engines),
            shards=Shards(self.engines, self.inventory.library, obtain_nothing),
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reconciler.run)
            await reconciler.planned.wait()
            yield self.hearsay
            nursery.cancel_scope.cancel()

    async def until_it_is(self, state: str) -> str:
        """The detail, as soon as the mesh is told of that state."""
        mesh = self.hearsay.mesh
        with trio.fail_after(30):
            while self.hearsay.served().get(self.digest, ("", ""))[0] != state:
                await mesh.changes.wait(mesh.changes.count)
        return self.hearsay.served()[self.digest][1]

    def pid(self) -> int:
        status = self.engines.status(PartId(self.digest))
        assert status is not None
        assert status.pid is not None
        return status.pid


async def nobody(_: ReplicaKey) -> None:
    raise AssertionError("there are no others")


async def test_a_real_engine_answers_and_is_gone_after_stop(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    real = Real.of(tmp_path)
    await nursery.start(real.engines.run)
    async with real.following() as hearsay:
        assert await real.until_it_is("ready") == ""
        status = real.engines.status(PartId(real.digest))
        assert status is not None
        assert real.engines.used_bytes() > 13_000_000
        answer = await trio.to_thread.run_sync(ask, status, status.api_key)
        assert answer == "The capital of France is Paris."
        pid = real.pid()
        await real.engines.stop()
        assert not lives(pid)
        assert hearsay.served() == {}


async def test_a_node_that_changes_its_mesh_keeps_its_engine(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    real = Real.of(tmp_path)
    await nursery.start(real.engines.run)
    async with real.following():
        await real.until_it_is("ready")
        pid = real.pid()
    assert lives(pid), "the mesh is left, the engine goes on"
    real.hearsay = Hearsay()
    async with real.following() as hearsay:
        assert hearsay.served() == {real.digest: ("ready", "")}, "from the first moment"
        assert real.pid() == pid
        status = real.engines.status(PartId(real.digest))
        assert status is not None
        answer = await trio.to_thread.run_sync(ask, status, status.api_key)
        assert answer == "The capital of France is Paris."
        await real.engines.stop()
    assert not lives(pid)


async def test_a_file_deleted_before_its_engine_starts_fails_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    monkeypatch.setattr(supervisor_module, "RETRY_S", ())  # failed at the first try
    file = tiny_gguf(tmp_path / "gone.gguf")
    real = Real.of(tmp_path, file)
    file.unlink()
    await nursery.start(real.engines.run)
    async with real.following():
        assert "gone.gguf" in await real.until_it_is("failed")


async def test_a_file_that_became_another_is_not_served_as_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    monkeypatch.setattr(supervisor_module, "RETRY_S", ())
    file = tiny_gguf(tmp_path / "first.gguf", seed=1)
    real = Real.of(tmp_path, file)
    tiny_gguf(file, seed=2)
    await nursery.start(real.engines.run)
    async with real.following():
        said = await real.until_it_is("failed")
        assert "first.gguf is not the file that was read" in said
