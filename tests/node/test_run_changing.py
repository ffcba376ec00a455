"""A node that changes its mesh: whole nodes in the test's own process, on loopback."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from p2pmesh.config import Address, Settings, parse_address
from p2pmesh.engine.find import Engine
from p2pmesh.errors import LocalError
from p2pmesh.home import Home
from p2pmesh.identity.keys import parse_id, show_id
from p2pmesh.node import run as module
from p2pmesh.node.guest import Guest
from p2pmesh.node.joining import Entry
from p2pmesh.node.keystore import MeshInfo, load_book, load_mesh, node_key
from p2pmesh.node.run import Node
from p2pmesh.node.status import NodeStatus
from tests.engine.samples import EMBEDDED
from tests.node.cards import founded

DEADLINE_S = 40.0
GIB = 2**30
NO_ROOM = 2**20  # for any model, so that no engine starts
FREE = Address("127.0.0.1", 0)
ENGINE = Engine(kind="embedded", command=EMBEDDED, source="wheel", version="1")
TOKENS = 1500  # more than the engine makes while the mesh is changed


class Ui:
    """Waits for the start of a node."""

    def __init__(self) -> None:
        self.status: NodeStatus | None = None
        self.listened, self.noted = trio.Event(), trio.Event()
        self.notes: list[str] = []

    def hashing(self, name: str, done_bytes: int, total_bytes: int) -> None:
        """Is not asked for."""

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)
        self.noted.set()

    def listening(self, status: NodeStatus) -> None:
        self.status = status
        self.listened.set()

    def ready(self, status: NodeStatus | Guest) -> None:
        """Is not asked for."""


@dataclass
class Running:
    node: Node
    home: Home
    ui: Ui
    status: NodeStatus

    @property
    def mesh(self) -> tuple[str, str]:
        """The id and the name of its mesh."""
        mesh = self.status.snapshot()["mesh"]
        return mesh["id"], mesh["name"]

    async def invite(self) -> str:
        return str((await self.status.order("invite", {"uses": 0}))["token"])

    def elsewhere(self, mesh: bytes) -> MeshInfo:
        """Another mesh, which this node founded."""
        return founded(node_key(self.home), mesh=mesh)

    def names(self) -> set[str]:
        """The members of its mesh, as it sees them."""
        return {node["name"] for node in self.status.snapshot()["nodes"]}

    def ready_on(self) -> set[str]:
        """The nodes that serve the embedded model, as it sees it."""
        (model,) = self.status.snapshot()["models"]
        return {one["name"] for one in model["replicas"] if one["state"] == "ready"}

    async def until(self, true: Callable[[], bool]) -> None:
        count = 0
        while not true():
            count = await self.status.wait_changed(count)


@pytest.fixture(autouse=True)
def found_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking an engine what it can do takes longer than all the rest of a start."""
    monkeypatch.setattr(module, "find_engine", lambda *_: ENGINE)


@asynccontextmanager
async def running(
    folder: Path, name: str, *, memory: int = NO_ROOM, join: str = ""
) -> AsyncIterator[Running]:
    home, ui = Home.at(folder / name), Ui()
    home.create()
    given = frozenset({"api", "console", "peer"})
    settings = Settings(
        home=home.root,
        name=name,
        api=FREE,
        console=FREE,
        peer=FREE,
        memory=memory,
        join=(join,) if join else (),
        given=given,
    )
    node = Node(settings, home, ui)
    try:
        await node.prepare()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.run, None)
            await ui.listened.wait()
            assert ui.status is not None
            yield Running(node, home, ui, ui.status)
            node.stop()
    finally:
        node.close()


class Asked:
    """A streamed answer of a node's API, as it comes."""

    def __init__(self, running: Running, tokens: int = TOKENS) -> None:
        self._api = parse_address(running.status.ready_line()["api"])
        self._tokens = tokens
        self.began, self.ended = trio.Event(), trio.Event()
        self.text = ""

    async def read(self) -> None:
        body = {
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "temperature": 0,
            "stream": True,
            "max_tokens": self._tokens,
            "ignore_eos": True,
        }
        content = json.dumps(body).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self._api}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        async with await trio.open_tcp_stream(self._api.host, self._api.port) as stream:
            await stream.send_all(head.encode() + content)
            async for data in stream:
                self.text += bytes(data).decode("utf-8", "replace")
                if "data: " in self.text:
                    self.began.set()
        self.ended.set()

    @property
    def is_whole(self) -> bool:
        ended = "data: [DONE]" in self.text and '"error"' not in self.text
        return self.text.startswith("HTTP/1.1 200") and ended


