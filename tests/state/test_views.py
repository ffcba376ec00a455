from __future__ import annotations

from dataclasses import replace

from p2pmesh.state import bodies
from p2pmesh.state.bodies import Caps, Served, Wanted
from p2pmesh.state.document import Document
from p2pmesh.state.views import read
from tests.state.make import MESH, NODES, NOW, card, certificate, digest, held, member, record

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
    view = read(kitchen(), me=NODES[0])
    node = view.nodes[NODES[0]]
    assert node.instance == 7
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


def describes(document: Document, owner: int, modality: str, *, state: str = "") -> None:
    """Another node says that it has model 1, and perhaps that it runs it."""
    served = [Served(digest=digest(1), state=state)] if state else []  # type: ignore[arg-type]
    mine = held(1, stem=f"name-{owner}", card=card(gives=frozenset({modality})), demo=True)
    for register, body in (
        ("member", member(f"node-{owner}").to_wire()),
        ("models/0", bodies.serves_to_wire(served)),
        ("models/1", bodies.held_pages([mine])[0]),
    ):
        assert document.merge(record(owner, register, body=body), NOW)


SMALLEST, MIDDLE, LARGEST = sorted(range(3), key=NODES.__getitem__)


def test_who_has_a_file_believes_its_own_description() -> None:
    document = Document(MESH)
    describes(document, SMALLEST, "embedding", state="ready")
    describes(document, LARGEST, "chat")
    assert read(document, me=NODES[LARGEST]).cards[digest(1)].gives == {"chat"}
    assert read(document, me=NODES[SMALLEST]).cards[digest(1)].gives == {"embedding"}


def test_without_the_file_the_word_of_who_serves_counts_then_the_smallest_holders() -> None:
    document = Document(MESH)
    describes(document, SMALLEST, "embedding", state="loading")
    describes(document, MIDDLE, "completion")
    assert read(document).cards[digest(1)].gives == {"embedding"}
    describes(document, LARGEST, "chat", state="ready")
    assert read(document).cards[digest(1)].gives == {"chat"}


def test_nothing_that_a_removed_node_said_of_models_counts() -> None:
    document = Document(MESH)
    describes(document, SMALLEST, "embedding", state="ready")
    describes(document, LARGEST, "chat")
    assert document.add_certificate(certificate(SMALLEST, (LARGEST,)), NOW)
    view = read(document)
    assert view.removed == {NODES[SMALLEST]}
    assert [node.node for node in view.live] == [NODES[LARGEST]]
    assert view.cards[digest(1)].gives == {"chat"}
    assert {named.stem for named in view.names} == {f"name-{LARGEST}"}


def test_the_embedded_model_is_what_the_reader_embeds() -> None:
    document = kitchen()
    describes(document, 1, "chat")
    assert read(document, me=NODES[0]).demos == {digest(2)}
    assert read(document, me=NODES[2]).demos == frozenset()


def test_a_model_in_use_keeps_its_name() -> None:
    document = kitchen()  # it wants and serves model 1, and calls it so
    thief = held(3, stem="model-1", card=card(name=held(1).card.name))
    for register, body in (
        ("member", member("thief").to_wire()),
        ("models/0", bodies.serves_to_wire([Served(digest=digest(3), state="ready")])),
        ("models/1", bodies.held_pages([thief, held(1, stem="")])[0]),
        ("wants", bodies.wants_to_wire([replace(WANTED, digest=digest(4))])),
    ):
        assert document.merge(record(1, register, body=body), NOW)
    names = read(document).catalogue
    assert names.id_of(digest(1)) == "model-1"
    assert names.resolve("model-1") == digest(1)
    for number in (3, 4):
        assert names.id_of(digest(number)).startswith("model-1@0000")
        assert names.resolve(names.id_of(digest(number))) == digest(number)


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
