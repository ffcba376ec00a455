from __future__ import annotations

from p2pmesh.state import bodies
from p2pmesh.state.bodies import Caps, Served, Wanted
from p2pmesh.state.document import Document
from p2pmesh.state.views import read
from tests.state.make import MESH, NODES, NOW, digest, held, member, record

WANTED = Wanted(digest=digest(1), stem="model-1", replicas=1, priority=0, context=0, slots=4)


def kitchen() -> Document:
    document = Document(MESH)
    for register, body in (
        ("member", member().to_wire()),
        ("caps", Caps(budget_bytes=4 << 30, engine="embedded", rpc="").to_wire()),
        ("models/0", bodies.serves_to_wire([Served(digest=digest(1), state="ready")])),
        ("models/1", bodies.held_pages([held(1), held(2, demo=True)])[0]),
        ("wants", bodies.wants_to_wire([WANTED])),
    ):
        assert document.merge(record(register=register, body=body), NOW)
    return document


def test_a_node_is_read_whole() -> None:
    view = read(kitchen())
    node = view.nodes[NODES[0]]
    assert node.member.name == view.name_of(NODES[0]) == "kitchen"
    assert node.caps is not None
    assert node.caps.budget_bytes == 4 << 30
    assert node.serves[digest(1)].state == "ready"
    assert set(node.held) == {digest(1), digest(2)}
    assert view.demos == {digest(2)}
    assert view.cards[digest(1)].architecture == "llama"
    assert view.catalogue.resolve("model-1") == digest(1)
    assert [want.wanted for want in view.wants] == [WANTED]


def test_wants_outlive_a_goodbye() -> None:
    document = kitchen()
    document.merge(record(register="member", seq=2, body=member(left=True).to_wire()), NOW)
    view = read(document)
    assert view.nodes == {}
    assert [want.owner for want in view.wants] == [NODES[0]]
    assert view.catalogue.id_of(digest(1)) == "model-1"
    assert set(read(document, me=NODES[0]).nodes) == {NODES[0]}


def test_nonsense_in_one_register_costs_that_register_only() -> None:
    document = kitchen()
    document.merge(record(register="caps", seq=2, body={"budget_bytes": "much"}), NOW)
    document.merge(record(register="models/1", seq=2, body={"held": [1]}), NOW)
    node = read(document).nodes[NODES[0]]
    assert node.caps is None
    assert not node.held
    assert node.serves[digest(1)].state == "ready"


def test_a_withdrawn_register_reads_as_none() -> None:
    document = kitchen()
    document.merge(record(register="wants", seq=2, body={}), NOW)
    assert read(document).wants == ()
