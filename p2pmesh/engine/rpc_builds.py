"""The builds of llama.cpp whose RPC p2pmesh knows, and the sizes of what they say.

Pure. Operations and tensor types travel as raw enum numbers, so all parts of a pipeline run one
build, and only builds whose numbers were looked at are here. A version of the protocol alone says
too little: it does not change with every operation.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from p2pmesh.errors import EngineError

NUMBER = struct.Struct("<Q")
INDEX = struct.Struct("<I")
ALLOCATION = struct.Struct("<IQ")
REQUEST = struct.Struct("<BQ")
HELLO_BYTES = 24  # capabilities: transports other than TCP
FLAG_AND_OFFSET_BYTES = 9  # between a tensor's description and its data in SET_TENSOR


class Command(IntEnum):
    """What a head may ask; the numbers of protocol 7, and one that only p2pmesh knows."""

    ALLOC_BUFFER = 0
    GET_ALIGNMENT = 1
    GET_MAX_SIZE = 2
    BUFFER_GET_BASE = 3
    FREE_BUFFER = 4
    BUFFER_CLEAR = 5
    SET_TENSOR = 6
    SET_TENSOR_HASH = 7
    GET_TENSOR = 8
    COPY_TENSOR = 9
    GRAPH_COMPUTE = 10
    GET_DEVICE_MEMORY = 11
    INIT_TENSOR = 12
    GET_ALLOC_SIZE = 13
    HELLO = 14
    DEVICE_COUNT = 15
    GRAPH_RECOMPUTE = 16
    MEMSET_TENSOR = 17
    OFFER = 0xF0  # see `rpc_offers`; far from the numbers that llama.cpp may use next


@dataclass(frozen=True, slots=True, kw_only=True)
class RpcBuild:
    """What the RPC of one build of llama.cpp looks like: operations travel as raw enum numbers.

    Attributes:
        name: The build, as `Engine.version` names it.
        protocol: What its HELLO says: major, minor, patch.
        ops: The operations that a graph may have.
        types: The tensor types that it knows.
        tensor_bytes: The size of one tensor's description.
        tensor: Where type, buffer and operation stand in it.
        tensor_name: Where its name stands, filled up with zeros.
        sources: The sources of one tensor.
    """

    name: str
    protocol: tuple[int, int, int]
    ops: frozenset[int]
    types: frozenset[int]
    tensor_bytes: int
    tensor: struct.Struct
    tensor_name: slice
    sources: int


# Of ggml.h. The first four hold function pointers; the others are for training alone.
REFUSED_OPS_B11434: Mapping[str, int] = {
    "MAP_CUSTOM1": 92,
    "MAP_CUSTOM2": 93,
    "MAP_CUSTOM3": 94,
    "CUSTOM": 95,
    "CROSS_ENTROPY_LOSS": 96,
    "CROSS_ENTROPY_LOSS_BACK": 97,
    "OPT_STEP_ADAMW": 98,
    "OPT_STEP_SGD": 99,
}
_OPS_B11434 = frozenset(range(101)) - set(REFUSED_OPS_B11434.values())
# The numbers missing here were types once.
_TYPES_B11434 = frozenset(range(43)) - frozenset((4, 5, 31, 32, 33, 36, 37, 38))

_BUILDS = (
    RpcBuild(
        name="b11434",
        protocol=(7, 0, 0),
        ops=_OPS_B11434,
        types=_TYPES_B11434,
        tensor_bytes=296,
        tensor=struct.Struct("<8xIQ32xI240x"),
        tensor_name=slice(228, 292),
        sources=10,
    ),
)


def known_build(version: str, protocol: str | None) -> RpcBuild:
    """Return how an engine of this version (`b11434`) and RPC protocol (`7.0.0`) talks.

    Raises:
        EngineError: It cannot be a part of a pipeline, and why.
    """
    if protocol is None:
        raise EngineError(f"the engine {version} has no RPC server: p2pmesh engine install")
    for build in _BUILDS:
        if build.name == version and ".".join(map(str, build.protocol)) == protocol:
            return build
    known = ", ".join(build.name for build in _BUILDS)
    raise EngineError(
        f"pipelines need a build whose RPC is known here ({known}), not {version} with RPC "
        f"{protocol}: p2pmesh engine install"
    )


ANSWER_BYTES: Mapping[Command, int] = {
    Command.ALLOC_BUFFER: 16,
    Command.GET_ALIGNMENT: 8,
    Command.GET_MAX_SIZE: 8,
    Command.BUFFER_GET_BASE: 8,
    Command.SET_TENSOR_HASH: 1,
    Command.COPY_TENSOR: 1,
    Command.GET_DEVICE_MEMORY: 16,
    Command.GET_ALLOC_SIZE: 8,
    Command.HELLO: 28,
    Command.DEVICE_COUNT: 4,
}


def request_bytes(build: RpcBuild) -> Mapping[Command, int]:
    """Return the exact lengths of requests; SET_TENSOR, OFFER and GRAPH_COMPUTE have none."""
    tensor, number, index = build.tensor_bytes, NUMBER.size, INDEX.size
    return {
        Command.ALLOC_BUFFER: ALLOCATION.size,
        Command.GET_ALIGNMENT: index,
        Command.GET_MAX_SIZE: index,
        Command.BUFFER_GET_BASE: number,
        Command.FREE_BUFFER: number,
        Command.BUFFER_CLEAR: number + 1,
        Command.SET_TENSOR_HASH: tensor + 2 * number,
        Command.GET_TENSOR: tensor + 2 * number,
        Command.COPY_TENSOR: 2 * tensor,
        Command.GET_DEVICE_MEMORY: index,
        Command.INIT_TENSOR: tensor,
        Command.GET_ALLOC_SIZE: index + (1 + build.sources) * tensor,
        Command.HELLO: HELLO_BYTES,
        Command.DEVICE_COUNT: 0,
        Command.GRAPH_RECOMPUTE: index,
        Command.MEMSET_TENSOR: tensor + 2 * number + 1,
    }


def tensors_at(build: RpcBuild) -> Mapping[Command, range]:
    """Return where requests of exact lengths describe tensors."""
    tensor, index = build.tensor_bytes, INDEX.size
    return {
        Command.SET_TENSOR_HASH: range(1),
        Command.GET_TENSOR: range(1),
        Command.COPY_TENSOR: range(0, 2 * tensor, tensor),
        Command.INIT_TENSOR: range(1),
        Command.GET_ALLOC_SIZE: range(index, index + (1 + build.sources) * tensor, tensor),
        Command.MEMSET_TENSOR: range(1),
    }
