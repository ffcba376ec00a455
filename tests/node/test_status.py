from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from p2pmesh import __version__
from p2pmesh.config import Address
from p2pmesh.engine.confinement import Confinement
from p2pmesh.engine.devices import Device
from p2pmesh.engine.find import Engine
from p2pmesh.home import Home
from p2pmesh.identity.keys import NodeId, show_id
from p2pmesh.models.parts import StageName, StageRange, unit_id
from p2pmesh.node.backends import MeshBackends
from p2pmesh.node.keystore import MeshInfo
from p2pmesh.node.mesh import Mesh
from p2pmesh.node.reconciler import Reconciler
from p2pmesh.node.roster import Seen
from p2pmesh.node.status import Addresses, NodeStatus
from p2pmesh.state.registers import Served
from p2pmesh.wire.registers import MEMBER
from tests.identity.builders import FOUNDED_AT
from tests.node.cards import card_of
from tests.node.isolated_node import ENGINE, GIB, ME, Hearsay, Parts, serving, wanted
from tests.state.builders import MESH, NODES, digest, held, member

GPU = Device(
    id="CUDA0", backend="CUDA", description="A GPU", total_bytes=24 * GIB, free_bytes=20 * GIB
)
NATIVE = Engine(
    kind="native",
    command=("llama-server",),
    source="managed",
    version="b11434",
    rpc="7.0.0",
    devices=(GPU,),
    warnings=("GPU found but unused",),
    confinement=Confinement("full"),
    rpc_confinement=Confinement("files", "an old kernel"),
)
# Of a node in a mesh that asks for no credentials.
NO_STANDING = {
    "role": "",
    "stage": False,
    "basis": "",
    "by": "",
    "via": "",
    "expires_at": None,
}
WHOLE = {"part": "whole", "layers": None, "experts": None}
HOME = Home.at(Path("/home/of/the/node"))
ADDRESSES = Addresses(
    api=Address("127.0.0.1", 9337), console=Address("::1", 3131), peer=Address("0.0.0.0", 9338)
)


@dataclass(frozen=True)
class Life:
    card: MeshInfo
    mesh: Mesh
    reconciler: Reconciler
    routes: MeshBackends
    membership: Around
    admission: Around

    def known(self) -> Mapping[NodeId, Seen]:
        return {}


class Around:
    """Nobody waits, nothing is heard, nothing is about to be lost."""

    admits = announces = False
    waiting: Sequence[Any] = ()
    others: list[str] = []  # noqa: RUF012 - never changed
    warnings: list[str] = []  # noqa: RUF012

    def uses(self, invitation: bytes) -> int:
        raise AssertionError("there is no invitation")


def life_of(parts: Parts, name: str) -> Life:
    around = Around()
    return Life(card_of(name=name), parts.mesh, parts.reconciler, parts.routes, around, around)


