"""The filter between the head of a pipeline and one of its stages, for llama.cpp's RPC.

Pure: bytes in, bytes out. ggml-rpc-server trusts whoever connects, so what a head sends is checked
before it arrives: known commands of exact lengths, memory within the plan, graphs of operations
without function pointers. A frame is

    head -> stage     command (1 byte), length (8 bytes), payload
    stage -> head     length (8 bytes), payload               some commands have no answer

with all numbers little-endian. The head waits for each answer before it sends anything more, so at
most one answer is owed. Requests are never answered here: what the plan decides instead of the
stage replaces the payload of the stage's answer, so that nothing can get out of order.

llama.cpp hands a frame to the system in two or three pieces. Small frames are passed on whole, as
each piece would cost a record of TLS and two wake-ups; large ones are passed on as they come.

Invariant: nothing is passed on before it was checked, and `SMALL_BYTES` are kept at most.
Invariant: whatever arrives, the only error is `PeerError`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator, Mapping
from typing import NamedTuple

from p2pmesh.engine.rpc_builds import (
    ALLOCATION,
    ANSWER_BYTES,
    FLAG_AND_OFFSET_BYTES,
    INDEX,
    NUMBER,
    REQUEST,
    Command,
    RpcBuild,
    request_bytes,
    tensors_at,
)
from p2pmesh.engine.rpc_offers import PROOF, SMALL_BYTES, Offer, OfferAnswer, tensor_head
from p2pmesh.errors import PeerError

# One message of the head is a whole graph; a large MoE model has some 20 000 nodes.
NODES_MAX = 1 << 16
TENSORS_MAX = 1 << 17
TENSORS_AT_ONCE = 32  # checked in one go

_TWO_NUMBERS = struct.Struct("<QQ")
_GRAPH = struct.Struct("<II")


Piece = bytes | bytearray | memoryview


class Want(NamedTuple):
    """The next bytes of a stream: to be looked at, or to be passed on as they come."""

    size: int
    passes: bool = False


Steps = Generator[Want, bytes, None]


_WITH_DEVICE = frozenset(
    {
        Command.ALLOC_BUFFER,
        Command.GET_ALIGNMENT,
        Command.GET_MAX_SIZE,
        Command.GET_DEVICE_MEMORY,
        Command.GET_ALLOC_SIZE,
        Command.GRAPH_RECOMPUTE,
    }
)
_WITH_BUFFER = frozenset({Command.BUFFER_GET_BASE, Command.FREE_BUFFER, Command.BUFFER_CLEAR})


class Allowance:
    """The memory that the buffers of one stage may take, over all of its connections.

    Attributes:
        total_bytes: What the plan gives it.
        used_bytes: What is taken.
        refused_bytes: The size of the last buffer that would not have fitted; 0 without one.
    """

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.used_bytes = 0
        self.refused_bytes = 0

    @property
    def free_bytes(self) -> int:
        """What is left."""
        return self.total_bytes - self.used_bytes

    def take(self, size_bytes: int) -> bool:
        """Take memory for one buffer; False if the plan has no room for it."""
        if size_bytes > self.free_bytes:
            self.refused_bytes = size_bytes
            return False
        self.used_bytes += size_bytes
        return True

    def give_back(self, size_bytes: int) -> None:
        """Return the memory of one buffer."""
        self.used_bytes -= size_bytes
        assert self.used_bytes >= 0


class RpcFilter:
    """One connection of a head to a stage; each side's bytes may come in any chunks.

    After a `PeerError` the connection is to be closed: both directions go on raising it.

    Attributes:
        owed: The command whose answer the stage's engine owes; None while it owes none.
        offer: What the head offered and `answer_offer` has not answered; None without.
    """

    def __init__(self, build: RpcBuild, allowance: Allowance, *, devices: int = 1) -> None:
        """Expect a HELLO.

        Args:
            build: What both sides run.
            allowance: Shared by all connections to this stage.
            devices: How many devices the stage's engine has.
        """
        self.owed: Command | None = None
        self.offer: Offer | None = None
        self._build = build
        self._allowance = allowance
        self._devices = devices
        self._buffers: dict[int, int] = {}
        self._offered: dict[int, int] = {}  # bytes, by buffer
        self._weights_head_bytes = build.tensor_bytes + FLAG_AND_OFFSET_BYTES
        self._answer_bytes = 0
        self._replace: Callable[[bytes], bytes] = bytes
        self._request_bytes = request_bytes(build)
        self._tensors_at = tensors_at(build)
        self._replacements = self._make_replacements()
        self._requests = _Stream(self._check_requests)
        self._answers = _Stream(self._check_answers)

    def from_head(self, data: bytes | bytearray) -> bytes | bytearray:
        """Return what the stage may get, now that the head sent this.

        Raises:
            PeerError: The head broke the protocol, or asks for what no head may have.
        """
        return self._requests.feed(data, self._fail)

    def from_stage(self, data: bytes | bytearray) -> bytes | bytearray:
        """Return what the head may get, now that the stage sent this.

        Raises:
            PeerError: The stage broke the protocol.
        """
        return self._answers.feed(data, self._fail)

    def answer_offer(self, answer: OfferAnswer) -> bytes:
        """Return what the head gets for its offer.

        Args:
            answer: With `HAVE` the caller gives the engine the tensor that was offered; else the
                head has to send it.
        """
        self.offer = None
        return answer.frame()

    def close(self) -> None:
        """Give back what the connection's buffers took: a stage frees them when it ends."""
        for size in self._buffers.values():
            self._allowance.give_back(size)
        self._buffers.clear()
        if self.owed is Command.ALLOC_BUFFER:
            self._replace(bytes(ANSWER_BYTES[Command.ALLOC_BUFFER]))
            self.owed = None

    def _fail(self, failure: PeerError) -> None:
        self._requests.failure = self._answers.failure = failure

    # --- head to stage --------------------------------------------------------------------------

    def _check_requests(self, out: list[Piece]) -> Steps:
        expected: Command | None = Command.HELLO
        while True:
            number, length = REQUEST.unpack((yield Want(REQUEST.size)))
            command = _command(number)
            if expected is not None and command is not expected:
                raise PeerError(f"the head began with {command.name} instead of HELLO")
            if expected is None and command is Command.HELLO:
                raise PeerError("the head said HELLO twice")
            if self.owed is not None:
                raise PeerError(f"the head did not wait for the answer to {self.owed.name}")
            if self.offer is not None:
                raise PeerError("the head did not wait for the answer to OFFER")
            expected = None
            if command is Command.SET_TENSOR:
                yield from self._check_weights(out, length)
            elif command is Command.OFFER:
                yield from self._check_offer(length)
            elif command is Command.GRAPH_COMPUTE:
                yield from self._check_graph(out, length)
            else:
                if length != self._request_bytes[command]:
                    raise PeerError(f"{command.name} with a payload of {length} bytes")
                payload = yield Want(length)
                command, payload = self._checked(command, payload)
                out += (REQUEST.pack(command, len(payload)), payload)

    def _check_weights(self, out: list[Piece], length: int) -> Steps:
        """Pass on the data of a tensor, after a look at the place that it goes to."""
        data_bytes = length - self._weights_head_bytes
        # The stage keeps the whole message in memory before it looks at it.
        if not 0 <= data_bytes <= max(self._buffers.values(), default=0):
            raise PeerError(f"SET_TENSOR with a payload of {length} bytes")
        head = bytearray((yield Want(self._weights_head_bytes)))
        self._check_place(Command.SET_TENSOR, head, data_bytes)
        yield from _passing(out, REQUEST.pack(Command.SET_TENSOR, length) + head, data_bytes)

    def _check_offer(self, length: int) -> Steps:
        """Keep an offer for the caller, if the SET_TENSOR that it stands for would pass.

        Each buffer can be offered as many bytes as it has, because a head loads a tensor once:
        more would only keep the stage's disk busy.
        """
        if length != self._weights_head_bytes + PROOF.size:
            raise PeerError(f"OFFER with a payload of {length} bytes")
        head = bytearray((yield Want(self._weights_head_bytes)))
        data_bytes, digest = PROOF.unpack((yield Want(PROOF.size)))
        buffer = self._check_place(Command.OFFER, head, data_bytes)
        tensor = tensor_head(self._build, bytes(head), data_bytes)
        if tensor.offset or data_bytes < SMALL_BYTES:
            raise PeerError(f"OFFER of {data_bytes} bytes at {tensor.offset}: no whole tensor")
        offered = self._offered.get(buffer, 0) + data_bytes
        if offered > self._buffers[buffer]:
            raise PeerError(f"OFFER of {offered} bytes in all for a smaller buffer")
        self._offered[buffer] = offered
        self.offer = Offer(tensor, digest)

    def _check_place(self, command: Command, head: bytearray, data_bytes: int) -> int:
        """Return the buffer that data goes to, and clear the cache flag in front of the data."""
        buffer = self._check_tensor(command, head)
        if data_bytes > self._buffers.get(buffer, 0):
            raise PeerError(f"{command.name} of {data_bytes} bytes into a smaller buffer")
        head[self._build.tensor_bytes] = 0  # nothing is ever kept in a cache of the stage
        return buffer

    def _check_graph(self, out: list[Piece], length: int) -> Steps:
        if length < _GRAPH.size:
            raise PeerError(f"GRAPH_COMPUTE with a payload of {length} bytes")
        head = yield Want(_GRAPH.size)
        device, nodes = _GRAPH.unpack(head)
        self._check_device(Command.GRAPH_COMPUTE, device)
        tensors_bytes = length - _GRAPH.size - nodes * NUMBER.size - INDEX.size
        if not 0 < nodes <= NODES_MAX or tensors_bytes < 0:
            raise PeerError(f"GRAPH_COMPUTE of {nodes} nodes in {length} bytes")
        out += (REQUEST.pack(Command.GRAPH_COMPUTE, length), head)
        yield Want(nodes * NUMBER.size, passes=True)
        count = yield Want(INDEX.size)
        (tensors,) = INDEX.unpack(count)
        if tensors > TENSORS_MAX or tensors * self._build.tensor_bytes != tensors_bytes:
            raise PeerError(f"GRAPH_COMPUTE of {tensors} tensors in {length} bytes")
        out.append(count)
        while tensors > 0:
            some = min(tensors, TENSORS_AT_ONCE)
            descriptions = yield Want(some * self._build.tensor_bytes)
            for at in range(0, len(descriptions), self._build.tensor_bytes):
                self._check_tensor(Command.GRAPH_COMPUTE, descriptions, at)
            out.append(descriptions)
            tensors -= some

    def _checked(self, command: Command, payload: bytes) -> tuple[Command, bytes]:
        """Return what to ask the stage instead of this: the same, as a rule."""
        if command in _WITH_DEVICE:
            self._check_device(command, INDEX.unpack_from(payload)[0])
        for at in self._tensors_at.get(command, ()):
            self._check_tensor(command, payload, at)
        if command in _WITH_BUFFER:
            (buffer,) = NUMBER.unpack_from(payload)
            if buffer not in self._buffers:
                raise PeerError(f"{command.name} of a buffer that the stage does not have")
            if command is Command.FREE_BUFFER:
                self._allowance.give_back(self._buffers.pop(buffer))
                self._offered.pop(buffer, None)
        if command is Command.GET_TENSOR:
            size = NUMBER.unpack_from(payload, len(payload) - NUMBER.size)[0]
            if size > max(self._buffers.values(), default=0):
                raise PeerError(f"GET_TENSOR of {size} bytes, more than any buffer has")
            self._owe(command, size, bytes)
        elif command is Command.ALLOC_BUFFER:
            return self._allocation(payload)
        elif command in ANSWER_BYTES:
            self._owe(command, ANSWER_BYTES[command], self._replacements[command])
        return command, bytes(len(payload)) if command is Command.HELLO else payload

    def _allocation(self, payload: bytes) -> tuple[Command, bytes]:
        device, size = ALLOCATION.unpack(payload)
        answer_bytes = ANSWER_BYTES[Command.ALLOC_BUFFER]
        if self._allowance.take(size):
            self._owe(Command.ALLOC_BUFFER, answer_bytes, lambda answer: self._allot(size, answer))
            return Command.ALLOC_BUFFER, payload
        # A harmless question with an answer of the same size, which becomes "no memory".
        self._owe(Command.ALLOC_BUFFER, answer_bytes, lambda answer: bytes(len(answer)))
        return Command.GET_DEVICE_MEMORY, INDEX.pack(device)

    def _owe(self, command: Command, size: int, replace: Callable[[bytes], bytes]) -> None:
        self.owed, self._answer_bytes, self._replace = command, size, replace

    def _check_device(self, command: Command, device: int) -> None:
        if device >= self._devices:
            raise PeerError(f"{command.name} on device {device} of {self._devices}")

    def _check_tensor(self, command: Command, payload: bytes | bytearray, at: int = 0) -> int:
        """Return the buffer that the tensor described there says it is in."""
        kind, buffer, op = self._build.tensor.unpack_from(payload, at)
        if kind not in self._build.types:
            raise PeerError(f"{command.name} with a tensor of the unknown type {kind}")
        if op not in self._build.ops:
            raise PeerError(f"{command.name} with the operation {op}, which no model may use")
        return int(buffer)

    # --- stage to head --------------------------------------------------------------------------

    def _check_answers(self, out: list[Piece]) -> Steps:
        while True:
            head = yield Want(NUMBER.size)
            (length,) = NUMBER.unpack(head)
            if self.owed is None:
                raise PeerError("the stage answered without a question")
            if length != self._answer_bytes:
                raise PeerError(f"the stage answered {self.owed.name} with {length} bytes")
            if self.owed is Command.GET_TENSOR:
                yield from _passing(out, head, length)
            else:
                out += (head, self._replace((yield Want(length))))
            self.owed = None

    def _make_replacements(self) -> Mapping[Command, Callable[[bytes], bytes]]:
        """Return what becomes of the stage's answers."""
        plan = self._allowance
        return {
            Command.HELLO: self._greeting,
            Command.DEVICE_COUNT: self._device_count,
            Command.GET_DEVICE_MEMORY: lambda _: _TWO_NUMBERS.pack(
                plan.free_bytes, plan.total_bytes
            ),
            # A tensor that is larger than this would not get a buffer either.
            Command.GET_MAX_SIZE: lambda answer: NUMBER.pack(
                min(NUMBER.unpack(answer)[0], plan.total_bytes)
            ),
            Command.GET_ALIGNMENT: bytes,
            Command.GET_ALLOC_SIZE: bytes,
            Command.BUFFER_GET_BASE: bytes,
            Command.COPY_TENSOR: bytes,
            # "Not in my cache": 64 bits of FNV are no proof of what is in there.
            Command.SET_TENSOR_HASH: lambda answer: bytes(len(answer)),
        }

    def _greeting(self, answer: bytes) -> bytes:
        if tuple(answer[:3]) != self._build.protocol:
            spoken = ".".join(map(str, answer[:3]))
            raise PeerError(f"the stage speaks RPC {spoken}, which is not {self._build.name}'s")
        return answer[:3] + bytes(len(answer) - 3)  # no other transport than this one

    def _device_count(self, answer: bytes) -> bytes:
        (count,) = INDEX.unpack(answer)
        if count != self._devices:
            raise PeerError(f"the stage has {count} devices instead of {self._devices}")
        return answer

    def _allot(self, size: int, answer: bytes) -> bytes:
        pointer, _ = _TWO_NUMBERS.unpack(answer)
        if pointer == 0:
            self._allowance.give_back(size)
        elif pointer in self._buffers:
            raise PeerError("the stage gave one buffer twice")
        else:
            self._buffers[pointer] = size
        return answer


