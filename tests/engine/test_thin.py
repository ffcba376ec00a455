"""Thin shards in the stock llama-server: files of every layout load and answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from p2pmesh.home import Home
from p2pmesh.models.importance import rank
from p2pmesh.models.slice import of_headers, write_planned
from p2pmesh.models.store import EMBEDDED as DEMO
from p2pmesh.models.store import Store
from p2pmesh.models.thin import thin_layout_of
from p2pmesh.models.thin_places import ThinPlaces
from tests.engine.samples import EMBEDDED
from tests.engine.test_shards import TOKENS, answer, assert_equal
from tests.models.layouts import moe_gguf

KINDS = gguf.GGMLQuantizationType
LAYOUTS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2moe": {},
    "qwen3moe": {},
    "gpt-oss": {},
    "qwen3moe F16": {"kind": KINDS.F16},
    "qwen3moe BF16": {"kind": KINDS.BF16},
    "qwen3moe Q8_0": {"kind": KINDS.Q8_0},
    "qwen3moe Q5_1": {"kind": KINDS.Q5_1},
    "gpt-oss MXFP4": {"kind": KINDS.MXFP4},
    "qwen3moe Q4_K": {"kind": KINDS.F16, "down": KINDS.Q4_K, "width": 512},
}
QUICK = ("gpt-oss", "qwen3moe Q4_K")  # biases; blocks of 256
EACH = [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in LAYOUTS]


def cut(path: Path, *, share: float) -> Path:
    """Write a thin shard beside a model, by random scores, and return its path."""
    store = Store(Home.at(path.parent / "home"), environ={})
    model = store.open(path)
    layout = of_headers(model, thin_layout_of)
    layers = sorted(layout.blocks)
    weights = {"any": [[1.0] * layout.experts] * len(layers)}
    ranking = rank(store.digest(model), "counts", layers, weights, ((),) * len(layers))
    shape = (len(layers), 1, layout.experts, layout.width)
    scores = np.random.default_rng(1).random(shape, np.float32)
    places = ThinPlaces(ranking, scores, layout)
    output = path.with_name(f"{path.stem}-thin.gguf")
    write_planned(model, places.plan(round(places.count * share)), output)
    return output


def made(layout: str, folder: Path) -> Path:
    return moe_gguf(folder / "model.gguf", layout.split(maxsplit=1)[0], **LAYOUTS[layout])


@pytest.mark.parametrize("layout", EACH)
async def test_a_thin_shard_of_every_layout_answers(layout: str, tmp_path: Path) -> None:
    shard = cut(made(layout, tmp_path), share=1 / 2)
    assert len(await answer(tmp_path, shard)) == TOKENS


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
async def test_a_shard_of_the_full_width_says_the_same(layout: str, tmp_path: Path) -> None:
    model = made(layout, tmp_path)
    shard = cut(model, share=1)
    assert_equal(await answer(tmp_path, shard), await answer(tmp_path, model))


async def test_a_thin_shard_of_the_small_model_answers_in_the_embedded_engine(
    tmp_path: Path,
) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(DEMO.read_bytes())
    shard = cut(model, share=3 / 4)
    assert shard.stat().st_size < model.stat().st_size
    assert len(await answer(tmp_path, shard, EMBEDDED)) == TOKENS
