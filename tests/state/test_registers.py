from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.config import SLOTS_MAX, Address
from p2pmesh.errors import PeerError
from p2pmesh.identity.keys import NodeId
from p2pmesh.models.metadata import CONTEXT_MAX
from p2pmesh.models.parts import (
    STAGES_MAX,
    UNMEASURED,
    PartId,
    Shard,
    ShardKind,
    ShardQuality,
    StageName,
    StageRange,
    shard_name,
    unit_id,
)
from p2pmesh.sharing import Sharing
from p2pmesh.state import registers
from p2pmesh.state.registers import (
    Caps,
    HeldModel,
    Member,
    ModelRequest,
    Served,
)
from p2pmesh.wire.codec import decode, encode
from p2pmesh.wire.records import RECORD_BYTES_MAX
from tests.state.builders import NODES, NOW, card, digest, held, member, record

WANTED = ModelRequest(
    digest=digest(1),
    stem="m",
    replicas=2,
    priority=1,
    context=4096,
    slots=4,
    split=2,
    moe=Sharing.EXPERTS,
    divergence_max=500_000,
)
QUALITY = ShardQuality(ShardKind.EXPERTS, "ab" * 32, 128, 40, 50_000, 930_000)
SHARD = Shard(ShardKind.THIN, "ab" * 32, 10, 2, 0b1000000011)


WISH = {"digest": digest(1), "stem": "m", "replicas": 1, "priority": 0, "context": 1, "slots": 1}


def over_the_wire(body: dict[str, Any]) -> dict[str, Any]:
    decoded: dict[str, Any] = decode(encode(body), bytes_max=RECORD_BYTES_MAX)
    return decoded


def test_each_register_survives_the_wire() -> None:
    here = member(addresses=(Address("10.0.0.5", 9338), Address("fe80::1", 1)), left=True)
    assert Member.from_wire(over_the_wire(here.to_wire())) == here
    caps = Caps(
        budget_bytes=8 << 30,
        engine="b11434",
        rpc="7.0.0",
        memory_mib_per_s=20_000,
        confined=True,
        stage_bytes=5 << 30,
        measured=False,
        far=((NodeId(b"a" * 16), 1), (NodeId(b"b" * 16), 9)),
    )
    assert Caps.from_wire(over_the_wire(caps.to_wire())) == caps
    served = (Served(digest=digest(1), state="ready"), Served(digest=digest(2), state="failed"))
    assert registers.serves_from_wire(over_the_wire(registers.serves_to_wire(served))) == served
    assert registers.wants_from_wire(over_the_wire(registers.wants_to_wire([WANTED]))) == (WANTED,)


def test_shards_survive_the_wire() -> None:
    served = Served(
        digest=digest(1), state="ready", name=shard_name(digest(1), SHARD), shard=SHARD, token_us=9
    )
    body = over_the_wire(registers.serves_to_wire([served]))
    assert registers.serves_from_wire(body) == (served,)
    guessed = QUALITY._replace(divergence=UNMEASURED)
    known = held(1, qualities=(QUALITY, guessed))
    [page] = registers.held_pages([known])
    assert list(registers.held_from_wire(over_the_wire(page))) == [known]


@pytest.mark.parametrize(
    "row",
    [
        [],
        ["fat", b"\xab" * 32, 10, 2, b"\x03\x02"],
        ["thin", b"", 10, 2, b"\x03\x02"],
        ["thin", b"\xab" * 32, 10, 0, b"\x03\x02"],
        ["thin", b"\xab" * 32, 1 << 40, 2, b"\x03\x02"],
        ["thin", b"\xab" * 32, 10, 2, b"\x03\xff"],
        ["thin", b"\xab" * 32, 10, 2, b"\x07\x02"],
    ],
)
def test_a_shard_that_does_not_say_what_it_holds_is_skipped(row: list[Any]) -> None:
    name = shard_name(digest(1), SHARD)
    served = Served(digest=digest(1), state="ready", name=name, shard=SHARD)
    body = registers.serves_to_wire([served])
    body["serves"][0][-1] = row
    assert registers.serves_from_wire(over_the_wire(body)) == ()