async def no_order(name: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
    raise AssertionError(f"nobody orders {name} here")


def status_of(
    parts: Parts,
    engine: Engine = ENGINE,
    stop: Callable[[], None] = lambda: None,
    around: Around | None = None,
    peer: str = "0.0.0.0",
) -> NodeStatus:
    return NodeStatus(
        name="me",
        home=HOME,
        addresses=replace(ADDRESSES, peer=Address(peer, 9338)),
        engine=engine,
        engines=parts.manager,
        life=life_of(parts, "brave-otter"),
        around=around or Around(),
        changes=parts.mesh.changes,
        token="a token",
        stop=stop,
        order=no_order,
    )


def snapshot(status: NodeStatus) -> dict[str, Any]:
    """As it arrives at whoever asks: through JSON."""
    made = status.snapshot()
    arrived: dict[str, Any] = json.loads(json.dumps(made, allow_nan=False))
    assert arrived == made, "JSON values only: no tuples, no keys that are no text"
    return arrived


async def alone(parts: Parts) -> dict[str, Any]:
    """The snapshot of a node that knows nobody else and serves its demo model."""
    status = status_of(parts)
    async with serving(parts):
        parts.engine(0).become("ready", port=81, pid=os.getpid())
        seen = snapshot(status)
    parts_of_it = {"node", "mesh", "nodes", "away", "invitations", "newcomers", "models"}
    assert set(seen) == parts_of_it
    return seen


async def test_a_node_describes_itself(parts: Parts) -> None:
    node = (await alone(parts))["node"]
    used_bytes = node["memory"].pop("used_bytes")
    assert used_bytes > 0
    assert node == {
        "id": show_id(ME),
        "name": "me",
        "version": __version__,
        "pid": os.getpid(),
        "api": "127.0.0.1:9337",
        "console": "[::1]:3131",
        "peer": "0.0.0.0:9338",
        "home": str(HOME.root),
        "uptime_s": 0,
        "memory": {"budget_bytes": 8 * GIB},
        "engine": {
            "kind": "embedded",
            "source": "wheel",
            "version": "2026.10",
            "rpc": None,
            "confinement": {"level": "none", "reason": "it was not looked at yet"},
            "rpc_confinement": None,
            "devices": [],
        },
        "warnings": [],
    }


async def test_a_mesh_of_one_is_described(parts: Parts) -> None:
    seen = await alone(parts)
    assert seen["mesh"] == {
        "id": show_id(MESH),
        "name": "brave-otter",
        "founded_at": int(FOUNDED_AT),
        "open": False,
        "admits": False,
        "announced": False,
        "others": [],
        "only_admin": "",
        "notices": [],
        "nodes": 1,
        "plan": parts.reconciler.plan.digest.hex(),
        "agreed": True,
    }
    assert seen["nodes"] == [
        {
            "id": show_id(ME),
            "name": "me",
            "self": True,
            "state": "live",
            **NO_STANDING,
            "address": "memory:0",
            "version": "0.1.0",
            "memory_bytes": 8 * GIB,
            "engine": "embedded 2026.10",
            "models": [
                {
                    "id": "model-0",
                    "digest": digest(0),
                    "part": "whole",
                    "layers": None,
                    "experts": None,
                    "state": "ready",
                }
            ],
            "rtt_ms": None,
        }
    ]


async def test_a_node_that_no_other_machine_reaches_lets_nobody_in(parts: Parts) -> None:
    around = Around()
    around.admits = True
    seen = {
        host: snapshot(status_of(parts, around=around, peer=host))["mesh"]["admits"]
        for host in ("0.0.0.0", "192.168.1.20", "::", "127.0.0.1", "::1")
    }
    assert [host for host, admits in seen.items() if admits] == ["0.0.0.0", "192.168.1.20", "::"]


async def test_models_are_described_whether_they_are_served_or_not(parts: Parts) -> None:
    models = (await alone(parts))["models"]
    idle = {"state": "not served", "replicas": [], "copies": 0, "reason": "nobody wants it"}
    replica = {
        "node": show_id(ME),
        "name": "me",
        "part": "whole",
        "layers": None,
        "experts": None,
        "state": "ready",
        "detail": "",
    }
    served = {"state": "ready", "replicas": [replica], "copies": 1, "reason": "1 of 1 copy"}
    assert models == [
        {
            "id": f"model-{number}",
            "digest": digest(number),
            "name": "Some Model",
            "size_bytes": 3000,
            "architecture": "llama",
            "takes": ["text"],
            "gives": ["chat"],
            "wanted_by": [],
            **(idle if number else served),
        }
        for number in range(3)
    ]


async def test_devices_and_warnings_are_shown(parts: Parts) -> None:
    node = snapshot(status_of(parts, NATIVE))["node"]
    assert node["engine"] == {
        "kind": "native",
        "source": "managed",
        "version": "b11434",
        "rpc": "7.0.0",
        "confinement": {"level": "full", "reason": ""},
        "rpc_confinement": {"level": "files", "reason": "an old kernel"},
        "devices": [
            {
                "id": "CUDA0",
                "description": "A GPU",
                "total_bytes": 24 * GIB,
                "free_bytes": 20 * GIB,
            }
        ],
    }
    assert node["warnings"] == ["GPU found but unused"]


async def test_other_nodes_are_shown_with_what_is_seen_of_them(parts: Parts) -> None:
    for number in (1, 2, 3):
        parts.hearsay.join(number, budget_bytes=number * GIB)
    parts.hearsay.say(1, MEMBER, member("node-1", addresses=(Address("10.0.0.1", 9338),)).to_wire())
    parts.hearsay.hold(1, held(5))
    parts.hearsay.serve(1, 5, "loading", "30 % in memory")
    parts.hearsay.suspect(2)
    parts.hearsay.kill(3)
    seen = snapshot(status_of(parts))
    nodes = {node["name"]: node for node in seen["nodes"]}
    assert seen["mesh"]["nodes"] == len(seen["nodes"]) == 4
    assert [node["id"] for node in seen["nodes"]] == [show_id(node) for node in sorted(NODES[:4])]
    assert nodes["node-1"] == {
        "id": show_id(NODES[1]),
        "name": "node-1",
        "self": False,
        "state": "live",
        **NO_STANDING,
        "address": "10.0.0.1:9338",
        "version": "0.1.0",
        "memory_bytes": 1 * GIB,
        "engine": "native b1",
        "models": [
            {
                "id": "model-5",
                "digest": digest(5),
                "part": "whole",
                "layers": None,
                "experts": None,
                "state": "loading",
            }
        ],
        "rtt_ms": None,
    }
    assert {name: node["state"] for name, node in nodes.items()} == {
        "me": "live",
        "node-1": "live",
        "node-2": "suspect",
        "node-3": "dead",
    }
    model = next(one for one in seen["models"] if one["digest"] == digest(5))
    assert model["state"] == "loading"
    assert model["replicas"] == [
        {
            "node": show_id(NODES[1]),
            "name": "node-1",
            "part": "whole",
            "layers": None,
            "experts": None,
            "state": "loading",
            "detail": "30 % in memory",
        }
    ]


async def test_round_trips_are_shown_in_milliseconds(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = parts.hearsay.join(1)
    monkeypatch.setattr(parts.mesh._core, "rtt_s", {node: 0.01234, ME: None}.__getitem__)
    seen = {one["name"]: one["rtt_ms"] for one in snapshot(status_of(parts))["nodes"]}
    assert seen == {"me": None, "node-1": 12.3}


async def test_a_node_that_said_little_is_shown_all_the_same(parts: Parts) -> None:
    parts.hearsay.say(1, MEMBER, member("node-1", addresses=()).to_wire())
    parts.hearsay.serve(1, 7)
    node = next(n for n in snapshot(status_of(parts))["nodes"] if not n["self"])
    assert (node["memory_bytes"], node["engine"], node["address"]) == (0, "", "")
    assert node["models"] == [
        {
            "id": digest(7),
            "digest": digest(7),
            "part": "whole",
            "layers": None,
            "experts": None,
            "state": "ready",
        }
    ]


async def test_a_wanted_model_that_nobody_has_says_who_wants_it(parts: Parts) -> None:
    parts.hearsay.want(1, wanted(7))
    parts.hearsay.want(2, wanted(7))
    async with serving(parts):
        model = next(
            one for one in snapshot(status_of(parts))["models"] if one["digest"] == digest(7)
        )
    assert model == {
        "id": "model-7",
        "digest": digest(7),
        "name": "",
        "size_bytes": 0,
        "architecture": "",
        "takes": [],
        "gives": [],
        "state": "not served",
        "replicas": [],
        "copies": 1,
        "wanted_by": sorted(show_id(node) for node in NODES[1:3]),
        "reason": "no live node holds the file",
    }


async def test_failures_say_why(parts: Parts) -> None:
    parts.hearsay.want(1, wanted(1))
    async with serving(parts):
        parts.engine(1).become("failed", "out of memory")
        await wait_all_tasks_blocked()
        model = snapshot(status_of(parts))["models"][1]
    assert model["state"] == "failed"
    assert [one["detail"] for one in model["replicas"]] == ["out of memory"]
    assert model["reason"] == "on me: out of memory"


async def test_an_owner_that_does_not_answer_is_not_shown_with_its_model_ready(
    parts: Parts,
) -> None:
    parts.hearsay.join(1, budget_bytes=8 * GIB)
    parts.hearsay.hold(1, held(5))
    parts.hearsay.serve(1, 5)
    parts.hearsay.want(1, wanted(5))

    def shown() -> tuple[list[str], str, list[str]]:
        seen = snapshot(status_of(parts))
        (node,) = [one for one in seen["nodes"] if one["name"] == "node-1"]
        (model,) = [one for one in seen["models"] if one["digest"] == digest(5)]
        return (
            [one["state"] for one in node["models"]],
            model["state"],
            [one["state"] for one in model["replicas"]],
        )

    async with serving(parts):
        assert shown() == (["ready"], "ready", ["ready"])
        parts.hearsay.suspect(1)
        assert shown() == (["suspect"], "suspect", ["suspect"])
        parts.hearsay.kill(1)
        await wait_all_tasks_blocked()
        assert shown() == ([], "not served", [])


async def test_agreed_means_that_every_linked_node_has_the_plan(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = status_of(parts)
    node = parts.hearsay.join(1)
    assert not snapshot(status)["mesh"]["agreed"], "it has not said yet"
    parts.mesh.set_plan(b"p" * 16)
    monkeypatch.setattr(type(parts.mesh._core), "plans", {node: b"p" * 16})
    assert snapshot(status)["mesh"]["agreed"]


async def test_uptime_counts_whole_seconds(autojump_clock: MockClock, parts: Parts) -> None:
    status = status_of(parts)
    await trio.sleep(61.7)
    assert snapshot(status)["node"]["uptime_s"] == 61


async def test_who_waits_for_a_change_gets_its_count(
    autojump_clock: MockClock, parts: Parts
) -> None:
    status = status_of(parts)
    seen = parts.mesh.changes.count
    with trio.move_on_after(60) as scope:
        await status.wait_changed(seen)
    assert scope.cancelled_caught
    parts.hearsay.join(1)
    assert await status.wait_changed(seen) == parts.mesh.changes.count > seen


async def test_another_mesh_is_shown_once_it_is_entered(parts: Parts) -> None:
    status = status_of(parts)
    parts.hearsay.join(1)
    assert len(snapshot(status)["nodes"]) == 2
    seen = await status.wait_changed(-1)
    parts.join(Hearsay())
    status.enter(life_of(parts, "tidal-heron"))
    assert await status.wait_changed(seen) > seen
    assert snapshot(status)["mesh"]["name"] == "tidal-heron"
    assert len(snapshot(status)["nodes"]) == 1
    assert status.ready_line()["id"] == show_id(ME)


async def test_the_ready_line_says_how_to_reach_it(parts: Parts) -> None:
    line = status_of(parts).ready_line()
    assert line == {
        key: snapshot(status_of(parts))["node"][key]
        for key in ("id", "name", "pid", "api", "console", "peer", "home")
    }


async def test_stop_and_token_are_what_was_given(parts: Parts) -> None:
    stopped = trio.Event()
    status = status_of(parts, stop=stopped.set)
    assert status.token == "a token"
    assert "a token" not in json.dumps(status.snapshot())
    status.stop()
    assert stopped.is_set()


async def test_a_stage_says_which_layers_it_has(parts: Parts) -> None:
    stages = (StageRange(NODES[1], 0, 0), StageRange(NODES[2], 1, 5))
    name = str(StageName(unit_id(digest(5), stages), 1))
    parts.hearsay.join(2)
    parts.hearsay.hold(2, held(5))
    parts.hearsay.want(2, wanted(5))
    tail = Served(digest=digest(5), state="ready", name=name, stages=stages)
    parts.hearsay.serve_parts(2, tail)
    async with serving(parts):
        shown = snapshot(status_of(parts))
    replicas = [one for model in shown["models"] for one in model["replicas"]]
    served = [one for node in shown["nodes"] for one in node["models"]]
    for found in (replicas, served):
        assert [one["layers"] for one in found if one["part"] == name] == [[2, 6]]
