"""Which line of an engine that ends is shown."""

from __future__ import annotations

import pytest

from p2pmesh.engine.exit_reason import exit_reason

B11434 = [
    "0.00.178.264 I srv          init: loading model",
    "0.00.178.334 E gguf_init_from_file: failed to open GGUF file '/x' (No such file or directory)",
    "0.00.178.449 E llama_model_load: error loading model: failed to load model from /x",
    "0.00.178.497 E srv    load_model: failed to load model, '/x'",
    "0.00.178.499 I srv    operator(): operator(): cleaning up before exit...",
]
OLDER = [
    "main: loading model",
    "llama_model_load: error loading model: unknown model architecture: 'novel'",
    "srv    load_model: failed to load model, '/x'",
]


@pytest.mark.parametrize(
    ("lines", "code", "expected"),
    [
        (
            B11434,
            1,
            "failed to open GGUF file '/x' (No such file or directory) (it ended with exit code 1)",
        ),
        (
            OLDER,
            1,
            "error loading model: unknown model architecture: 'novel' (it ended with exit code 1)",
        ),
        (
            ["0.00.1.1 I fine", "/src/ggml.c:12: GGML_ASSERT(x) failed"],
            -6,
            "/src/ggml.c:12: GGML_ASSERT(x) failed (it aborted)",
        ),
        (["all is well"], -9, "it was killed, perhaps for want of memory"),
        ([], -99, "it was ended by signal 99"),
        ([], None, "it disappeared"),
        ([], 0, "it ended with exit code 0"),
    ],
)
def test_exit_reason(lines: list[str], code: int | None, expected: str) -> None:
    assert exit_reason(lines, code) == expected


def test_an_endless_line_is_cut() -> None:
    assert len(exit_reason(["error " + "x" * 10_000], 1)) < 400
