"""The argument list of an engine for one model.

Pure: values in, strings out. Only flags that `p2pmesh.engine.embedded` understands as well; a
llama-server that lacks one of them (`needed_flags`) is not used. Secrets are not among them: the
API key goes through the environment (`environment_of`), where `ps` does not show it.

`--embeddings` does not forbid chat (b11434 answers both), but it needs a pooling type, reserves
logits for every row of a batch (hundreds of MB with a large vocabulary), and answers 400 on models
without pooling. So only embedding and rerank models get it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Literal, Protocol, get_args

from p2pmesh.errors import EngineError

Modality = Literal["chat", "completion", "embedding", "rerank"]

_MODALITIES: tuple[Modality, ...] = get_args(Modality)

# An embedding's input must fit into one physical batch, but no batch may eat the memory.
_EMBEDDING_BATCH_MAX = 8192

# What an engine may see of the environment: where programs, drivers and temporary files are, and
# which accelerators to use. Never LLAMA_ARG_*: those would quietly override the flags below.
_PASSED_ON = frozenset(
    {
        "PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TEMP", "TMP", "LD_LIBRARY_PATH",
        "DYLD_LIBRARY_PATH", "PYTHONPATH", "SYSTEMROOT", "SYSTEMDRIVE", "WINDIR", "USERPROFILE",
        "LOCALAPPDATA", "APPDATA", "PROGRAMDATA", "NUMBER_OF_PROCESSORS", "XDG_RUNTIME_DIR",
    }
)  # fmt: skip
_PASSED_ON_PREFIXES = ("CUDA_", "NVIDIA_", "HIP_", "ROCR_", "HSA_", "VK_", "GGML_", "OMP_")


# The output's activations are 16 times larger than those between layers. Models without
# `output.weight` use the embedding in its place. Anchored: `attn_output` is another tensor.
OUTPUT_ON_THE_HEAD = r"^(output|token_embd)\.weight$=CPU"


def engine_modality(gives: Collection[str]) -> Modality:
    """Return what to start an engine for, of all that a model gives; chat before the rest.

    Raises:
        EngineError: No engine can do any of it.
    """
    for modality in _MODALITIES:
        if modality in gives:
            return modality
    said = ", ".join(sorted(gives)) or "nothing that is known here"
    raise EngineError(f"no engine here serves a model that gives {said}")


class Command(Protocol):
    """The part of an engine that an argument list needs."""

    @property
    def command(self) -> tuple[str, ...]:
        """Return the words before the flags."""


@dataclass(frozen=True, slots=True)
class _Unnamed:
    """An engine without a command, for the flags alone."""

    command: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteStage:
    """One stage of a pipeline as its head sees it: an RPC server with one device.

    Attributes:
        endpoint: Where the head finds it, `127.0.0.1:1234`.
        layers: How many layers it computes, those after the stages before it.
    """

    endpoint: str
    layers: int

    def __post_init__(self) -> None:
        """A stage without layers is none."""
        assert self.layers > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One model as an engine is to serve it.

    Attributes:
        model_paths: The model's files in order; llama.cpp finds the rest from the first.
        alias: The name that the engine gives the model in its answers.
        modality: What the engine is started for; it does one thing at a time.
        context: Tokens of context, which the slots share: one request may use all of it.
        slots: Requests answered at the same time.
        host: Where to listen; loopback only.
        port: Where to listen; 0 lets the engine take a free one and say which.
        api_key: What callers must show; empty asks for none.
        devices: llama.cpp's device names to use; empty leaves the choice to the engine.
        threads: CPU threads; None leaves the choice to the engine.
        http_threads: Connections answered at the same time; None leaves the choice to the
            engine, which takes some more than slots. A connection keeps its thread while idle.
        stages: The other stages, in the order of layers, when this engine is the head of a
            pipeline: it computes the layers before theirs, and the output.
    """

    model_paths: tuple[PurePath, ...]
    alias: str
    modality: Modality = "chat"
    context: int = 4096
    slots: int = 1
    host: str = "127.0.0.1"
    port: int = 0
    api_key: str = field(default="", repr=False)
    devices: tuple[str, ...] = ()
    threads: int | None = None
    http_threads: int | None = None
    stages: tuple[RemoteStage, ...] = ()

    def __post_init__(self) -> None:
        """Our own callers get these right; a user's numbers are checked in `config`."""
        assert self.model_paths, "a launch needs a model"
        assert self.context > 0
        assert self.slots > 0
        assert "," not in self.api_key, "llama.cpp splits keys at commas"
        assert not (self.devices and self.stages), "the head of a pipeline computes on the CPU"


