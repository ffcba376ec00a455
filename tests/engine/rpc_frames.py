"""Frames of llama.cpp's RPC, made without an engine, and a stage that answers them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from p2pmesh.engine.rpc_builds import ANSWER_BYTES, Command, known_build, request_bytes
from p2pmesh.engine.rpc_filter import Allowance, RpcFilter

BUILD = known_build("b11434", "7.0.0")
MB = 1 << 20
F32, MUL_MAT, MAP_CUSTOM1 = 0, 29, 92
CAPS = b"\x01" * 24
HELLO_ANSWER = bytes((7, 0, 0, 0)) + CAPS
BUFFER = 0x7F00_0000_1000


def request(command: int, payload: bytes = b"") -> bytes:
    return struct.pack("<BQ", command, len(payload)) + payload


def answer(payload: bytes) -> bytes:
    return struct.pack("<Q", len(payload)) + payload


def number(value: int) -> bytes:
    return value.to_bytes(8, "little")


def index(value: int) -> bytes:
    return value.to_bytes(4, "little")


def tensor(*, kind: int = F32, op: int = 0, buffer: int = BUFFER, name: bytes = b"t") -> bytes:
    head = struct.pack("<QIQ4I4II", 1, kind, buffer, 8, 1, 1, 1, 4, 32, 32, 32, op)
    return head.ljust(228, b"\0") + name.ljust(64, b"\0") + index(0)


def set_tensor(data: bytes, *, flag: int = 0, description: bytes = b"") -> bytes:
    return request(
        Command.SET_TENSOR, (description or tensor()) + bytes((flag,)) + number(0) + data
    )


def graph(*tensors: bytes, nodes: int = 1, device: int = 0) -> bytes:
    ids = b"".join(number(n + 1) for n in range(nodes))
    payload = index(device) + index(nodes) + ids + index(len(tensors)) + b"".join(tensors)
    return request(Command.GRAPH_COMPUTE, payload)


def payload_of(command: Command) -> bytes:
    """A well-formed payload of an exact length."""
    one = tensor()
    match command:
        case Command.ALLOC_BUFFER:
            return index(0) + number(MB)
        case Command.BUFFER_GET_BASE | Command.FREE_BUFFER:
            return number(BUFFER)
        case Command.BUFFER_CLEAR:
            return number(BUFFER) + b"\0"
        case Command.SET_TENSOR_HASH | Command.GET_TENSOR:
            return one + number(0) + number(32)
        case Command.COPY_TENSOR:
            return one + one
        case Command.INIT_TENSOR:
            return one
        case Command.GET_ALLOC_SIZE:
            return index(0) + one + bytes(10 * 296)
        case Command.HELLO:
            return CAPS
        case Command.MEMSET_TENSOR:
            return one + number(0) + number(32) + b"\0"
    return bytes(request_bytes(BUILD)[command])


@dataclass
class Stage:
    """A stage of a known state: answers as the real one would, and keeps what it got."""

    filter: RpcFilter
    got: bytearray = field(default_factory=bytearray)

    def ask(self, frame: bytes, said: bytes | None = None) -> bytes:
        """What a head gets for one frame."""
        self.got += self.filter.from_head(frame)
        if self.filter.owed is None:
            return b""
        return bytes(
            self.filter.from_stage(answer(reply(self.filter.owed) if said is None else said))
        )

    def allocate(self, size: int = MB, pointer: int = BUFFER) -> int:
        """The pointer that a head gets for a new buffer."""
        payload = index(0) + number(size)
        got = self.ask(request(Command.ALLOC_BUFFER, payload), number(pointer) + number(size))
        return int.from_bytes(got[8:16], "little")


def reply(command: Command) -> bytes:
    """What a stage says to a well-formed question."""
    match command:
        case Command.HELLO:
            return HELLO_ANSWER
        case Command.ALLOC_BUFFER:
            return number(BUFFER) + number(MB)
        case Command.DEVICE_COUNT:
            return index(1)
        case Command.GET_TENSOR:
            return b"\x07" * 32
    return b"\x05" * ANSWER_BYTES[command]


def greeted(total_bytes: int = 4 * MB, *, devices: int = 1) -> Stage:
    """A connection behind its HELLO, with room for some buffers."""
    stage = Stage(RpcFilter(BUILD, Allowance(total_bytes), devices=devices))
    stage.ask(request(Command.HELLO, CAPS))
    stage.got.clear()
    return stage


def session() -> list[tuple[bytes, bytes]]:
    """Every command once: (what the head sends, what the stage answers)."""
    steps = [
        Command.HELLO,
        Command.DEVICE_COUNT,
        Command.GET_DEVICE_MEMORY,
        Command.GET_ALIGNMENT,
        Command.GET_MAX_SIZE,
        Command.GET_ALLOC_SIZE,
        Command.ALLOC_BUFFER,
        Command.BUFFER_GET_BASE,
        Command.BUFFER_CLEAR,
        Command.INIT_TENSOR,
        Command.SET_TENSOR_HASH,
        Command.SET_TENSOR,
        Command.MEMSET_TENSOR,
        Command.COPY_TENSOR,
        Command.GRAPH_COMPUTE,
        Command.GRAPH_RECOMPUTE,
        Command.GET_TENSOR,
        Command.FREE_BUFFER,
    ]
    frames = []
    for command in steps:
        if command is Command.SET_TENSOR:
            frame = set_tensor(bytes(range(256)) * 64, flag=1)
        elif command is Command.GRAPH_COMPUTE:
            frame = graph(*[tensor(op=MUL_MAT)] * 70, nodes=3)
        else:
            frame = request(command, payload_of(command))
        has_answer = command in ANSWER_BYTES or command is Command.GET_TENSOR
        frames.append((frame, answer(reply(command)) if has_answer else b""))
    return frames


def offer(
    size: int, digest: bytes = bytes(32), *, offset: int = 0, description: bytes = b""
) -> bytes:
    place = (description or tensor()) + b"\x01" + number(offset)
    return request(Command.OFFER, place + number(size) + digest)


def chunks(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    """The data, cut at these places."""
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(places)]
