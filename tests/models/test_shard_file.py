"""The bytes of expert shards, against the model that they come from."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmesh.errors import ConfigError, ModelError
from p2pmesh.models.experts import ExpertLists, first_experts, layout_of, same_experts
from p2pmesh.models.gguf import scan
from p2pmesh.models.shard_file import Span, shard_file
from tests.models.builders import DEADLINE_MS, tiny_gguf
from tests.models.layouts import EXPERTS, LAYOUTS, moe_gguf
from tests.models.sliced import Source, assert_kept, cut, source, tensors

KINDS = [kind for kind in gguf.GGMLQuantizationType if kind.name in {"Q8_0", "Q4_0", "BF16", "F16"}]


@st.composite
def models_and_lists(draw: st.DrawFn) -> tuple[Source, ExpertLists]:
    name = draw(st.sampled_from(sorted(LAYOUTS)))
    model = source(name, split_tensors=draw(st.sampled_from([0, 5])))
    layout = layout_of(model.headers)
    size = EXPERTS // layout.groups
    share = draw(st.integers(2, size))
    group = st.permutations(range(size)).map(lambda order: order[:share])
    lists = {
        layer: tuple(
            place * size + expert
            for place in draw(st.permutations(range(layout.groups)))
            for expert in draw(group)
        )
        for layer in layout.layers
    }
    return model, lists


@given(models_and_lists())
@settings(deadline=DEADLINE_MS)
def test_every_kept_expert_has_the_bytes_of_the_model(made: tuple[Source, ExpertLists]) -> None:
    model, lists = made
    shard = cut(model, lists)
    assert_kept(model, shard, lists)
    before, after = layout_of(model.headers), layout_of(shard.headers)
    assert after.count == len(lists[before.layers[0]])
    assert after.used == before.used_of(after.count)
    assert (after.layers, after.groups) == (before.layers, before.groups)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split_tensors", [0, 5])
def test_experts_are_kept_in_every_quantisation(
    kind: gguf.GGMLQuantizationType, split_tensors: int
) -> None:
    model = source("qwen3moe", kind=kind, split_tensors=split_tensors)
    lists = {0: (3, 1), 1: (15, 0), 2: (7, 8)}
    assert_kept(model, cut(model, lists), lists)


@pytest.mark.parametrize("kind", gguf.GGML_QUANT_SIZES)
def test_experts_are_kept_in_every_type_that_there_is(
    kind: gguf.GGMLQuantizationType, tmp_path: Path
) -> None:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    row = np.random.default_rng(1).integers(0, 256, (EXPERTS, 3, 2 * block_bytes), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3moe")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(2)
    writer.add_tensor("blk.0.ffn_gate_inp.weight", np.ones((EXPERTS, 64), np.float32))
    writer.add_tensor("blk.0.ffn_down_exps.weight", row, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = (tmp_path / "m.gguf").read_bytes()
    shard = tensors(cut(Source((data,), (scan(data),)), {0: (9, 4, 12)}))
    assert shard["blk.0.ffn_down_exps.weight"] == (
        (2 * block, 3, 3),
        kind,
        row[[9, 4, 12]].tobytes(),
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_full_set_in_its_order_is_the_model(name: str) -> None:
    model = source(name)
    shard = cut(model, first_experts(layout_of(model.headers), EXPERTS))
    assert tensors(shard) == tensors(model)
    assert shard.headers[0].metadata == model.headers[0].metadata


def test_of_the_metadata_only_the_numbers_of_experts_change() -> None:
    model = source("deepseek-v3", split_tensors=5)
    shard = cut(model, first_experts(layout_of(model.headers), 8))
    before, after = dict(model.headers[0].metadata), dict(shard.headers[0].metadata)
    assert [key for key in before if key not in after] == [
        "split.no",
        "split.count",
        "split.tensors.count",
    ]
    changed = {key: value for key, value in after.items() if before[key] != value}
    assert changed == {"deepseek2.expert_count": 8}
    assert list(after) == [key for key in before if key in after]


def test_experts_used_are_clamped_where_fewer_stay() -> None:
    model = source("qwen3moe")
    shard = cut(model, first_experts(layout_of(model.headers), 3))
    assert shard.headers[0].metadata["qwen3moe.expert_used_count"] == 3


def test_a_list_of_experts_used_keeps_its_type_and_length(tmp_path: Path) -> None:
    data = moe_gguf(
        tmp_path / "m.gguf", "qwen3moe", keys={"expert_used_count": [2, 4, 3]}
    ).read_bytes()
    shard = cut(Source((data,), (scan(data),)), same_experts(layout_of([scan(data)]), (5, 6, 7)))
    assert shard.headers[0].metadata["qwen3moe.expert_used_count"] == (2, 3, 3)


def test_the_size_is_known_before_and_ranges_that_meet_are_one() -> None:
    model = source("qwen3moe")
    layout = layout_of(model.headers)
    whole = shard_file(model.headers, first_experts(layout, EXPERTS))
    assert whole.size_bytes == len(cut(model, first_experts(layout, EXPERTS)).files[0])
    spans = [piece for piece in whole.pieces() if isinstance(piece, Span)]
    # The numbers of experts interrupt the header; all tensors lie one behind the other.
    assert len(spans) <= 4
    assert all(piece for piece in whole.pieces() if isinstance(piece, bytes))


def test_another_reader_finds_the_same(tmp_path: Path) -> None:
    model = source("gpt-oss")
    (tmp_path / "shard.gguf").write_bytes(cut(model, same_experts(PLAIN, (9, 2, 4, 0))).files[0])
    (tmp_path / "model.gguf").write_bytes(model.files[0])
    shard = {one.name: one for one in gguf.GGUFReader(tmp_path / "shard.gguf").tensors}
    for one in gguf.GGUFReader(tmp_path / "model.gguf").tensors:
        rows = [9, 2, 4, 0] if "_exps" in one.name or "gate_inp" in one.name else slice(None)
        assert (shard[one.name].data == one.data[rows]).all()


PLAIN = layout_of(source("gpt-oss").headers)


def test_bad_lists_and_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="named twice"):
        shard_file(source("gpt-oss").headers, same_experts(PLAIN, (1, 1)))
    dense = scan(tiny_gguf(tmp_path / "dense.gguf").read_bytes())
    with pytest.raises(ModelError, match="it has no experts"):
        shard_file([dense], {})
