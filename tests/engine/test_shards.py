"""Expert shards in the stock llama-server: files of every layout load and answer."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import gguf
import pytest
import trio

from p2pmesh.engine.find import SERVER
from p2pmesh.engine.supervisor import EngineStatus
from p2pmesh.home import Home
from p2pmesh.models.experts import first_experts, same_experts
from p2pmesh.models.slice import read_layout, write_shard
from p2pmesh.models.store import EMBEDDED as DEMO
from p2pmesh.models.store import Store
from tests.engine.samples import EMBEDDED, native
from tests.engine.supervised import DEADLINE_S, is_ready, supervised, tiny
from tests.models.layouts import LAYOUTS, moe_gguf

TOKENS = 16
NEAR_TIE = 0.05  # nats; experts in another order are added in another order, which moved 0.013
QUICK = ("deepseek-v3", "gpt-oss")  # groups, shared experts and a dense layer; biases


def cut(path: Path, *, keep: int | Sequence[int]) -> Path:
    """Write a shard beside a model and return its path."""
    model = Store(Home.at(path.parent / "home"), environ={}).open(path)
    layout = read_layout(model)
    lists = first_experts(layout, keep) if isinstance(keep, int) else same_experts(layout, keep)
    output = path.with_name(f"{path.stem}-shard.gguf")
    write_shard(model, lists, output)
    return output


class Step(NamedTuple):
    """A token of an answer, and by how much the model preferred it to the next best, in nats."""

    token: int
    margin: float


async def answer(folder: Path, model: Path, command: tuple[str, ...] | None = None) -> list[Step]:
    """Return what an engine, stock llama-server at first, says on this model at temperature 0."""
    command = command or (str(native() / SERVER),)
    async with supervised(folder, tiny(command, model=model)) as watched:
        status = await watched.wait(is_ready)
        return await trio.to_thread.run_sync(complete, status)


def complete(status: EngineStatus) -> list[Step]:
    body = {
        "prompt": "The capital of",
        "n_predict": TOKENS,
        "temperature": 0,
        "n_probs": 2,
        "cache_prompt": False,
    }
    request = urllib.request.Request(
        f"http://{status.host}:{status.port}/completion",
        data=json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {status.api_key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=DEADLINE_S) as reply:
        steps = json.load(reply)["completion_probabilities"]
    tops = [[one["logprob"] for one in step["top_logprobs"]] for step in steps]
    return [Step(step["id"], best - next_) for step, (best, next_) in zip(steps, tops, strict=True)]


def assert_equal(one: list[Step], other: list[Step]) -> None:
    """The same tokens, up to one that is nearly as good as another."""
    for left, right in zip(one, other, strict=True):
        if left.token != right.token:
            assert min(left.margin, right.margin) < NEAR_TIE
            return
        assert abs(left.margin - right.margin) < NEAR_TIE


async def test_a_shard_of_the_small_model_answers_in_the_embedded_engine(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(DEMO.read_bytes())
    shard = cut(model, keep=8)
    assert len(await answer(tmp_path, shard, EMBEDDED)) == TOKENS


@pytest.mark.parametrize(
    "layout",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in LAYOUTS],
)
async def test_a_shard_of_every_layout_answers(layout: str, tmp_path: Path) -> None:
    shard = cut(moe_gguf(tmp_path / "model.gguf", layout), keep=8)
    assert len(await answer(tmp_path, shard)) == TOKENS


@pytest.mark.full
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
async def test_a_shard_with_fewer_experts_than_were_used_answers(
    layout: str, tmp_path: Path
) -> None:
    grouped = layout == "deepseek-v3"
    shard = cut(moe_gguf(tmp_path / "model.gguf", layout), keep=8 if grouped else 2)
    assert len(await answer(tmp_path, shard)) == TOKENS


@pytest.mark.full
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "MXFP4"])
async def test_a_shard_of_quantised_experts_answers(kind: str, tmp_path: Path) -> None:
    number = gguf.GGMLQuantizationType[kind]
    shard = cut(moe_gguf(tmp_path / "model.gguf", "qwen3moe", kind=number), keep=5)
    assert len(await answer(tmp_path, shard)) == TOKENS


@pytest.mark.full
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
async def test_all_experts_in_another_order_say_the_same(layout: str, tmp_path: Path) -> None:
    """Equal up to rounding. The order changes within groups."""
    model = moe_gguf(tmp_path / "model.gguf", layout)
    order = [group + at for group in range(0, 16, 4) for at in (2, 0, 3, 1)]
    shard = cut(model, keep=order)
    assert_equal(await answer(tmp_path, shard), await answer(tmp_path, model))


@pytest.mark.full
async def test_a_trained_model_with_its_experts_in_another_order_says_the_same(
    tmp_path: Path,
) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(DEMO.read_bytes())
    shard = cut(model, keep=range(15, -1, -1))
    assert_equal(await answer(tmp_path, shard), await answer(tmp_path, model))
