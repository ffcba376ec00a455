"""What a row of the tensor table may claim, against the gguf package's own arithmetic."""

from __future__ import annotations

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmesh.errors import ModelError
from p2pmesh.models.tensors import TensorInfo, check_layout, layer_of, tensor_bytes, type_name
from tests.models.builders import DEADLINE_MS


def row(name: str, offset: int, size_bytes: int) -> TensorInfo:
    return TensorInfo(name=name, shape=(1,), type=0, offset=offset, size_bytes=size_bytes)


@pytest.mark.parametrize("kind", list(gguf.GGMLQuantizationType))
def test_sizes_are_those_of_the_gguf_package(kind: gguf.GGMLQuantizationType) -> None:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    assert tensor_bytes("t", (block * 2, 3), int(kind)) == 6 * block_bytes
    assert type_name(int(kind)) == kind.name


def test_a_tensor_without_dimensions_is_one_number() -> None:
    assert tensor_bytes("t", (), 0) == 4
    assert row("t", 0, 4).elements == 1


def test_an_empty_tensor_has_no_bytes() -> None:
    assert tensor_bytes("t", (32, 0), 8) == 0


def test_types_that_were_removed_are_unknown() -> None:
    with pytest.raises(ModelError, match="unknown type 31"):
        tensor_bytes("t", (32,), 31)
    assert type_name(31) == "type 31"


@given(st.lists(st.integers(2**32, 2**64 - 1), min_size=2, max_size=4))
@settings(deadline=DEADLINE_MS)
def test_products_that_overflow_are_refused(shape: list[int]) -> None:
    with pytest.raises(ModelError, match="elements"):
        tensor_bytes("t", tuple(shape), 0)


def test_tensors_may_lie_in_any_order_and_with_gaps() -> None:
    tensors = (row("b", 64, 4), row("a", 0, 32), row("empty", 32, 0))
    check_layout(tensors, 32, 68)
    with pytest.raises(ModelError, match="tensor 'b'"):
        check_layout(tensors, 32, 67)


def test_the_last_byte_counts() -> None:
    with pytest.raises(ModelError, match="1 bytes are missing"):
        check_layout((row("a", 32, 5),), 32, 36)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("blk.0.attn_q.weight", 0),
        ("blk.12.ffn_up_exps.weight", 12),
        ("output.weight", None),
        ("l_out-3", None),
        ("v.blk.3.ln1.weight", None),
        ("blk.", None),
    ],
)
def test_names_tell_the_layer(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer
