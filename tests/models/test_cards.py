"""Cards from headers, over the wire and back, and how much memory they ask for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmesh.errors import ModelError, PeerError
from p2pmesh.models.cards import (
    BYTES_MAX,
    KV_RUNS_MAX,
    Card,
    cache_bytes,
    card_of,
    from_wire,
    largest_tensor_bytes,
    need_bytes,
    read_bytes,
    to_wire,
)
from p2pmesh.models.gguf import Value, scan
from p2pmesh.models.metadata import (
    CONTEXT_MAX,
    EXPERTS_MAX,
    LAYERS_MAX,
    WIDTH_MAX,
)
from p2pmesh.models.store import EMBEDDED
from p2pmesh.wire.text import NAME_CHARACTERS_MAX, plain_text
from tests.models.builders import DEADLINE_MS, header_of, tiny_gguf

RECORD_BYTES_MAX = 16 * 1024


def embedded() -> Card:
    return card_of([scan(EMBEDDED.read_bytes())])


def test_the_embedded_model() -> None:
    assert embedded() == Card(
        architecture="qwen3moe",
        name="p2pmesh tiny MoE",
        layers=6,
        layer_bytes=(1_863_936,) * 6,
        other_bytes=2_229_248,
        size_bytes=13_542_272,
        kv_bytes_per_token=1536,
        experts=16,
        experts_used=4,
        context=32_768,
        width=256,
        vocabulary=4096,
        takes=frozenset({"text"}),
        gives=frozenset({"chat"}),
        chat_template=True,
        parameters=12_545_664,
        quantisation="Q8_0",
        kv_layer_bytes=(256,) * 6,
        expert_bytes=10_027_008,
        tensor_bytes_max=557_056,
    )


def test_the_bytes_add_up_to_the_tensors(tmp_path: Path) -> None:
    header = scan(tiny_gguf(tmp_path / "a.gguf", layers=5, experts=4).read_bytes())
    card = card_of([header])
    assert card.layers == len(card.layer_bytes) == 5
    assert sum(card.layer_bytes) + card.other_bytes == sum(t.size_bytes for t in header.tensors)
    assert card.parameters * 4 == sum(card.layer_bytes) + card.other_bytes
    assert (card.experts, card.experts_used, card.quantisation) == (4, 2, "F32")


def test_several_experts_used_are_the_most_of_any_layer() -> None:
    card = card_of([header_of({"llama.expert_count": 8, "llama.expert_used_count": (2,)})])
    assert (card.experts, card.experts_used) == (8, 2)


def parts(**second: Value) -> list[Any]:
    common: dict[str, Value] = {"split.count": 2, "split.tensors.count": 2}
    first = header_of({**common, "split.no": 0}, [("blk.0.a", (32,))])
    other = header_of({**common, "split.no": 1, **second}, [("blk.0.b", (64,))])
    return [first, other]


def test_parts_make_one_card() -> None:
    card = card_of(parts())
    assert card.layer_bytes == (34 + 68,)
    assert card.size_bytes == sum(header.size_bytes for header in parts())


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        (parts()[:1], "one of 2 parts"),
        (parts(**{"split.no": 0}), "part 2 does not belong"),
        (parts(**{"split.count": 3}), "part 2 does not belong"),
        ([parts()[0], parts()[0]], "part 2 does not belong"),
        (
            [parts()[0], header_of({"split.no": 1, "split.count": 2}, [("blk.0.a", (32,))])],
            "same tensor",
        ),
        (
            [parts()[0], header_of({"split.no": 1, "split.count": 2}, [])],
            "1 of 2 tensors",
        ),
        ([header_of({}, [])], "only a vocabulary"),
        ([header_of({}, [("blk.1.w", (32,))])], "beyond its 1 layers"),
        ([header_of({}, arch="clip")], "projector"),
    ],
)
def test_what_is_no_whole_model_is_refused(headers: list[Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        card_of(headers)


@pytest.mark.parametrize("key", ["block_count", "context_length", "embedding_length"])
def test_what_every_language_model_has_must_be_there(key: str) -> None:
    with pytest.raises(ModelError, match=f"lacks llama.{key}"):
        card_of([header_of({f"llama.{key}": None})])


def test_a_name_cannot_write_on_the_terminal() -> None:
    assert card_of([header_of({"general.name": "a\x1b]0;b\x07"})]).name == "a ]0;b"


# Memory


def test_need_is_the_documented_sum() -> None:
    card = embedded()
    tokens = 32768
    batch = 512 * (4 * (4096 + 8 * 256) + 2 * tokens)
    expected = card.size_bytes + 1536 * tokens + batch + 128 * 2**20
    assert need_bytes(card, context=32768) == expected
    assert need_bytes(card, context=32767) == expected  # the cache is rounded up


@given(st.integers(1, 10**6))
@settings(deadline=DEADLINE_MS)
def test_more_context_never_needs_less(context: int) -> None:
    card = embedded()
    need = need_bytes(card, context=context)
    assert isinstance(need, int)
    assert need > card.size_bytes + card.kv_bytes_per_token * context
    assert need_bytes(card, context=context + 1) >= need


def test_a_row_of_an_older_node_spreads_the_cache_over_the_layers() -> None:
    wire = to_wire(embedded())
    del wire["kv_layer_bytes"], wire["expert_bytes"], wire["tensor_bytes_max"]
    old = from_wire(wire)
    assert old.kv_layer_bytes == ()
    assert cache_bytes(old, context=512) == cache_bytes(embedded(), context=512)
    assert read_bytes(old) == old.layer_bytes
    assert largest_tensor_bytes(old) == old.layer_bytes[0]
    assert cache_bytes(replace(old, kv_bytes_per_token=1537), context=256) == (257 * 256,) * 6


def test_a_token_reads_only_the_experts_that_it_uses() -> None:
    card = embedded()
    unread = 10_027_008 * 12 // 16
    assert sum(card.layer_bytes) - 6 <= sum(read_bytes(card)) + unread <= sum(card.layer_bytes) + 6
    dense = replace(card, experts=0, experts_used=0, expert_bytes=0)
    assert read_bytes(dense) == dense.layer_bytes
    forged = replace(card, expert_bytes=BYTES_MAX)
    assert read_bytes(forged) == (0,) * 6


def test_a_cache_of_too_many_kinds_of_layers_is_not_told_apart() -> None:
    for layers in (KV_RUNS_MAX // 2, KV_RUNS_MAX // 2 + 1):
        heads = tuple(1 + layer % 2 for layer in range(layers))
        keys: dict[str, Value | None] = {
            "llama.block_count": layers,
            "llama.attention.head_count_kv": heads,
        }
        card = card_of([header_of(keys)])
        assert len(card.kv_layer_bytes) == (layers if layers == KV_RUNS_MAX // 2 else 0)
        assert card.kv_bytes_per_token == sum(heads) * 2 * 16 * 2


# The wire

names = st.text(max_size=2 * NAME_CHARACTERS_MAX).map(plain_text)
sizes = st.integers(0, BYTES_MAX)
modalities = st.frozensets(st.sampled_from(["text", "chat", "smell"]), max_size=3)
cards = st.builds(
    lambda layer_bytes, **rest: Card(layers=len(layer_bytes), layer_bytes=layer_bytes, **rest),
    architecture=names.map(lambda text: text[:64].strip()),
    name=names,
    layer_bytes=st.lists(sizes | st.just(7), min_size=1, max_size=60).map(tuple),
    other_bytes=sizes,
    size_bytes=sizes,
    kv_bytes_per_token=sizes,
    experts=st.integers(0, EXPERTS_MAX),
    experts_used=st.integers(0, EXPERTS_MAX),
    context=st.integers(1, CONTEXT_MAX),
    width=st.integers(0, WIDTH_MAX),
    vocabulary=st.integers(0, CONTEXT_MAX),
    takes=modalities,
    gives=modalities,
    chat_template=st.booleans(),
    parameters=sizes,
    quantisation=names.map(lambda text: text[:32].strip()),
    kv_layer_bytes=st.lists(sizes | st.just(7), max_size=60).map(tuple),
    expert_bytes=sizes,
    tensor_bytes_max=sizes,
)


@given(cards)
@settings(deadline=DEADLINE_MS)
def test_a_card_comes_back_as_it_was_sent(card: Card) -> None:
    wire = msgpack.unpackb(msgpack.packb(to_wire(card)))
    assert from_wire(wire) == card
    assert to_wire(from_wire(wire)) == wire


def test_the_largest_card_fits_one_record() -> None:
    card = Card(
        architecture="🦙" * 64,
        name="🦙" * NAME_CHARACTERS_MAX,
        layers=LAYERS_MAX,
        layer_bytes=tuple(BYTES_MAX - index for index in range(LAYERS_MAX)),
        other_bytes=BYTES_MAX,
        size_bytes=BYTES_MAX,
        kv_bytes_per_token=BYTES_MAX,
        experts=EXPERTS_MAX,
        experts_used=EXPERTS_MAX,
        context=CONTEXT_MAX,
        width=WIDTH_MAX,
        vocabulary=CONTEXT_MAX,
        takes=frozenset({"text"}),
        gives=frozenset({"completion"}),
        chat_template=True,
        parameters=BYTES_MAX,
        quantisation="🦙" * 32,
        kv_layer_bytes=tuple(BYTES_MAX - index for index in range(KV_RUNS_MAX // 2)),
        expert_bytes=BYTES_MAX,
        tensor_bytes_max=BYTES_MAX,
    )
    packed = msgpack.packb(to_wire(card))
    assert from_wire(msgpack.unpackb(packed)) == card
    assert len(packed) < RECORD_BYTES_MAX - 4096  # the record's own fields, and some for later
    assert len(msgpack.packb(to_wire(embedded()))) < 384


def test_fields_of_newer_peers_are_ignored() -> None:
    assert from_wire({**to_wire(embedded()), "later": [1]}) == embedded()


junk = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
deep = st.recursive(
    junk, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)


@given(deep)
@settings(deadline=DEADLINE_MS)
def test_junk_is_no_card(obj: object) -> None:
    with pytest.raises(PeerError):
        from_wire(obj)


@given(st.sampled_from(sorted(to_wire(embedded()))), deep)
@settings(deadline=DEADLINE_MS)
def test_one_bad_field_is_enough(key: str, value: object) -> None:
    wire = {**to_wire(embedded()), key: value}
    try:
        card = from_wire(wire)
    except PeerError:
        return
    read = to_wire(card)
    if type(value) is int:  # one beyond what is known counts as the most
        assert 0 <= read[key] <= value
        wire[key] = read[key]
    assert read == wire


def test_numbers_beyond_what_is_known_count_as_the_most() -> None:
    wire = {**to_wire(embedded()), "experts": EXPERTS_MAX + 1, "size_bytes": 2**63}
    expected = replace(embedded(), experts=EXPERTS_MAX, size_bytes=BYTES_MAX)
    assert from_wire(wire) == expected


@pytest.mark.parametrize("key", ["size_bytes", "context"])
def test_what_placement_needs_may_not_be_missing(key: str) -> None:
    wire = to_wire(embedded())
    del wire[key]
    with pytest.raises(PeerError):
        from_wire(wire)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer_bytes", [1]),
        ("kv_layer_bytes", [1]),
        ("kv_layer_bytes", 7),
        ("tensor_bytes_max", -1),
        ("layer_bytes", [0, 5]),
        ("layer_bytes", [LAYERS_MAX + 1, 5]),
        ("layer_bytes", [600, 5, 600, 6]),
        ("layer_bytes", [1, 5, 1, 5]),
        ("layer_bytes", [2**62, 5]),
        ("layer_bytes", [1, -5]),
        ("layer_bytes", [True, 5]),
        ("size_bytes", -1),
        ("size_bytes", 2**64),
        ("size_bytes", True),
        ("context", 0),
        ("gives", "poetry"),
        ("takes", [1]),
        ("chat_template", 1),
        ("name", "line\nbreak"),
        ("name", "x" * (NAME_CHARACTERS_MAX + 1)),
        ("architecture", "\x1b[2J"),
    ],
)
def test_impossible_values_from_peers_are_refused(key: str, value: object) -> None:
    with pytest.raises(PeerError):
        from_wire({**to_wire(embedded()), key: value})
