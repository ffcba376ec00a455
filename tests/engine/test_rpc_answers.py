"""A pipeline answers what one engine answers, to the last digit of its log probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.engine.pipelines import Pipeline, pipeline
from tests.engine.samples import MODEL
from tests.models.builders import tiny_gguf

TURNS = (
    "Once upon a time",
    "Once upon a time there was a small village by the sea, and in it",
    "Once upon a time there was a small village by the sea, and in it lived a fisherman who",
)


def dense(folder: Path) -> Path:
    return tiny_gguf(folder / "dense.gguf", layers=6, half=True)


def demo(folder: Path) -> Path:
    return MODEL


async def say(one: Pipeline, prompt: str, **more: object) -> tuple[str, Any]:
    """The text that follows a prompt, with its log probabilities."""
    choice = await one.choice(prompt=prompt, logprobs=3, **more)
    return choice["text"], choice["logprobs"]


async def at_once(one: Pipeline, prompts: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """What follows each prompt when all are asked at the same time."""
    said: dict[str, tuple[str, Any]] = {}

    async def ask(prompt: str) -> None:
        said[prompt] = await say(one, prompt, max_tokens=48)

    async with trio.open_nursery() as nursery:
        for prompt in prompts:
            nursery.start_soon(ask, prompt)
    return said


@pytest.mark.parametrize(
    "layers",
    [
        (2, 2),
        pytest.param((3,), marks=pytest.mark.full),
        pytest.param((2, 1, 1), marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("model", [dense, pytest.param(demo, marks=pytest.mark.full)])
async def test_stages_answer_as_one_engine_does(
    tmp_path: Path, model: Any, layers: tuple[int, ...]
) -> None:
    file = model(tmp_path)
    long = "The quick brown fox jumps over the lazy dog. " * 15
    answers = []
    for folder, split in ((tmp_path / "alone", ()), (tmp_path / "split", layers)):
        async with pipeline(folder, split, model=file) as one:
            turns = [await say(one, prompt) for prompt in TURNS]  # the second finds the first's
            answers.append([*turns, await say(one, long), await say(one, TURNS[0])])
    assert answers[0] == answers[1]
    assert answers[0][0][0] == answers[0][-1][0]
    assert all(text for text, _ in answers[0])


@pytest.mark.full
async def test_two_clients_at_once_get_what_each_gets_alone(tmp_path: Path) -> None:
    async with pipeline(tmp_path, (2, 2), model=dense(tmp_path)) as split:
        alone = {prompt: (await say(split, prompt, max_tokens=48))[0] for prompt in TURNS[1:]}
        together = await at_once(split, TURNS[1:])
    assert {prompt: text for prompt, (text, _) in together.items()} == alone
