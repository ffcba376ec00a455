from __future__ import annotations

import json
from pathlib import Path

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from p2pmesh.config import Address
from p2pmesh.home import Home
from p2pmesh.identity.keys import parse_id
from p2pmesh.node.keystore import load_book
from p2pmesh.node.life import keep_book
from p2pmesh.wire.registers import MEMBER
from tests.node.isolated_node import Hearsay
from tests.state.builders import MESH, NODES, member


async def test_the_address_book_follows_the_mesh(autojump_clock: MockClock, tmp_path: Path) -> None:
    home = Home.at(tmp_path)
    home.create()
    hearsay = Hearsay()
    where = (Address("10.0.0.1", 9338),)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_book, hearsay.mesh, home, MESH)
        await wait_all_tasks_blocked()
        assert load_book(home, MESH) == {}
        hearsay.say(1, MEMBER, member("node-1", addresses=where).to_wire())
        await trio.sleep(10)
        assert load_book(home, MESH) == {NODES[1]: where}
        hearsay.say(1, MEMBER, member("node-1", addresses=where, left=True).to_wire())
        hearsay.say(2, MEMBER, member("node-2", addresses=where).to_wire())
        await trio.sleep(10)
        assert load_book(home, MESH) == {NODES[1]: where, NODES[2]: where}, "it may come back"
        nursery.cancel_scope.cancel()
    assert parse_id(json.loads(home.peers_file.read_text())["mesh"]) == MESH