@pytest.mark.parametrize(
    "change",
    [
        {"places": 1 << 20},
        {"critical": 0},
        {"critical": 128},
        {"divergence": -2},
        {"divergence": 1 << 60},
        {"coverage": 1_000_001},
    ],
)
def test_an_impossible_quality_is_skipped(change: dict[str, Any]) -> None:
    [page] = registers.held_pages([held(1, qualities=(QUALITY._replace(**change),))])
    [one] = registers.held_from_wire(over_the_wire(page))
    assert one.qualities == ()


def test_a_way_of_sharing_that_is_not_known_leaves_the_choice_to_the_plan() -> None:
    body = registers.wants_to_wire([WANTED])
    body["wants"][0]["moe"] = "vertically"
    [one] = registers.wants_from_wire(over_the_wire(body))
    assert one.moe is Sharing.AUTO


@given(st.integers(0, 80), st.integers(1, 200))
def test_held_models_are_paged_within_the_bound_of_a_record(count: int, layers: int) -> None:
    uneven = card(layers=layers, layer_bytes=tuple(range(layers)))
    models = [held(number, card=uneven) for number in range(count)]
    pages = registers.held_pages(models)
    for number, page in enumerate(pages):
        sealed = record(register=registers.held_register(number), body=page, issued_at=NOW)
        assert len(sealed.raw) <= RECORD_BYTES_MAX
    again = [one for page in pages for one in registers.held_from_wire(over_the_wire(page))]
    assert again == sorted(models, key=lambda one: one.digest)


def held_rows(body: dict[str, Any]) -> tuple[HeldModel, ...]:
    return tuple(registers.held_from_wire(body))


REGISTERS: Mapping[str, tuple[Callable[[dict[str, Any]], Any], dict[str, Any], str]] = {
    "member": (Member.from_wire, member(left=True).to_wire(), ""),
    "caps": (Caps.from_wire, Caps(budget_bytes=9, engine="e", rpc="r").to_wire(), ""),
    "serves": (
        registers.serves_from_wire,
        registers.serves_to_wire(
            [
                Served(digest=digest(1), state="ready", detail="d", token_us=32_258),
                Served(digest=digest(2), state="failed", token_us=9),
            ]
        ),
        "serves",
    ),
    "held": (held_rows, registers.held_pages([held(1), held(2, demo=True)])[0], "held"),
    "wants": (
        registers.wants_from_wire,
        registers.wants_to_wire([WANTED, replace(WANTED, digest=digest(2))]),
        "wants",
    ),
}
NEWER: Mapping[str, Any] = {"colour": "green", "extra": [1, [2, b"three"]]}
FORMS = pytest.mark.parametrize(("read", "body", "rows"), REGISTERS.values(), ids=REGISTERS)


@FORMS
def test_what_a_newer_node_adds_is_left_alone(read: Any, body: dict[str, Any], rows: str) -> None:
    known = read(body)
    assert read({**body, **NEWER}) == known
    if rows:
        longer = [
            [*row, "column", 7] if isinstance(row, list) else {**row, **NEWER} for row in body[rows]
        ]
        assert read({**body, rows: longer}) == known


@FORMS
def test_without_a_field_all_others_still_read(read: Any, body: dict[str, Any], rows: str) -> None:
    whole = read(body)
    for name in body:
        less = read({key: value for key, value in body.items() if key != name})
        if rows:
            assert less == ()
            continue
        differing = {
            field.name
            for field in fields(whole)
            if getattr(less, field.name) != getattr(whole, field.name)
        }
        assert differing <= {name}


@pytest.mark.parametrize("register", ["held", "wants"])
def test_without_a_field_of_a_row_the_others_of_the_row_still_read(register: str) -> None:
    read, body, rows = REGISTERS[register]
    whole = read(body)
    first, second = body[rows]
    for name in first:
        read_rows = read({rows: [{k: v for k, v in first.items() if k != name}, second]})
        assert read_rows[-1] == whole[1], "the other row is whole"
        if name in ("digest", "card"):
            assert read_rows == whole[1:], "a row is about nothing without it"
        else:
            assert replace(read_rows[0], **{name: getattr(whole[0], name)}) == whole[0]


