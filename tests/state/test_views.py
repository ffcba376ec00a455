from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmesh.models.parts import PartId
from p2pmesh.sharing import Sharing
from p2pmesh.state import registers
from p2pmesh.state.document import Document
from p2pmesh.state.fingerprint import fingerprint_of
from p2pmesh.state.registers import Caps, ModelRequest, Served
from p2pmesh.state.views import MeshReader, MeshView, merge_wants, read
from tests.state.builders import MESH, NODES, NOW, card, certificate, digest, held, member, record

WANTED = ModelRequest(digest=digest(1), stem="model-1", replicas=1, priority=0, context=0, slots=4)


def caps_of(budget_bytes: int) -> dict[str, object]:
    return Caps(budget_bytes=budget_bytes, engine="e", rpc="").to_wire()


def kitchen() -> Document:
    document = Document(MESH)
    for register, body in (
        ("member", member().to_wire()),
        ("caps", Caps(budget_bytes=4 << 30, engine="embedded", rpc="").to_wire()),
        ("serving", registers.serves_to_wire([Served(digest=digest(1), state="ready")])),
        ("models/0", registers.held_pages([held(1), held(2, demo=True)])[0]),
        ("wants", registers.wants_to_wire([WANTED])),
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
    assert node.serves[PartId(digest(1))].state == "ready"
    assert set(node.held) == {digest(1), digest(2)}
    assert view.demos == {digest(2)}
    assert view.models[digest(1)].card == held(1).card
    assert view.catalogue.resolve("model-1") == digest(1)
    assert view.models[digest(1)].wanted == WANTED


def test_wants_outlive_a_goodbye() -> None:
    document = kitchen()
    document.merge(record(register="member", seq=2, body=member(left=True).to_wire()), NOW)
    view = read(document)
    assert view.nodes == {}
    assert [wish.owner for wish in view.models[digest(1)].wishes] == [NODES[0]]
    assert view.catalogue.id_of(digest(1)) == "model-1"
    assert set(read(document, me=NODES[0]).nodes) == {NODES[0]}


def describes(document: Document, owner: int, modality: str, *, state: str = "") -> None:
    """Another node says that it has model 1, and perhaps that it runs it."""
    served = [Served(digest=digest(1), state=state)] if state else []  # type: ignore[arg-type]
    mine = held(1, stem=f"name-{owner}", card=card(gives=frozenset({modality})), demo=True)
    for register, body in (
        ("member", member(f"node-{owner}").to_wire()),
        ("serving", registers.serves_to_wire(served)),
        ("models/0", registers.held_pages([mine])[0]),
    ):
        assert document.merge(record(owner, register, body=body), NOW)


def gives(view: MeshView) -> frozenset[str]:
    """What model 1 gives, by a view."""
    card = view.models[digest(1)].card
    assert card is not None
    return card.gives


SMALLEST, MIDDLE, LARGEST = sorted(range(3), key=NODES.__getitem__)


def test_who_has_a_file_believes_its_own_description() -> None:
    document = Document(MESH)
    describes(document, SMALLEST, "embedding", state="ready")
    describes(document, LARGEST, "chat")
    assert gives(read(document, me=NODES[LARGEST])) == {"chat"}
    assert gives(read(document, me=NODES[SMALLEST])) == {"embedding"}


def test_without_the_file_the_word_of_who_serves_counts_then_the_smallest_holders() -> None:
    document = Document(MESH)
    describes(document, SMALLEST, "embedding", state="loading")
    describes(document, MIDDLE, "completion")
    assert gives(read(document)) == {"embedding"}
    describes(document, LARGEST, "chat", state="ready")
    assert gives(read(document)) == {"chat"}


def test_nothing_that_a_removed_node_said_of_models_counts() -> None:
    document = Document(MESH)
    describes(document, SMALLEST, "embedding", state="ready")
    describes(document, LARGEST, "chat")
    assert document.merge(certificate(SMALLEST, (LARGEST,)), NOW)
    view = read(document)
    assert view.removed == {NODES[SMALLEST]}
    assert [node.node for node in view.models[digest(1)].holders] == [NODES[LARGEST]]
    assert gives(view) == {"chat"}
    assert {named.stem for named in view.models[digest(1)].names} == {f"name-{LARGEST}"}


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
        ("serving", registers.serves_to_wire([Served(digest=digest(3), state="ready")])),
        ("models/0", registers.held_pages([thief, held(1, stem="")])[0]),
        ("wants", registers.wants_to_wire([replace(WANTED, digest=digest(4))])),
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
    document.merge(record(register="models/0", seq=2, body={"held": [1]}), NOW)
    node = read(document).nodes[NODES[0]]
    assert node.caps is None
    assert not node.held
    assert node.serves[PartId(digest(1))].state == "ready"


def test_a_withdrawn_register_reads_as_none() -> None:
    document = kitchen()
    document.merge(record(register="wants", seq=2, body={}), NOW)
    assert read(document).models[digest(1)].wanted is None


# Wishes


def wish(**changes: object) -> ModelRequest:
    return replace(WANTED, **changes)  # type: ignore[arg-type]  # the tests name fields of it


def test_of_several_wishes_the_largest_of_each_number_counts() -> None:
    wishes = [
        wish(stem="zulu", replicas=3, priority=0, context=512, slots=1),
        wish(stem="alpha", replicas=1, priority=2, context=2048),
        wish(stem="mike", replicas=2, priority=1, slots=8, split=2),
    ]
    largest = wish(stem="alpha", replicas=3, priority=2, context=2048, slots=8, split=2)
    assert merge_wants(wishes) == largest
    assert merge_wants(wishes[:1]) == wishes[0]
    assert merge_wants([]) is None


def test_of_several_wishes_the_strictest_way_of_sharing_counts() -> None:
    wishes = [
        wish(divergence_max=500_000),
        wish(moe=Sharing.EXPERTS, divergence_max=50_000),
        wish(moe=Sharing.LAYERS),
    ]
    merged = merge_wants(wishes)
    assert merged == wish(moe=Sharing.LAYERS, divergence_max=50_000)
    assert merge_wants(wishes[:2]) == wish(moe=Sharing.EXPERTS, divergence_max=50_000)


# Keeping a view up to date


def content(view: MeshView) -> object:
    """All that a view says, as values that can be compared."""
    models = {
        digest: [getattr(model, field.name) for field in fields(model)]
        for digest, model in view.models.items()
    }
    ids = {digest: view.catalogue.id_of(digest) for digest in models if models[digest][-1]}
    return (list(view.nodes.items()), view.removed, list(models.items()), view.demos, ids)


def at_random(rng: Random, seq: int) -> Callable[[Document], Sequence[int]]:
    """Something that happens to a document; told which owners it concerns."""
    owner, model = rng.randrange(3), rng.randrange(1, 4)
    bodies_by_register = some_bodies(rng, model)

    def happen(document: Document) -> Sequence[int]:
        if rng.random() < 0.1:
            document.merge(certificate(owner, ((owner + 1) % 3,), seq=seq - 1), NOW)
        else:
            register = rng.choice(sorted(bodies_by_register))
            body = {} if rng.random() < 0.1 else bodies_by_register[register]
            one = record(owner, register, seq=seq, body=body, instance=7 + (seq > 30))
            document.merge(one, NOW)
        return [owner]

    return happen


def some_bodies(rng: Random, model: int) -> dict[str, dict[str, object]]:
    return {
        "member": member(f"node-{rng.randrange(2)}", left=rng.random() < 0.2).to_wire(),
        "caps": Caps(budget_bytes=rng.randrange(3), engine="e", rpc="").to_wire(),
        "serving": registers.serves_to_wire(
            [Served(digest=digest(model), state=rng.choice(["loading", "ready"]))]
        ),
        "models/0": registers.held_pages(
            [held(number, stem=f"s{rng.randrange(2)}") for number in (model, 4)]
        )[0],
        "wants": registers.wants_to_wire([wish(digest=digest(model), slots=rng.randrange(3))]),
    }


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_a_view_kept_up_to_date_is_the_view_of_the_document(seed: int) -> None:
    rng = Random(seed)
    document = Document(MESH)
    reader = MeshReader(document, NODES[0])
    for seq in range(1, 40):
        before = reader.view
        owners = at_random(rng, seq)(document)
        differs = reader.update(NODES[owner] for owner in owners)
        assert (reader.view is not before) == differs
        assert content(reader.view) == content(read(document, me=NODES[0]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_a_view_and_its_document_keep_step_when_time_and_trust_run_out(seed: int) -> None:
    rng, now, allowed = Random(seed), NOW, set(NODES[:3])
    document = Document(MESH, keeper=NODES[0], authorised=lambda _, fact, __: fact.owner in allowed)
    reader = MeshReader(document, NODES[0])
    for seq in range(1, 40):
        now += rng.choice([0, 0, 30, 120])
        changed = set(document.expire(now))
        if rng.random() < 0.1:
            owner = rng.choice(NODES[:3])
            allowed ^= {owner}
            changed |= document.reauthorise([owner], now)
        owner_number = rng.randrange(3)
        register, body = rng.choice(sorted(some_bodies(rng, rng.randrange(1, 4)).items()))
        said = {"epoch": NOW + seq // 15, "issued_at": now, "ttl_s": rng.choice([60, 240])}
        one = record(owner_number, register, seq=seq, body=body, **said)
        changed |= document.merge(one, now).owners
        reader.update(changed)
        assert content(reader.view) == content(read(document, me=NODES[0]))
        assert document.fingerprint == fingerprint_of(sorted(document.ids()))
        assert sorted(one.id for one in document.records()) == document.ids()


@pytest.mark.parametrize(
    ("register", "field", "value"),
    [("member", "left", 0), ("caps", "budget_bytes", True)],
)
def test_a_body_that_only_python_takes_for_the_same_is_read_again(
    register: str, field: str, value: object
) -> None:
    document = kitchen()
    body = {"member": member().to_wire(), "caps": caps_of(1)}[register]
    assert document.merge(record(register=register, seq=2, body=body), NOW)
    reader = MeshReader(document)
    assert document.merge(record(register=register, seq=3, body={**body, field: value}), NOW)
    reader.update([NODES[0]])
    assert content(reader.view) == content(read(document))


def test_nothing_is_kept_of_owners_that_are_gone() -> None:
    document = kitchen()
    reader = MeshReader(document)
    reader.update(document.expire(NOW + 3600))
    assert document.owners == ()
    assert not reader.view.nodes
    assert not reader.view.models
    assert not reader._owners
    assert not reader._speakers
    view = reader.view
    assert not reader.update([NODES[0], NODES[1]])
    assert reader.view is view


def test_a_renewed_lease_changes_nothing() -> None:
    document = kitchen()
    reader = MeshReader(document)
    before = reader.view
    assert document.merge(record(register="member", seq=2, body=member().to_wire()), NOW)
    assert not reader.update([NODES[0]])
    assert reader.view is before


def test_a_new_life_is_a_change_though_it_says_the_same() -> None:
    document = kitchen()
    reader = MeshReader(document)
    body = member().to_wire()
    assert document.merge(record(register="member", seq=2, body=body, instance=8), NOW)
    assert reader.update([NODES[0]])
    assert reader.view.nodes[NODES[0]].instance == 8


def test_what_a_change_does_not_concern_stays_the_same_object() -> None:
    document = kitchen()
    describes(document, 1, "chat")
    reader = MeshReader(document)
    before = reader.view
    served = [Served(digest=digest(1), state="loading")]
    body = registers.serves_to_wire(served)
    assert document.merge(record(register="serving", seq=2, body=body), NOW)
    assert reader.update([NODES[0]])
    after = reader.view
    assert after.nodes[NODES[1]] is before.nodes[NODES[1]]
    assert after.nodes[NODES[0]].held is before.nodes[NODES[0]].held
    assert after.models[digest(1)] is not before.models[digest(1)]
    caps = Caps(budget_bytes=9, engine="e", rpc="")
    assert document.merge(record(1, "caps", body=caps.to_wire()), NOW)
    assert reader.update([NODES[1]])
    assert reader.view.models[digest(2)] is after.models[digest(2)]
    assert reader.view.catalogue is after.catalogue
