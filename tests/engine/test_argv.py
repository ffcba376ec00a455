"""Launches and the command lines that come of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

import pytest

from p2pmesh.engine.argv import (
    OUTPUT_ON_THE_HEAD,
    Launch,
    RemoteStage,
    environment_of,
    needed_flags,
    passed_on,
    readable,
    server_argv,
)


@dataclass(frozen=True)
class Fake:
    command: tuple[str, ...] = ("/opt/llama-server",)


ENGINE = Fake()
MODEL = PurePosixPath("/models/a-00001-of-00002.gguf")
SECOND = PurePosixPath("/models/a-00002-of-00002.gguf")
COMMON = [
    "/opt/llama-server", "--model", str(MODEL), "--alias", "a", "--host", "127.0.0.1",
    "--port", "0", "--ctx-size", "4096", "--parallel", "2", "--kv-unified", "--offline",
    "--no-webui",
]  # fmt: skip


@pytest.mark.parametrize(
    ("launch", "rest"),
    [
        (Launch(model_paths=(MODEL, SECOND), alias="a", slots=2), ["--jinja"]),
        (
            Launch(model_paths=(MODEL,), alias="a", slots=2, modality="completion"),
            ["--jinja"],
        ),
        (
            Launch(model_paths=(MODEL,), alias="a", slots=2, modality="embedding"),
            ["--embeddings", "--batch-size", "4096", "--ubatch-size", "4096"],
        ),
        (
            Launch(model_paths=(MODEL,), alias="a", slots=2, modality="rerank"),
            ["--reranking", "--batch-size", "4096", "--ubatch-size", "4096"],
        ),
        (
            Launch(model_paths=(MODEL,), alias="a", slots=2, devices=("CUDA0", "CUDA1")),
            ["--jinja", "--device", "CUDA0,CUDA1"],
        ),
        (
            Launch(
                model_paths=(MODEL,),
                alias="a",
                slots=2,
                devices=("none",),
                threads=6,
                http_threads=9,
            ),
            ["--jinja", "--device", "none", "--threads", "6", "--threads-http", "9"],
        ),
    ],
    ids=["chat", "completion", "embedding", "rerank", "two devices", "cpu"],
)
def test_flags(launch: Launch, rest: list[str]) -> None:
    assert server_argv(ENGINE, launch) == COMMON + rest


def test_the_head_of_a_pipeline_gets_its_stages_and_keeps_the_output() -> None:
    stages = (
        RemoteStage(endpoint="127.0.0.1:1001", layers=5),
        RemoteStage(endpoint="127.0.0.1:1002", layers=7),
    )
    argv = server_argv(ENGINE, Launch(model_paths=(MODEL,), alias="a", slots=2, stages=stages))
    assert argv == [
        *(*COMMON, "--jinja", "--rpc", "127.0.0.1:1001,127.0.0.1:1002", "--device", "RPC0,RPC1"),
        *("--n-gpu-layers", "13", "--tensor-split", "5,8"),
        *("--override-tensor", r"^(output|token_embd)\.weight$=CPU", "--fit", "off"),
        *("--cache-ram", "0", "--no-mmproj-offload"),
    ]


@pytest.mark.parametrize("tensor", ["output.weight", "token_embd.weight"])
def test_the_output_is_what_stays(tensor: str) -> None:
    pattern, _, where = OUTPUT_ON_THE_HEAD.partition("=")
    assert where == "CPU"
    assert re.search(pattern, tensor)
    assert not re.search(pattern, f"blk.0.attn_{tensor}")


def test_the_needed_flags_are_all_that_are_ever_written() -> None:
    assert needed_flags() == {
        "--model", "--alias", "--host", "--port", "--ctx-size", "--parallel", "--kv-unified",
        "--offline", "--no-webui", "--jinja", "--embeddings", "--reranking", "--batch-size",
        "--ubatch-size", "--device", "--threads", "--threads-http",
    }  # fmt: skip


def test_a_long_context_does_not_make_a_huge_embedding_batch() -> None:
    launch = Launch(model_paths=(MODEL,), alias="a", modality="embedding", context=131072)
    argv = server_argv(ENGINE, launch)
    assert argv[argv.index("--ubatch-size") + 1] == "8192"
    assert argv[argv.index("--ctx-size") + 1] == "131072"


@pytest.mark.parametrize(
    ("alias", "given"), [("a,b", "a_b"), ("--help", "help"), ("a-b", "a-b"), ("--", "model")]
)
def test_an_alias_is_neither_two_nor_a_flag(alias: str, given: str) -> None:
    argv = server_argv(ENGINE, Launch(model_paths=(MODEL,), alias=alias))
    assert argv[argv.index("--alias") + 1] == given


def test_the_key_goes_through_the_environment_alone() -> None:
    launch = Launch(model_paths=(MODEL,), alias="a", api_key="s3cret")
    assert not any("s3cret" in part for part in server_argv(ENGINE, launch))
    assert "s3cret" not in repr(launch)
    assert environment_of(launch, {})["LLAMA_API_KEY"] == "s3cret"


def test_the_environment_is_minimal() -> None:
    environ = {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "1",
        "HSA_OVERRIDE_GFX_VERSION": "10.3.0",
        "SystemRoot": "C:\\Windows",
        "LLAMA_ARG_CTX_SIZE": "1",
        "LLAMA_API_KEY": "the user's own",
        "AWS_SECRET_ACCESS_KEY": "x",
        "LD_PRELOAD": "x",
    }
    assert passed_on(environ) == {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "1",
        "HSA_OVERRIDE_GFX_VERSION": "10.3.0",
        "SystemRoot": "C:\\Windows",
        "GGML_NO_BACKTRACE": "1",
    }


def test_a_command_line_can_be_read() -> None:
    assert readable(["a", "b c"]) == "a 'b c'"