def _passing(out: list[Piece], head: bytes, size: int) -> Steps:
    """Pass on the beginning of a frame and what follows it: at once if that is little."""
    if size <= SMALL_BYTES:
        out += (head, (yield Want(size)))
    else:
        out.append(head)
        yield Want(size, passes=True)


def _command(number: int) -> Command:
    try:
        return Command(number)
    except ValueError:
        raise PeerError(f"the head sent the unknown command {number}") from None


class _Stream:
    """One direction: collects what the steps want to see, and passes on what they put out."""

    def __init__(self, steps: Callable[[list[Piece]], Steps]) -> None:
        self.failure: PeerError | None = None
        self._out: list[Piece] = []
        self._steps = steps(self._out)
        self._want = next(self._steps)
        self._left = self._want.size
        self._kept = bytearray()

    def feed(
        self, data: bytes | bytearray, on_failure: Callable[[PeerError], None]
    ) -> bytes | bytearray:
        if self.failure is not None:
            raise PeerError(str(self.failure))
        view, at = memoryview(data), 0
        try:
            while at < len(data):
                taken = view[at : at + self._left]
                at += len(taken)
                self._left -= len(taken)
                if self._want.passes:
                    self._out.append(taken)
                else:
                    self._kept += taken
                while self._left == 0:
                    seen = bytes(self._kept)
                    self._kept.clear()
                    self._want = self._steps.send(seen)
                    self._left = self._want.size
            match self._out:
                case [memoryview() as passed] if len(passed) == len(data):
                    return data  # the usual case while weights are sent: nothing to copy
            return b"".join(self._out)
        except PeerError as exc:
            on_failure(exc)
            raise
        finally:
            self._out.clear()