def server_argv(engine: Command, launch: Launch) -> list[str]:
    """The whole command line, the engine's own command first."""
    argv = [
        *engine.command,
        *("--model", str(launch.model_paths[0])),
        # A comma would make two aliases, and a dash at the front looks like a flag.
        *("--alias", launch.alias.replace(",", "_").lstrip("-") or "model"),
        *("--host", launch.host),
        *("--port", str(launch.port)),
        *("--ctx-size", str(launch.context)),
        *("--parallel", str(launch.slots)),
        "--kv-unified",
        "--offline",
        "--no-webui",
    ]
    if launch.modality in ("embedding", "rerank"):
        batch = str(min(launch.context, _EMBEDDING_BATCH_MAX))
        argv.append("--embeddings" if launch.modality == "embedding" else "--reranking")
        argv += ["--batch-size", batch, "--ubatch-size", batch]
    else:
        argv.append("--jinja")
    if launch.devices:
        argv += ["--device", ",".join(launch.devices)]
    if launch.threads is not None:
        argv += ["--threads", str(launch.threads)]
    if launch.http_threads is not None:
        argv += ["--threads-http", str(launch.http_threads)]
    if launch.stages:
        argv += head_flags(launch.stages)
    return argv


def head_flags(stages: Sequence[RemoteStage]) -> list[str]:
    """Return what makes a llama-server the head of these stages.

    llama.cpp counts the output as one more layer of the last device, and hands layers out from the
    end: `--n-gpu-layers` of all that the stages have and that one leaves the first layers here.
    """
    layers = [stage.layers for stage in stages]
    layers[-1] += 1
    return [
        # Before --device, which names what this flag makes known.
        *("--rpc", ",".join(stage.endpoint for stage in stages)),
        *("--device", ",".join(f"RPC{number}" for number in range(len(stages)))),
        *("--n-gpu-layers", str(sum(layers))),
        *("--tensor-split", ",".join(map(str, layers))),
        *("--override-tensor", OUTPUT_ON_THE_HEAD),
        *("--fit", "off"),  # layers are where the plan has them, or nowhere
        # Each change of conversation would fetch the old one's KV cache from the stages.
        *("--cache-ram", "0"),
        "--no-mmproj-offload",  # stages pass for GPUs
    ]


def needed_flags() -> frozenset[str]:
    """Return every flag that `server_argv` can write: what an engine has to know."""
    launches = (
        Launch(
            model_paths=(PurePath("model"),),
            alias="model",
            modality=modality,
            devices=("none",),
            threads=1,
            http_threads=1,
        )
        for modality in _MODALITIES
    )
    words = (word for launch in launches for word in server_argv(_Unnamed(), launch))
    return frozenset(word for word in words if word.startswith("--"))


def passed_on(environ: Mapping[str, str]) -> dict[str, str]:
    """The few variables that every engine gets."""
    passed = {
        name: value
        for name, value in environ.items()
        if name.upper() in _PASSED_ON or name.upper().startswith(_PASSED_ON_PREFIXES)
    }
    # Without it an aborting llama.cpp waits inside a debugger instead of ending.
    passed["GGML_NO_BACKTRACE"] = "1"
    return passed


def environment_of(launch: Launch, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of one launch's engine: those variables and its API key."""
    key = {"LLAMA_API_KEY": launch.api_key} if launch.api_key else {}
    return passed_on(environ) | key


def readable(argv: Sequence[str]) -> str:
    """A command line for a log: readable, on one line."""
    return " ".join(f"'{part}'" if " " in part else part for part in argv)