def test_without_a_field_of_a_card_the_others_still_read() -> None:
    whole = held(1)
    (row,) = registers.held_pages([whole])[0]["held"]
    for name in row["card"]:
        less = {key: value for key, value in row["card"].items() if key != name}
        read = held_rows({"held": [{**row, "card": less}]})
        if name in ("size_bytes", "context"):
            assert read == (), "nobody can place it"
            continue
        changes = {name: getattr(whole.card, name)}
        if name == "layer_bytes":
            changes["layers"] = whole.card.layers
        assert replace(read[0].card, **changes) == whole.card


UNREADABLE: Sequence[Any] = (None, 7, "x", [], ["00", "ready", ""], {}, {"digest": "x"}, b"\xff")


@pytest.mark.parametrize("register", ["serves", "held", "wants"])
@pytest.mark.parametrize("junk", UNREADABLE, ids=repr)
def test_a_row_that_does_not_read_is_skipped(register: str, junk: Any) -> None:
    read, body, rows = REGISTERS[register]
    assert read({**body, rows: [junk, *body[rows]]}) == read(body)


def test_a_state_that_only_newer_nodes_know_is_skipped() -> None:
    rows = [[digest(1), "whole", "dancing", ""], [digest(2), "whole", "ready"]]
    assert registers.serves_from_wire({"serves": rows}) == (
        Served(digest=digest(2), state="ready"),
    )


def test_a_part_of_a_kind_that_only_newer_nodes_run_is_skipped() -> None:
    rows = [[digest(1), "stage-0011aabb-0", "ready", ""], [digest(1), "whole", "loading", "9 %"]]
    (read,) = registers.serves_from_wire({"serves": rows})
    assert (read.part, read.state) == (PartId(digest(1)), "loading")


STAGES = (StageRange(NODES[0], 0, 4), StageRange(NODES[1], 5, 11))


def stage_row(number: int = 1, stages: object = None) -> list[object]:
    name = str(StageName(unit_id(digest(1), STAGES), number))
    rows = [[stage.node, stage.last_layer] for stage in STAGES] if stages is None else stages
    return [digest(1), name, "loading", "9 %", rows]


def test_a_stage_tells_its_whole_pipeline() -> None:
    (read,) = registers.serves_from_wire({"serves": [stage_row()]})
    assert (read.name, read.stages) == (stage_row()[1], STAGES)
    assert registers.serves_to_wire([read]) == {"serves": [stage_row()]}
    newer = [[*row, "more"] for row in stage_row()[4]]  # type: ignore[attr-defined]
    assert registers.serves_from_wire({"serves": [stage_row(1, newer)]}) == (read,)
    whole = [digest(1), "whole", "ready", "", [[NODES[0], 11]]]
    assert registers.serves_from_wire({"serves": [whole]})[0].stages == ()


@pytest.mark.parametrize(
    "row",
    [
        stage_row()[:4],
        stage_row(2),
        stage_row(stages=[]),
        stage_row(stages=7),
        stage_row(stages=[[NODES[0], 4], [NODES[1], 10]]),
        stage_row(stages=[[NODES[0], 4], [NODES[1], 4]]),
        stage_row(stages=[[NODES[0], 4], [b"b", 11]]),
        stage_row(stages=[[NODES[0], 4], [NODES[1], True]]),
        stage_row(stages=[[NODES[0], 4], [NODES[1], 2**40]]),
        stage_row(stages=[[bytes([one]) * 16, one] for one in range(9)]),
        [digest(2), *stage_row()[1:]],
    ],
)
def test_a_stage_whose_pipeline_is_another_one_is_skipped(row: list[object]) -> None:
    whole = [digest(3), "whole", "ready", ""]
    (read,) = registers.serves_from_wire({"serves": [row, whole]})
    assert read.digest == digest(3)


def test_a_pipeline_has_each_node_once() -> None:
    twice = (StageRange(NODES[0], 0, 4), StageRange(NODES[0], 5, 11))
    name = str(StageName(unit_id(digest(1), twice), 1))
    row = [digest(1), name, "ready", "", [[one.node, one.last_layer] for one in twice]]
    assert registers.serves_from_wire({"serves": [row]}) == ()


def test_a_modality_that_only_newer_nodes_know_stands_beside_others() -> None:
    (page,) = registers.held_pages([held(1, card=card(gives=frozenset({"chat", "smell"})))])
    (read,) = held_rows(over_the_wire(page))
    assert read.card.gives == {"chat", "smell"}


