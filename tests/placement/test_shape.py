from __future__ import annotations

from p2pmesh.models.cards import need_bytes
from p2pmesh.placement.shape import Shape, shape_of
from tests.placement.placement_strategies import MIB
from tests.state.builders import card

CARD = card(
    layers=4,
    layer_bytes=(1000, 1000, 1000, 1000),
    other_bytes=500,
    size_bytes=4600,
    kv_bytes_per_token=8,
    kv_layer_bytes=(2, 2, 2, 2),
    tensor_bytes_max=300,
)


def test_all_stages_together_take_what_the_model_takes_whole_and_their_buffers() -> None:
    shape = shape_of(CARD, context=512)
    assert shape.layer_bytes == (1000 + 2 * 512,) * 4
    assert shape.need(0, 3) == need_bytes(CARD, context=512)
    assert shape.need(0, 1) + shape.need(2, 3) == need_bytes(CARD, context=512) + shape.stage_bytes
    buffers = 512 * (4 * 8 * CARD.width + 2 * 512)
    assert shape.stage_bytes == buffers + 300 + 64 * MIB


def test_layers_in_a_row_are_made_one() -> None:
    shape = Shape((1, 2, 3, 4, 5), (10, 20, 30, 40, 50), 7, 8, 9)
    assert shape.in_steps(2) == Shape((3, 7, 5), (30, 70, 50), 7, 8, 9)
    assert shape.in_steps(1) == shape
    assert shape.in_steps(9).layer_bytes == (15,)
