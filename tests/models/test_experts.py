"""Which experts a model has, and which lists make a shard."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.errors import ConfigError, ModelError
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.experts import (
    ExpertLayout,
    check_lists,
    first_experts,
    is_sliced,
    layout_of,
    ranges_text,
    same_experts,
    shard_digest,
)
from p2pmesh.models.gguf import Header
from p2pmesh.models.tensors import TensorInfo
from tests.models.layouts import EXPERTS, LAYOUTS, USED
from tests.models.sliced import source

PLAIN = ExpertLayout(count=16, used=4, groups=1, groups_used=1, layers=(0, 1), fixed_used=False)
GROUPED = replace(PLAIN, groups=4, groups_used=2)
DIGEST = ModelDigest("a" * 64)


def changed(layout: str, *, architecture: str = "", **keys: Any) -> list[Header]:
    """A model's header with other numbers; a key of None is removed."""
    (header,) = source(layout).headers
    before = str(header.metadata["general.architecture"])
    new = architecture or before
    metadata: dict[str, Any] = {
        key.replace(f"{before}.", f"{new}."): v for key, v in header.metadata.items()
    }
    metadata |= {"general.architecture": new} | {f"{new}.{k}": v for k, v in keys.items()}
    return [replace(header, metadata={k: v for k, v in metadata.items() if v is not None})]


def renamed(layout: str, before: str, after: str) -> list[Header]:
    (header,) = source(layout).headers
    tensors = tuple(replace(one, name=one.name.replace(before, after)) for one in header.tensors)
    return [replace(header, tensors=tensors)]


def refused(headers: list[Header], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        layout_of(headers)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_experts_of_each_layout(name: str) -> None:
    found = layout_of(source(name).headers)
    groups = (4, 2) if name == "deepseek-v3" else (1, 1)
    assert found == ExpertLayout(
        count=EXPERTS,
        used=USED,
        groups=groups[0],
        groups_used=groups[1],
        layers=tuple(range(LAYOUTS[name].dense_layers, 3)),
        fixed_used=False,
    )


def test_parts_are_read_together() -> None:
    parts = source("qwen3moe", split_tensors=7)
    assert len(parts.headers) > 1
    assert layout_of(parts.headers) == layout_of(source("qwen3moe").headers)


@pytest.mark.parametrize(
    ("name", "sliced"),
    [
        ("blk.3.ffn_gate_exps.weight", True),
        ("blk.3.ffn_gate_up_exps.weight", True),
        ("blk.3.ffn_down_exps.bias", True),
        ("blk.3.ffn_down_exps.scale", True),
        ("blk.3.ffn_up_exps.input_scale", True),
        ("blk.3.ffn_gate_inp.weight", True),
        ("blk.3.ffn_gate_inp.bias", True),
        ("blk.3.exp_probs_b.bias", True),
        ("blk.3.exp_probs_b", True),
        ("blk.3.exp_probs_b_vl.bias", True),
        ("blk.3.ffn_down_shexp.weight", False),
        ("blk.3.ffn_gate_inp_shexp.weight", False),
        ("blk.3.ffn_norm_exps.weight", False),
        ("blk.3.ffn_gate.weight", False),
        ("token_embd.weight", False),
    ],
)
def test_the_tensors_that_count_experts(name: str, *, sliced: bool) -> None:
    assert is_sliced(name) is sliced


@pytest.mark.parametrize("name", ["blk.3.ffn_gate_chexps.weight", "blk.3.ffn_up_exps.zero"])
def test_unknown_tensors_about_experts_are_refused_by_name(name: str) -> None:
    with pytest.raises(ModelError, match=name):
        is_sliced(name)


@pytest.mark.parametrize(
    ("architecture", "words"),
    [("deepseek4", "deepseek4 has tables"), ("grovemoe", "grovemoe has chunk experts")],
)
def test_architectures_of_which_no_shard_is_right_are_refused(
    architecture: str, words: str
) -> None:
    refused(changed("qwen3moe", architecture=architecture), words)


def test_llama4_is_refused_where_its_norms_follow_from_the_count() -> None:
    refused(changed("qwen3moe", architecture="llama4", expert_count=128), "llama4 of 128 experts")
    assert layout_of(changed("qwen3moe", architecture="llama4")).count == EXPERTS


def test_what_does_not_fit_together_is_refused() -> None:
    refused(changed("qwen3moe", expert_count=8), "is not made of 8 experts")
    refused(changed("qwen3moe", expert_count=None), "is not made of 0 experts")
    refused(changed("qwen3moe", expert_used_count=17), "uses 17 of 16 experts")
    refused(changed("qwen3moe", expert_used_count=None), "uses 0 of 16 experts")
    refused(changed("qwen3moe", expert_used_count=(4, 4, 4, -1)), "expert_used_count is -1")
    refused(changed("deepseek-v3", expert_group_count=5), "16 experts in 5 groups")
    refused(changed("deepseek-v3", expert_group_used_count=4), "and uses 4 of them")
    refused(renamed("qwen3moe", "ffn_gate_inp", "ffn_gate_out"), "experts without a router")
    refused(renamed("qwen3moe", "_exps.", ".0."), "stored in a way that is not known")


def test_a_model_without_experts_is_refused() -> None:
    (header,) = changed("qwen3moe", expert_count=None, expert_used_count=None)
    dense = tuple(t for t in header.tensors if not is_sliced(t.name))
    refused([replace(header, tensors=dense)], "it has no experts")


def test_a_number_for_each_layer_stays_one() -> None:
    layout = layout_of(changed("qwen3moe", expert_used_count=(2, 4, 8, 8)))
    assert layout.used == (2, 4, 8, 8)
    assert layout.used_of(5) == (2, 4, 5, 5)


def test_where_widths_follow_from_the_experts_used_these_stay() -> None:
    headers = changed("qwen2moe", expert_feed_forward_length=None, feed_forward_length=4 * 64)
    layout = layout_of(headers)
    assert layout.fixed_used
    assert check_lists(layout, first_experts(layout, 4)) == 4
    with pytest.raises(ConfigError, match="needs 4 experts"):
        first_experts(layout, 3)


def test_experts_used_never_exceed_those_that_can_be_chosen() -> None:
    assert [PLAIN.used_of(kept) for kept in (2, 4, 5)] == [2, 4, 4]
    assert GROUPED.used_of(8) == 4
    assert replace(GROUPED, used=8).used_of(12) == 6


@pytest.mark.parametrize(
    ("layout", "lists", "words"),
    [
        (PLAIN, {0: [1, 2]}, "No list for layer 1; the layers with experts are 0-1"),
        (PLAIN, {0: [1, 2], 1: [1, 2], 7: [1, 2]}, "A list for layer 7"),
        (PLAIN, {0: [1, 2], 1: [1, 2, 3]}, "Layer 0 would keep 2 experts and layer 1 3"),
        (PLAIN, {0: [1, 2], 1: [1, 16]}, "There is no expert 16 in layer 1: they are 0 to 15"),
        (PLAIN, {0: [1, 2], 1: [-1, 2]}, "There is no expert -1 in layer 1"),
        (PLAIN, {0: [1, 2], 1: [3, 3]}, "Expert 3 of layer 1 is named twice"),
        (PLAIN, {0: [1], 1: [1]}, "at least 2 experts"),
        (PLAIN, {0: [], 1: []}, "at least 2 experts"),
        (GROUPED, {0: range(6), 1: range(6)}, "at least 2: 8, 12, ... but not 6"),
        (GROUPED, {0: range(4), 1: range(4)}, "but not 4"),
        (GROUPED, {0: range(8), 1: range(8)}, "Layer 0 has 4 groups of 4 experts"),
        (
            GROUPED,
            dict.fromkeys((0, 1), (0, 4, 1, 5, 8, 9, 12, 13)),
            "those of one group one after the other",
        ),
    ],
)
def test_bad_lists_are_refused(layout: ExpertLayout, lists: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_lists(layout, lists)


def test_groups_may_change_places() -> None:
    order = [4, 7, 0, 1, 12, 13, 8, 9]
    assert check_lists(GROUPED, same_experts(GROUPED, order)) == 8


def test_the_first_experts_of_each_group_are_kept() -> None:
    assert first_experts(PLAIN, 3) == {0: (0, 1, 2), 1: (0, 1, 2)}
    assert first_experts(GROUPED, 8)[0] == (0, 1, 4, 5, 8, 9, 12, 13)
    with pytest.raises(ConfigError, match="Each layer has 16 experts; 17 cannot be kept"):
        first_experts(PLAIN, 17)
    with pytest.raises(ConfigError, match="at least 2 experts"):
        first_experts(PLAIN, 0)


def test_the_digest_names_model_ranking_lists_and_their_order() -> None:
    digests = {
        shard_digest(DIGEST, "", {0: [1, 2], 1: [3, 4]}),
        shard_digest(DIGEST, "", {0: [2, 1], 1: [3, 4]}),
        shard_digest(DIGEST, "", {1: [1, 2], 2: [3, 4]}),
        shard_digest(DIGEST, "r", {0: [1, 2], 1: [3, 4]}),
        shard_digest(ModelDigest("b" * 64), "", {0: [1, 2], 1: [3, 4]}),
    }
    assert len(digests) == 5
    assert shard_digest(DIGEST, "", {1: (3, 4), 0: (1, 2)}) in digests


@given(st.sets(st.integers(0, 40)))
def test_ranges_can_be_read_back(numbers: set[int]) -> None:
    text = ranges_text(sorted(numbers))
    runs = [part.split("-") for part in text.split(",") if part]
    assert [n for run in runs for n in range(int(run[0]), int(run[-1]) + 1)] == sorted(numbers)


def test_tensors_without_a_layer_are_no_experts() -> None:
    (header,) = source("qwen3moe").headers
    extra = TensorInfo(name="ffn_gate_inp.weight", shape=(8,), type=0, offset=0, size_bytes=32)
    layout = layout_of([replace(header, tensors=(*header.tensors, extra))])
    assert layout.layers == (0, 1, 2)