def test_an_address_that_does_not_read_costs_that_address() -> None:
    body = {**member().to_wire(), "addresses": ["nowhere", 7, "10.0.0.5:9338", "[::1]:x"]}
    assert Member.from_wire(body).addresses == (Address("10.0.0.5", 9338),)


def test_numbers_beyond_what_is_known_count_as_the_most() -> None:
    much = {"slots": 10**6, "context": 2**40, "split": 2**40}
    (read,) = registers.wants_from_wire({"wants": [{**WISH, **much}]})
    assert (read.slots, read.context, read.split) == (SLOTS_MAX, CONTEXT_MAX, STAGES_MAX)


def test_rows_beyond_the_bound_are_not_looked_at() -> None:
    wishes = [{**WISH, "digest": digest(number)} for number in range(2 * registers.WANTS_MAX)]
    assert len(registers.wants_from_wire({"wants": wishes})) == registers.WANTS_MAX


@pytest.mark.parametrize(
    ("read", "body"),
    [
        (Member.from_wire, {"addresses": "10.0.0.5:9338"}),
        (Member.from_wire, {"name": 7}),
        (Caps.from_wire, {"budget_bytes": -1}),
        (registers.serves_from_wire, {"serves": {}}),
        (registers.wants_from_wire, {"wants": 1}),
    ],
)
def test_a_field_of_a_wrong_type_makes_a_body_unreadable(read: Any, body: dict[str, Any]) -> None:
    with pytest.raises(PeerError):
        read(body)


def test_texts_of_peers_are_made_fit_for_terminals_and_command_lines() -> None:
    bad, good = "\x1b[2J a\0b\u202ec\n", "[2J a b c"
    here = Member.from_wire({**member().to_wire(), "name": bad, "version": bad})
    assert (here.name, here.version) == (good, good)
    caps = Caps.from_wire({"budget_bytes": 1, "engine": bad, "rpc": bad})
    assert (caps.engine, caps.rpc) == (good, good)
    (wanted,) = registers.wants_from_wire(registers.wants_to_wire([replace(WANTED, stem=bad)]))
    assert wanted.stem == good
    (page,) = registers.held_pages([held(1, stem=bad)])
    assert [one.stem for one in registers.held_from_wire(page)] == [good]
    (served,) = registers.serves_from_wire({"serves": [[digest(1), "whole", "failed", bad]]})
    assert served.detail == good


def test_the_speed_of_a_part_survives_the_wire() -> None:
    served = (
        Served(digest=digest(1), state="ready", token_us=32_258),
        Served(digest=digest(2), state="ready"),
    )
    assert registers.serves_from_wire(over_the_wire(registers.serves_to_wire(served))) == served


@pytest.mark.parametrize("said", [0, -1, 2**60, True, "fast", None, [], 1.5])
def test_a_speed_that_can_be_none_says_nothing(said: object) -> None:
    rows = {"serves": [[digest(1), "whole", "ready", "", [], said, "more"]]}
    assert registers.serves_from_wire(rows) == (Served(digest=digest(1), state="ready"),)


def test_what_an_engine_says_is_sent_as_one_line_of_bounded_length() -> None:
    said = Served(digest=digest(1), state="failed", detail="out of\nmemory" + "!" * 500)
    (row,) = registers.serves_to_wire([said])["serves"]
    assert row[3].startswith("out of memory!!!")
    assert len(row[3]) == registers.DETAIL_CHARS_MAX


def test_distances_that_cannot_be_read_are_skipped() -> None:
    far = [
        [b"b" * 16, 2, "more"],
        [b"a" * 16, 0],
        [b"short", 1],
        [b"c" * 16, "1"],
        7,
        [b"a" * 16, 1],
    ]
    read = Caps.from_wire({"far": far})
    assert read.far == ((NodeId(b"a" * 16), 1), (NodeId(b"b" * 16), 2))
    many = [[bytes([n]) * 16, 1] for n in range(200)]
    assert len(Caps.from_wire({"far": many}).far) == registers.FAR_MAX
    assert (Caps.from_wire({}).far, Caps.from_wire({}).measured) == ((), True)
