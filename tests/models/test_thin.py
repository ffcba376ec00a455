"""The bytes of thin shards, against the model that they come from."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmesh.errors import ModelError
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.gguf import Header, scan
from p2pmesh.models.parts import PLACES_MAX
from p2pmesh.models.shard_file import Cut
from p2pmesh.models.tensors import layer_of
from p2pmesh.models.thin import ThinLayout, thin_digest, thin_file, thin_layout_of
from tests.models.builders import DEADLINE_MS, tiny_gguf
from tests.models.layouts import EXPERT, EXPERTS, moe_gguf
from tests.models.sliced import Array, Source, assembled, source, tensors

F16, F32, Q8_0, Q4_K = (gguf.GGMLQuantizationType[kind] for kind in ("F16", "F32", "Q8_0", "Q4_K"))
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "MXFP4")
THINNED = ("mixtral", "qwen2moe", "qwen3moe", "gpt-oss")
WIDE = 512  # two blocks of the types that keep 256 weights together
Kept = Mapping[int, Array]
"""For each layer the neurons of each expert, [experts, width]."""


def cut(model: Source, kept: Kept, *, slab_bytes: int = 2**20) -> Source:
    layout = thin_layout_of(model.headers)
    [width] = {rows.shape[1] for rows in kept.values()}
    shard = thin_file(model.headers, layout=layout, width=width, kept=kept.__getitem__)
    return assembled(model, shard, slab_bytes=slab_bytes)


def chosen(layout: ThinLayout, places: int, rng: np.random.Generator) -> Kept:
    """Return random neurons of each expert, in whole blocks."""
    kept = {}
    for layer, block in layout.blocks.items():
        count = places * layout.step // block
        rows = [
            np.sort(rng.permutation(layout.width // block)[:count]) for _ in range(layout.experts)
        ]
        kept[layer] = (np.array(rows)[:, :, None] * block + np.arange(block)).reshape(EXPERTS, -1)
    return kept


def values(model: Source, folder: Path) -> dict[str, Array]:
    """Return the tensors as another reader sees them, dequantised and the slowest axis first."""
    found = {}
    for at, data in enumerate(model.files):
        path = folder / f"{at}.gguf"
        path.write_bytes(data)
        for one in gguf.GGUFReader(path).tensors:
            # The reader maps the file, which the next call overwrites.
            found[one.name] = gguf.quants.dequantize(one.data, one.tensor_type).copy()
    return found


def assert_thin(before: Mapping[str, Array], after: Mapping[str, Array], kept: Kept) -> None:
    """Each kept neuron has the weights that the model has; everything else is whole."""
    assert list(before) == list(after)
    for name, whole in before.items():
        layer = layer_of(name)
        expected = whole
        if layer is not None and "_exps." in name and not name.endswith("down_exps.bias"):
            axis = 1 if "down" in name else 0
            expected = np.stack(
                [one.take(rows, axis) for one, rows in zip(whole, kept[layer], strict=True)]
            )
        assert after[name].shape == expected.shape
        assert np.array_equal(after[name], expected, equal_nan=True), name


@functools.cache
def layout_and_source(name: str, kind: str, split_tensors: int) -> tuple[ThinLayout, Source]:
    model = source(name, kind=gguf.GGMLQuantizationType[kind], split_tensors=split_tensors)
    return thin_layout_of(model.headers), model


class Case(NamedTuple):
    """A model, and the share of its places that stays."""

    layout: str
    kind: str
    split_tensors: int
    share: float
    seed: int
    slab_bytes: int


@given(
    st.builds(
        Case,
        layout=st.sampled_from(THINNED),
        kind=st.sampled_from(KINDS),
        split_tensors=st.sampled_from([0, 5]),
        share=st.floats(0, 1),
        seed=st.integers(0, 99),
        slab_bytes=st.sampled_from([500, 2**20]),
    )
)
@settings(deadline=DEADLINE_MS, max_examples=25)
def test_every_kept_neuron_has_the_weights_of_the_model(
    tmp_path_factory: pytest.TempPathFactory, case: Case
) -> None:
    layout, model = layout_and_source(case.layout, case.kind, case.split_tensors)
    places = max(1, round(layout.count * case.share))
    kept = chosen(layout, places, np.random.default_rng(case.seed))
    shard = cut(model, kept, slab_bytes=case.slab_bytes)
    folder = tmp_path_factory.mktemp("thin")
    assert_thin(values(model, folder), values(shard, folder), kept)
    [facts, whole] = (one.headers[0].metadata for one in (shard, model))
    for key in layout.keys:
        assert facts[key] == places * layout.step
    assert len(facts) >= len(whole) - 3, "all but what names the parts of a model"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", THINNED)
def test_the_full_width_is_the_model(name: str, kind: str) -> None:
    layout, model = layout_and_source(name, kind, 0)
    every = np.tile(np.arange(layout.width), (EXPERTS, 1))
    shard = cut(model, dict.fromkeys(layout.blocks, every))
    assert tensors(shard) == tensors(model)
    assert shard.headers[0].metadata == model.headers[0].metadata


def test_blocks_of_256_neurons_stay_whole(tmp_path: Path) -> None:
    model = source("qwen3moe", kind=F16, down=Q4_K, width=WIDE)
    layout = thin_layout_of(model.headers)
    assert (layout.step, layout.count, layout.blocks) == (256, 2, {0: 256, 1: 256, 2: 256})
    kept = chosen(layout, 1, np.random.default_rng(1))
    assert_thin(values(model, tmp_path), values(cut(model, kept), tmp_path), kept)


def header(changes: Mapping[str, Any]) -> Header:
    """The header of a model of two layers with tensors of these shapes and types."""
    shapes: dict[str, Any] = {"keys": {"expert_feed_forward_length": EXPERT}}
    for layer in range(2):
        shapes |= {
            f"blk.{layer}.ffn_gate_inp.weight": (EXPERTS, 32),
            f"blk.{layer}.ffn_gate_exps.weight": (EXPERTS, EXPERT, 32),
            f"blk.{layer}.ffn_up_exps.weight": (EXPERTS, EXPERT, 32),
            f"blk.{layer}.ffn_down_exps.weight": (EXPERTS, 32, EXPERT),
        }
    shapes |= changes
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.gguf")
        _write(gguf.GGUFWriter(path, "qwen3moe"), shapes)
        return scan(path.read_bytes())


def _write(writer: gguf.GGUFWriter, shapes: Mapping[str, Any]) -> None:
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(4)
    for key, value in shapes["keys"].items():
        if isinstance(value, list):
            writer.add_array(f"qwen3moe.{key}", value)
        else:
            writer.add_uint32(f"qwen3moe.{key}", value)
    for name, shape in shapes.items():
        if name == "keys" or shape is None:
            continue
        kind = F32  # unless the last entry says another
        if isinstance(shape[-1], gguf.GGMLQuantizationType):
            kind = shape[-1]
        *others, row = (size for size in shape if size is not kind)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = np.zeros((*others, row // block * size), np.uint8)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_place_is_the_least_that_all_layers_allow() -> None:
    plain = thin_layout_of([header({})])
    assert plain == ThinLayout(
        experts=EXPERTS,
        width=EXPERT,
        step=8,
        blocks={0: 1, 1: 1},
        keys=("qwen3moe.expert_feed_forward_length",),
    )
    mixed = thin_layout_of([header({"blk.1.ffn_down_exps.weight": (EXPERTS, 32, EXPERT, Q8_0)})])
    assert (mixed.step, mixed.blocks) == (32, {0: 1, 1: 32})


def wide(width: int) -> dict[str, Any]:
    changes: dict[str, Any] = {"keys": {"expert_feed_forward_length": width}}
    for layer in range(2):
        for part in ("gate", "up"):
            changes[f"blk.{layer}.ffn_{part}_exps.weight"] = (EXPERTS, width, 1)
        changes[f"blk.{layer}.ffn_down_exps.weight"] = (EXPERTS, 1, width)
    return changes


@pytest.mark.parametrize(("width", "step"), [(60, 4), (35, 1), (8 * 1024, 8), (9 * 1024, 16)])
def test_there_are_no_more_places_than_may_be(width: int, step: int) -> None:
    layout = thin_layout_of([header(wide(width))])
    assert layout.step == step
    assert layout.count * step == width
    assert layout.count <= PLACES_MAX


def test_the_width_of_dense_layers_changes_where_experts_have_it_and_there_are_none() -> None:
    both = {"expert_feed_forward_length": EXPERT, "feed_forward_length": EXPERT}
    only = {"feed_forward_length": EXPERT}
    dense = {"blk.0.ffn_down.weight": (32, EXPERT)}
    expert, usual = (f"qwen3moe.{key}" for key in both)
    assert thin_layout_of([header({"keys": both})]).keys == (expert, usual)
    assert thin_layout_of([header({"keys": only})]).keys == (usual,)
    assert thin_layout_of([header({"keys": both} | dense)]).keys == (expert,)
    with pytest.raises(ModelError, match="no number of its header says"):
        thin_layout_of([header({"keys": only} | dense)])


def test_gate_and_up_in_one_tensor_lose_the_same_neurons(tmp_path: Path) -> None:
    """The gate comes first in each expert."""
    path = moe_gguf(tmp_path / "m.gguf", "qwen3moe", layers=1)
    before = {one.name: one.data for one in gguf.GGUFReader(path).tensors}
    gate, up, down = (before[f"blk.0.ffn_{part}_exps.weight"] for part in ("gate", "up", "down"))
    fused = np.concatenate([gate, up], axis=1)
    writer = gguf.GGUFWriter(tmp_path / "fused.gguf", "qwen3moe")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(gate.shape[2])
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(4)
    writer.add_expert_feed_forward_length(EXPERT)
    writer.add_tensor("blk.0.ffn_gate_inp.weight", before["blk.0.ffn_gate_inp.weight"])
    writer.add_tensor("blk.0.ffn_gate_up_exps.weight", fused)
    writer.add_tensor("blk.0.ffn_down_exps.weight", down)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = (tmp_path / "fused.gguf").read_bytes()
    model = Source((data,), (scan(data),))
    kept = chosen(thin_layout_of(model.headers), 3, np.random.default_rng(1))
    after = values(cut(model, kept), tmp_path)["blk.0.ffn_gate_up_exps.weight"]
    rows = np.concatenate([kept[0], EXPERT + kept[0]], axis=1)
    assert np.array_equal(after, np.take_along_axis(fused, rows[:, :, None], axis=1))


BIAS_ONLY = {
    **{f"blk.1.ffn_{part}_exps.weight": None for part in ("gate", "up", "down")},
    "blk.1.ffn_gate_inp.weight": None,
    "blk.1.ffn_up_exps.bias": (EXPERTS, EXPERT),
}
SHARED = {"blk.0.ffn_up_shexp.weight": (EXPERT, 32)}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"keys": {}}, "no number of its header says that its experts have 64 neurons"),
    "other": ({"keys": {"expert_feed_forward_length": 32}}, "64 neurons and its expert_feed"),
    "list": ({"keys": {"expert_feed_forward_length": [64, 64]}}, "only one number for all layers"),
    "shared": (SHARED, "it has shared experts without expert_shared_feed_forward_length"),
    "lacking": ({"blk.1.ffn_down_exps.weight": None}, r"lacks the tensor 'blk\.1\.ffn_down_exps"),
    "stray": (BIAS_ONLY, r"lacks the tensor 'blk\.1\.ffn_down_exps"),
    "unequal": (
        {"blk.1.ffn_down_exps.weight": (EXPERTS, 32, 32)},
        "some of its experts have 32 neurons and some 64",
    ),
    "narrow": (
        {"blk.1.ffn_up_exps.weight": (EXPERTS, 32, 32)},
        r"'blk\.1\.ffn_up_exps\.weight' of shape \[32, 32, 16\] is not made of 16 experts of 64",
    ),
    "flat": ({"blk.1.ffn_up_exps.weight": (EXPERTS, EXPERT)}, "is not made of 16 experts"),
    "scales": ({"blk.1.ffn_up_exps.scale": (EXPERTS, 2)}, "more than one scale for each expert"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_become_thinner_is_refused_by_name(case: str) -> None:
    changes, reason = REFUSED[case]
    with pytest.raises(ModelError, match=reason):
        thin_layout_of([header(changes)])


def test_shared_experts_of_a_width_of_their_own_stay(tmp_path: Path) -> None:
    for name in ("deepseek-v3", "glm4moe"):
        with pytest.raises(ModelError, match="it has shared experts without"):
            thin_layout_of(source(name).headers)
    assert thin_layout_of(source("qwen2moe").headers).width == EXPERT
    with pytest.raises(ModelError, match="it has no experts"):
        thin_layout_of([scan(tiny_gguf(tmp_path / "dense.gguf").read_bytes())])


def test_experts_of_one_block_cannot_become_thinner() -> None:
    narrow = {f"blk.{layer}.ffn_down_exps.weight": (EXPERTS, 32, 256, Q4_K) for layer in range(2)}
    with pytest.raises(ModelError, match="256 neurons, which its quantisation keeps in blocks of"):
        thin_layout_of([header(wide(256) | narrow)])


def test_a_model_that_became_another_is_refused() -> None:
    layout, _ = layout_and_source("qwen3moe", "F32", 0)
    _, other = layout_and_source("qwen3moe", "Q8_0", 0)
    with pytest.raises(ModelError, match="its experts changed while it was read"):
        thin_file(other.headers, layout=layout, width=8, kept=lambda _: np.zeros((EXPERTS, 8), int))


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    column_bytes=st.integers(1, 9),
    bytes_max=st.integers(1, 200),
    seed=st.integers(0, 99),
)
def test_a_matrix_is_read_in_parts_of_bounded_size(
    rows: int, columns: int, column_bytes: int, bytes_max: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.integers(0, 256, (rows, columns, column_bytes), np.uint8)
    kept = np.sort(rng.permutation(columns)[: rng.integers(0, columns + 1)])
    whole = Cut(0, 5, rows, columns, column_bytes, kept)
    slabs = list(whole.slabs(bytes_max))
    assert all(slab.read_bytes <= max(bytes_max, column_bytes) for slab in slabs)
    assert [slab.start for slab in slabs[1:]] == [
        slab.start + slab.read_bytes for slab in slabs[:-1]
    ], "a file is read from its beginning to its end"
    data = bytes(5) + matrix.tobytes()
    taken = b"".join(slab.taken(data[slab.start :][: slab.read_bytes]) for slab in slabs)
    assert taken == matrix[:, kept].tobytes()
    assert len(taken) == whole.size_bytes


def test_the_key_of_a_thin_shard_is_model_ranking_and_width() -> None:
    digests = {
        thin_digest(ModelDigest("a" * 64), "r", 8),
        thin_digest(ModelDigest("b" * 64), "r", 8),
        thin_digest(ModelDigest("a" * 64), "s", 8),
        thin_digest(ModelDigest("a" * 64), "r", 16),
    }
    assert len(digests) == 4
