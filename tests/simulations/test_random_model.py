from __future__ import annotations

from pathlib import Path

from p2pmesh.models.cards import card_of
from p2pmesh.models.store import read_header
from simulations.random_model import Sizes, write_model

SMALL = Sizes(layers=3, width=128, feed_forward=256, vocabulary=512)


def test_a_model_has_the_sizes_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "random.gguf"
    write_model(path, SMALL)
    card = card_of([read_header(path)])
    assert (card.layers, card.width, card.vocabulary) == (3, 128, 512)
    assert card.quantisation == "F16"
    assert "chat" in card.gives
    matrices_bytes = 2 * (4 * 128 * 128 + 3 * 128 * 256)
    assert card.layer_bytes == (matrices_bytes + 2 * 4 * 128,) * 3


def test_equal_sizes_give_equal_files(tmp_path: Path) -> None:
    write_model(tmp_path / "one.gguf", SMALL)
    write_model(tmp_path / "two.gguf", SMALL)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