def engines() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


async def test_a_node_changes_its_mesh_while_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DRAIN_S", DEADLINE_S)
    with trio.fail_after(DEADLINE_S):
        async with (
            running(tmp_path, "anna", memory=GIB) as anna,
            running(tmp_path, "bert") as bert,
            running(tmp_path, "cleo", join=await anna.invite()) as cleo,
            trio.open_nursery() as nursery,
        ):
            await cleo.until(lambda: cleo.ready_on() == {"anna"})
            assert cleo.names() == {"anna", "cleo"}
            before, old = engines(), anna.mesh
            here, of_peer = Asked(anna), Asked(cleo)
            for asked in (here, of_peer):
                nursery.start_soon(asked.read)
                await asked.began.wait()
            await anna.status.order("join", {"join": await bert.invite()})
            await cleo.until(lambda: cleo.names() == {"cleo"})
            meanwhile = Asked(anna, 3)
            nursery.start_soon(meanwhile.read)
            await anna.until(lambda: anna.mesh == bert.mesh)
            assert not here.ended.is_set(), "the change takes less time than the answer"
            assert not of_peer.ended.is_set()
            await bert.until(lambda: bert.ready_on() == {"anna"})
            assert bert.names() == anna.names() == {"anna", "bert"}
            through_bert = Asked(bert, 3)
            nursery.start_soon(through_bert.read)
            for asked in (here, of_peer, meanwhile, through_bert):
                await asked.ended.wait()
                assert asked.is_whole, asked.text
            assert engines() == before
            assert cleo.mesh == old
            assert cleo.names() == {"cleo"}
            assert anna.ui.notes == [f"This node is in the mesh {bert.mesh[1]} now"]
            mesh = json.loads(anna.home.run_file.read_text())["mesh"]
            assert mesh == {key: bert.status.snapshot()["mesh"][key] for key in ("id", "name")}
            kept = load_mesh(anna.home)
            assert kept is not None
            assert (show_id(kept.id), kept.name) == bert.mesh
            id_of_bert = parse_id(bert.status.ready_line()["id"])
            await anna.until(lambda: id_of_bert in load_book(anna.home, kept.id))


async def test_a_peers_answer_that_does_not_end_soon_is_cut_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DRAIN_S", 0.01)
    with trio.fail_after(DEADLINE_S):
        async with (
            running(tmp_path, "anna", memory=GIB) as anna,
            running(tmp_path, "cleo", join=await anna.invite()) as cleo,
            trio.open_nursery() as nursery,
        ):
            await cleo.until(lambda: cleo.ready_on() == {"anna"})
            of_peer = Asked(cleo)
            nursery.start_soon(of_peer.read)
            await of_peer.began.wait()
            alone = anna.elsewhere(b"a")
            anna.node.change_mesh(Entry(card=alone))
            await of_peer.ended.wait()
            assert "answer_interrupted" in of_peer.text
            await anna.until(lambda: anna.mesh == (show_id(alone.id), alone.name))
            assert anna.names() == {"anna"}
            assert anna.ready_on() == {"anna"}


async def test_the_last_word_counts_and_the_present_mesh_is_no_change(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with running(tmp_path, "anna") as anna:
            first, present = anna.mesh, load_mesh(anna.home)
            assert present is not None
            anna.node.change_mesh(Entry(card=anna.elsewhere(b"a")))
            anna.node.change_mesh(Entry(card=present))
            last = anna.elsewhere(b"b")
            epoch = int(anna.home.epoch_file.read_text())
            await wait_all_tasks_blocked(0.05)
            assert (anna.mesh, anna.ui.notes) == (first, [])
            assert int(anna.home.epoch_file.read_text()) == epoch
            anna.node.change_mesh(Entry(card=last))
            await anna.until(lambda: anna.mesh == (show_id(last.id), last.name))
            assert int(anna.home.epoch_file.read_text()) > epoch
            anna.node.change_mesh(Entry(card=present))
            await anna.until(lambda: anna.mesh == first)
            assert anna.names() == {"anna"}


async def test_a_mesh_that_cannot_be_remembered_is_not_entered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise LocalError("Cannot write mesh.json: no space left on device")

    with trio.fail_after(DEADLINE_S):
        async with running(tmp_path, "anna") as anna:
            first = anna.mesh
            monkeypatch.setattr(module, "save_mesh", fail)
            anna.node.change_mesh(Entry(card=anna.elsewhere(b"a")))
            await anna.ui.noted.wait()
            assert anna.mesh == first
            (note,) = anna.ui.notes
            assert note.startswith("Cannot write mesh.json: no space left on device. Going on in")
