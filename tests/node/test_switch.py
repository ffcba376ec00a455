from __future__ import annotations

from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from p2pmesh.errors import EngineError, LinkError
from p2pmesh.models.catalogue import UnknownModel
from p2pmesh.models.parts import PartId
from p2pmesh.node.switch import BackendsSwitch
from tests.node.isolated_node import ME, Hearsay, Parts, make_parts, serving, wanted
from tests.state.builders import NODES, digest, held

DEMO, ALPHA = digest(0), digest(1)


async def two_replicas(parts: Parts) -> BackendsSwitch:
    """Model 0 runs here, model 1 on another node."""
    parts.engine(0).become("ready", port=81)
    parts.hearsay.join(1)
    parts.hearsay.hold(1, held(1))
    parts.hearsay.serve(1, 1)
    parts.hearsay.want(1, wanted(1))
    await wait_all_tasks_blocked()
    switch = BackendsSwitch(parts.manager, parts.mesh.changes)
    switch.enter(parts.routes)
    return switch


@pytest.fixture
async def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Parts:
    return make_parts(Hearsay(), tmp_path, monkeypatch)


async def test_before_the_first_mesh_there_is_nothing(parts: Parts) -> None:
    switch = BackendsSwitch(parts.manager, parts.mesh.changes)
    assert (switch.models(), switch.targets(DEMO)) == ((), [])
    with pytest.raises(UnknownModel):
        switch.catalogue().resolve("model-0")


async def test_in_a_mesh_it_says_what_the_mesh_says(parts: Parts) -> None:
    async with serving(parts):
        switch = await two_replicas(parts)
        assert switch.models() == parts.routes.models()
        assert switch.catalogue() is parts.routes.catalogue()
        for model in (DEMO, ALPHA):
            assert switch.targets(model) == parts.routes.targets(model) != ()
        assert switch.engine_key(PartId(DEMO)) == "secret"


async def test_between_two_meshes_the_engines_here_go_on(parts: Parts) -> None:
    async with serving(parts):
        switch = await two_replicas(parts)
        models, (other,) = switch.models(), switch.targets(ALPHA)
        switch.leave()
        parts.hearsay.suspect(1)
        assert switch.models() == models, "others' models are waited for"
        assert switch.catalogue().resolve("model-1") == ALPHA
        assert [target.node for target in switch.targets(DEMO)] == [ME]
        assert switch.targets(ALPHA) == []
        with pytest.raises(LinkError, match="changing its mesh"):
            await switch.connect(other)
        (own,) = switch.targets(DEMO)
        parts.engine(0).become("loading")
        assert switch.targets(DEMO) == []
        with pytest.raises(EngineError):
            await switch.connect(own)


async def test_who_waits_between_two_meshes_is_woken_by_the_next(parts: Parts) -> None:
    async with serving(parts), trio.open_nursery() as nursery:
        switch = await two_replicas(parts)
        switch.leave()
        woken = trio.Event()

        async def wait() -> None:
            await switch.changed()
            woken.set()

        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        assert not woken.is_set()
        switch.enter(parts.routes)
        await woken.wait()
        assert len(switch.targets(ALPHA)) == 1


async def test_a_link_that_ends_with_its_mesh_loses_no_replica(
    autojump_clock: MockClock, parts: Parts
) -> None:
    async with serving(parts), trio.open_nursery() as nursery:
        switch = await two_replicas(parts)
        (own,), (other,) = switch.targets(DEMO), switch.targets(ALPHA)
        lost = []

        async def watch(name: str, target: object) -> None:
            await switch.lost(target)  # type: ignore[arg-type]  # a target
            lost.append(name)

        nursery.start_soon(watch, "other", other)
        nursery.start_soon(watch, "own", own)
        await wait_all_tasks_blocked()
        switch.leave()
        parts.hearsay.suspect(1)
        await trio.sleep(1)
        assert lost == []
        parts.join(Hearsay())
        switch.enter(parts.routes)
        parts.hearsay.join(1)
        await trio.sleep(1)
        assert lost == [], "it is in the next mesh as well"
        parts.hearsay.suspect(1)
        await trio.sleep(1)
        assert lost == ["other"]
        nursery.cancel_scope.cancel()
    assert NODES[1] == other.node
