"""The filter of llama.cpp's RPC: what passes, what is refused, and that chunks never matter."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.engine.rpc_builds import Command, request_bytes
from p2pmesh.engine.rpc_filter import NODES_MAX, TENSORS_MAX, Allowance, RpcFilter
from p2pmesh.engine.rpc_offers import SMALL_BYTES, OfferAnswer
from p2pmesh.errors import PeerError
from tests.engine.rpc_frames import (
    BUFFER,
    BUILD,
    CAPS,
    HELLO_ANSWER,
    MAP_CUSTOM1,
    MB,
    MUL_MAT,
    Stage,
    answer,
    chunks,
    graph,
    greeted,
    index,
    number,
    offer,
    payload_of,
    reply,
    request,
    session,
    set_tensor,
    tensor,
)

EXACT = sorted(request_bytes(BUILD))
AFTER_HELLO = [command for command in EXACT if command is not Command.HELLO]


def new(total_bytes: int = 4 * MB) -> RpcFilter:
    return RpcFilter(BUILD, Allowance(total_bytes))


# --- what passes --------------------------------------------------------------------------------


def test_a_session_passes_unchanged_but_for_capabilities_cache_and_memory() -> None:
    relay = new()
    for frame, said in session():
        passed, command = relay.from_head(frame), Command(frame[0])
        if command is Command.HELLO:
            assert passed == request(command, bytes(24))
        elif command is Command.SET_TENSOR:
            assert passed == set_tensor(bytes(range(256)) * 64, flag=0)
        else:
            assert passed == frame, command
        got = relay.from_stage(said)
        changed = {
            Command.HELLO: HELLO_ANSWER[:4] + bytes(24),
            Command.GET_DEVICE_MEMORY: number(4 * MB) + number(4 * MB),
            Command.GET_MAX_SIZE: number(4 * MB),
            Command.SET_TENSOR_HASH: b"\0",
        }
        assert got == (answer(changed[command]) if command in changed else said), command
        assert relay.owed is None


def play(relay: RpcFilter, cuts: Sequence[int]) -> tuple[bytes, bytes]:
    """A whole session whose frames come in pieces."""
    to_stage, to_head = bytearray(), bytearray()
    for frame, said in session():
        for piece in chunks(frame, cuts):
            to_stage += relay.from_head(piece)
        for piece in chunks(said, cuts):
            to_head += relay.from_stage(piece)
    return bytes(to_stage), bytes(to_head)


@given(st.lists(st.integers(0, 1 << 16), max_size=8))
def test_chunks_never_matter(cuts: list[int]) -> None:
    assert play(new(), cuts) == play(new(), ())


def test_single_bytes_and_whole_silent_runs_are_chunks_too() -> None:
    assert play(new(), range(1 << 10)) == play(new(), ())
    stage = greeted()
    stage.allocate()
    silent = request(Command.INIT_TENSOR, tensor()) + set_tensor(b"x" * 99) + graph(tensor())
    assert stage.filter.from_head(silent) == silent


def test_weights_are_passed_on_as_they_come() -> None:
    """Each chunk leaves at once, and the filter keeps none of it."""
    stage = greeted()
    stage.allocate()
    frame = set_tensor(bytes(MB))
    head = stage.filter.from_head(frame[: 9 + 305])
    assert head == frame[: 9 + 305]
    chunk = bytes(1 << 16)
    for _ in range(MB // len(chunk)):
        assert stage.filter.from_head(chunk) is chunk
    frame = request(Command.GET_ALIGNMENT, index(0))
    assert stage.filter.from_head(frame) == frame


def test_a_tensor_that_is_read_is_passed_on_as_it_comes() -> None:
    stage = greeted()
    stage.allocate()
    stage.filter.from_head(request(Command.GET_TENSOR, tensor() + number(0) + number(MB)))
    assert stage.filter.from_stage(number(MB)) == number(MB)
    chunk = bytes(MB // 4)
    for _ in range(4):
        assert stage.filter.owed is Command.GET_TENSOR
        assert stage.filter.from_stage(chunk) == chunk
    assert stage.filter.owed is None


def test_small_frames_are_passed_on_whole() -> None:
    """llama.cpp writes command, length and payload one by one."""
    stage = greeted()
    stage.allocate()
    for frame in (
        set_tensor(b"activations"),
        request(Command.GET_TENSOR, tensor() + number(0) + number(32)),
    ):
        pieces = [frame[:1], frame[1:9], frame[9:]]
        assert [stage.filter.from_head(piece) for piece in pieces] == [b"", b"", frame]
    assert stage.filter.from_stage(number(32)) == b""
    assert stage.filter.from_stage(b"\x01" * 32) == number(32) + b"\x01" * 32


# --- the plan's memory --------------------------------------------------------------------------


def test_a_buffer_beyond_the_plan_is_answered_with_none() -> None:
    stage = greeted(2 * MB)
    assert stage.allocate(MB) == BUFFER
    stage.got.clear()
    got = stage.ask(request(Command.ALLOC_BUFFER, index(0) + number(MB + 1)), number(9) + number(9))
    assert got == answer(number(0) + number(0))
    assert stage.got == request(Command.GET_DEVICE_MEMORY, index(0)), "the stage is not asked"
    assert stage.allocate(MB, BUFFER + 1) == BUFFER + 1


def test_memory_is_shared_by_connections_and_comes_back() -> None:
    plan = Allowance(3 * MB)
    one, two = Stage(RpcFilter(BUILD, plan)), Stage(RpcFilter(BUILD, plan))
    for stage in (one, two):
        stage.ask(request(Command.HELLO, CAPS))
    assert one.allocate(2 * MB) == BUFFER
    assert two.allocate(2 * MB) == 0
    assert (plan.free_bytes, plan.refused_bytes) == (MB, 2 * MB)
    one.ask(request(Command.FREE_BUFFER, number(BUFFER)))
    assert plan.free_bytes == 3 * MB
    assert two.allocate(2 * MB) == BUFFER
    two.filter.close()
    two.filter.close()
    assert plan.free_bytes == 3 * MB


def test_a_buffer_that_the_stage_cannot_make_takes_nothing() -> None:
    stage, plan = greeted(), Allowance(MB)
    stage.filter = RpcFilter(BUILD, plan)
    stage.ask(request(Command.HELLO, CAPS))
    assert stage.allocate(MB, pointer=0) == 0
    assert plan.free_bytes == MB
    stage.filter.from_head(request(Command.ALLOC_BUFFER, index(0) + number(MB)))
    assert plan.free_bytes == 0
    stage.filter.close()
    assert plan.free_bytes == MB, "an answer that never came"


def test_a_freed_buffer_is_gone() -> None:
    stage = greeted()
    stage.allocate()
    stage.ask(request(Command.FREE_BUFFER, number(BUFFER)))
    with pytest.raises(PeerError, match="FREE_BUFFER of a buffer that the stage does not have"):
        stage.ask(request(Command.FREE_BUFFER, number(BUFFER)))


# --- what a head may not say --------------------------------------------------------------------


def refused(frame: bytes, reason: str, *, devices: int = 1) -> None:
    """Behind HELLO and one buffer, nothing of the frame arrives beyond what was checked."""
    stage = greeted(devices=devices)
    stage.allocate()
    with pytest.raises(PeerError, match=reason):
        stage.filter.from_head(frame)
    for late in (stage.filter.from_head, stage.filter.from_stage):
        with pytest.raises(PeerError, match=reason):
            late(b"")


@pytest.mark.parametrize("command", EXACT, ids=lambda command: command.name)
@pytest.mark.parametrize("more", [-1, 1, 1 << 40], ids=["truncated", "longer", "oversized"])
def test_another_length_is_refused(command: Command, more: int) -> None:
    length = max(0, request_bytes(BUILD)[command] + more)
    length += length == request_bytes(BUILD)[command]
    frame = struct.pack("<BQ", command, length)
    if command is Command.HELLO:
        with pytest.raises(PeerError, match="HELLO with a payload"):
            new().from_head(frame)
    else:
        refused(frame, f"{command.name} with a payload of {length} bytes")


@pytest.mark.parametrize("command", AFTER_HELLO, ids=lambda command: command.name)
def test_nothing_comes_before_hello(command: Command) -> None:
    with pytest.raises(PeerError, match=f"began with {command.name} instead of HELLO"):
        new().from_head(request(command, payload_of(command)))


def test_hello_comes_once() -> None:
    refused(request(Command.HELLO, CAPS), "HELLO twice")


@pytest.mark.parametrize("command", [18, 19, 200, 255])
def test_an_unknown_command_is_refused(command: int) -> None:
    refused(request(command), f"the unknown command {command}")


def test_a_head_waits_for_answers() -> None:
    frame = request(Command.GET_ALIGNMENT, index(0))
    refused(frame + frame, "did not wait for the answer to GET_ALIGNMENT")


WITH_DEVICE = [
    request(command, index(1) + payload_of(command)[4:])
    for command in (
        Command.ALLOC_BUFFER,
        Command.GET_ALIGNMENT,
        Command.GET_MAX_SIZE,
        Command.GET_DEVICE_MEMORY,
        Command.GET_ALLOC_SIZE,
        Command.GRAPH_RECOMPUTE,
    )
] + [graph(tensor(), device=1)]


@pytest.mark.parametrize("frame", WITH_DEVICE, ids=lambda frame: Command(frame[0]).name)
def test_another_device_is_refused(frame: bytes) -> None:
    refused(frame, "on device 1 of 1")
    stage = greeted(devices=2)
    stage.allocate()
    assert stage.filter.from_head(frame) == frame


@pytest.mark.parametrize(
    "command", [Command.BUFFER_GET_BASE, Command.FREE_BUFFER, Command.BUFFER_CLEAR]
)
def test_a_foreign_buffer_is_refused(command: Command) -> None:
    frame = request(command, number(BUFFER + 1) + payload_of(command)[8:])
    refused(frame, f"{command.name} of a buffer that the stage does not have")


def with_tensor(command: Command, description: bytes) -> list[bytes]:
    """All requests of a command that hold this tensor, in each of its places."""
    if command is Command.SET_TENSOR:
        return [set_tensor(b"data", description=description)]
    if command is Command.GRAPH_COMPUTE:
        others = [tensor(op=MUL_MAT)] * 40
        return [graph(*others[:n], description, *others[n:]) for n in (0, 31, 32, 40)]
    places = {Command.COPY_TENSOR: (0, 296), Command.GET_ALLOC_SIZE: (4, 300, 4 + 10 * 296)}
    payload = payload_of(command)
    return [
        request(command, payload[:at] + description + payload[at + 296 :])
        for at in places.get(command, (0,))
    ]


WITH_TENSOR = [
    Command.SET_TENSOR,
    Command.SET_TENSOR_HASH,
    Command.GET_TENSOR,
    Command.COPY_TENSOR,
    Command.GRAPH_COMPUTE,
    Command.INIT_TENSOR,
    Command.GET_ALLOC_SIZE,
    Command.MEMSET_TENSOR,
]


@pytest.mark.parametrize("command", WITH_TENSOR, ids=lambda command: command.name)
def test_functions_of_the_head_never_run(command: Command) -> None:
    """MAP_CUSTOM1 to CUSTOM are calls to an address that the head names."""
    for op in (MAP_CUSTOM1, 93, 94, 95, 101, 1 << 31):
        for frame in with_tensor(command, tensor(op=op)):
            refused(frame, f"{command.name} with the operation {op}")
    for frame in with_tensor(command, tensor(op=100)):
        stage = greeted()
        stage.allocate()
        assert stage.filter.from_head(frame) == frame


@pytest.mark.parametrize("command", WITH_TENSOR, ids=lambda command: command.name)
@pytest.mark.parametrize("kind", [4, 38, 43, 1 << 31])
def test_unknown_tensor_types_are_refused(command: Command, kind: int) -> None:
    for frame in with_tensor(command, tensor(kind=kind)):
        refused(frame, f"{command.name} with a tensor of the unknown type {kind}")


@pytest.mark.parametrize(
    ("length", "reason"),
    [(0, "payload of 0"), (304, "payload of 304"), (305 + MB + 1, "payload"), (1 << 63, "payload")],
)
def test_weights_fit_into_what_was_allocated(length: int, reason: str) -> None:
    refused(struct.pack("<BQ", Command.SET_TENSOR, length), f"SET_TENSOR with a {reason}")


def test_weights_fit_into_their_own_buffer() -> None:
    stage = greeted()
    stage.allocate(MB)
    stage.allocate(64, BUFFER + 1)
    for buffer, size in ((BUFFER + 1, 65), (BUFFER + 2, 1)):
        frame = set_tensor(bytes(size), description=tensor(buffer=buffer))
        refused_by = greeted()
        refused_by.allocate(MB)
        refused_by.allocate(64, BUFFER + 1)
        with pytest.raises(PeerError, match=f"SET_TENSOR of {size} bytes into a smaller buffer"):
            refused_by.filter.from_head(frame)
    fitting = set_tensor(bytes(64), description=tensor(buffer=BUFFER + 1))
    assert stage.filter.from_head(fitting) == fitting


def test_without_a_buffer_there_are_no_weights() -> None:
    with pytest.raises(PeerError, match="SET_TENSOR with a payload of 306 bytes"):
        greeted().filter.from_head(set_tensor(b"x"))


def test_no_more_is_read_than_there_is() -> None:
    frame = request(Command.GET_TENSOR, tensor() + number(0) + number(MB + 1))
    refused(frame, "GET_TENSOR of 1048577 bytes")


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "payload of 0 bytes"),
        (index(0), "payload of 4 bytes"),
        (index(0) + index(0) + index(0), "of 0 nodes"),
        (index(0) + index(NODES_MAX + 1) + bytes(8 * NODES_MAX + 12), "of 65537 nodes"),
        (index(0) + index(1) + bytes(8), "of 1 nodes in 16 bytes"),
        (index(0) + index(0xFFFF_FFFF) + bytes(99), "of 4294967295 nodes"),
        (index(0) + index(1) + bytes(8) + index(2) + tensor(), "of 2 tensors"),
        (index(0) + index(1) + bytes(8) + index(1) + tensor() + b"\0", "of 1 tensors"),
        (index(0) + index(1) + bytes(8) + index(0xFFFF_FFFF) + tensor(), "of 4294967295 tensors"),
    ],
)
def test_a_graph_is_as_long_as_it_says(payload: bytes, reason: str) -> None:
    refused(request(Command.GRAPH_COMPUTE, payload), f"GRAPH_COMPUTE .*{reason}")


def test_a_graph_has_a_bounded_number_of_tensors() -> None:
    count = TENSORS_MAX + 1
    length = 8 + 8 + 4 + count * 296
    frame = struct.pack("<BQ", Command.GRAPH_COMPUTE, length)
    refused(frame + index(0) + index(1) + bytes(8) + index(count), f"of {count} tensors")


# --- offers --------------------------------------------------------------------------------------


def test_an_offer_waits_for_its_answer_and_no_engine_sees_it() -> None:
    stage = greeted()
    stage.allocate()
    stage.got.clear()
    for answered in OfferAnswer:
        for piece in chunks(offer(SMALL_BYTES, b"\x07" * 32), range(0, 400, 7)):
            assert stage.filter.from_head(piece) == b""
        offered = stage.filter.offer
        assert offered is not None
        assert (offered.tensor.name, offered.tensor.size) == ("t", SMALL_BYTES)
        assert offered.digest == b"\x07" * 32
        expected = set_tensor(bytes(SMALL_BYTES), flag=0)
        assert offered.tensor.frame() + bytes(SMALL_BYTES) == expected, "the cache flag is cleared"
        assert stage.filter.answer_offer(answered) == answer(bytes((answered,)))
        assert stage.filter.offer is None
    frame = set_tensor(bytes(SMALL_BYTES))
    assert stage.filter.from_head(frame) == frame


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (request(Command.OFFER, offer(SMALL_BYTES)[9:-1]), "OFFER with a payload of 344 bytes"),
        (request(Command.OFFER, offer(SMALL_BYTES)[9:] + b"x"), "OFFER with a payload of 346"),
        (offer(SMALL_BYTES, description=tensor(kind=4)), "OFFER with a tensor of the unknown type"),
        (offer(SMALL_BYTES, description=tensor(op=MAP_CUSTOM1)), "OFFER with the operation 92"),
        (offer(SMALL_BYTES, description=tensor(buffer=BUFFER + 1)), "into a smaller buffer"),
        (offer(MB + 1), f"OFFER of {MB + 1} bytes into a smaller buffer"),
        (offer(2**64 - 1), "into a smaller buffer"),
        (offer(SMALL_BYTES - 1), "no whole tensor"),
        (offer(SMALL_BYTES, offset=1), "no whole tensor"),
        (offer(SMALL_BYTES) + request(Command.DEVICE_COUNT), "did not wait for the answer to OFF"),
        (request(Command.DEVICE_COUNT) + offer(SMALL_BYTES), "for the answer to DEVICE_COUNT"),
    ],
)
def test_an_offer_that_no_head_makes_is_refused(frame: bytes, reason: str) -> None:
    refused(frame, reason)


def test_a_head_begins_with_no_offer() -> None:
    with pytest.raises(PeerError, match="began with OFFER"):
        new().from_head(offer(SMALL_BYTES))


def test_no_more_is_offered_than_a_buffer_holds() -> None:
    """Until it is another buffer: a head that loads anew may offer all of it again."""
    stage = greeted()
    for _ in range(2):
        stage.allocate()
        for _ in range(MB // SMALL_BYTES):
            stage.filter.from_head(offer(SMALL_BYTES))
            stage.filter.answer_offer(OfferAnswer.SEND)
        stage.ask(request(Command.FREE_BUFFER, number(BUFFER)))
    stage.allocate()
    stage.filter.from_head(offer(MB))
    stage.filter.answer_offer(OfferAnswer.HAVE)
    with pytest.raises(PeerError, match=f"OFFER of {MB + SMALL_BYTES} bytes in all"):
        stage.filter.from_head(offer(SMALL_BYTES))


# --- what a stage may not say -------------------------------------------------------------------


def asked(command: Command) -> RpcFilter:
    stage = greeted()
    stage.allocate()
    stage.filter.from_head(request(command, payload_of(command)))
    return stage.filter


ANSWERED = [c for c in AFTER_HELLO if asked(c).owed is not None]


@pytest.mark.parametrize("command", ANSWERED, ids=lambda command: command.name)
@pytest.mark.parametrize("more", [-1, 1, 1 << 40])
def test_an_answer_of_another_size_is_refused(command: Command, more: int) -> None:
    size = len(reply(command)) + more
    with pytest.raises(PeerError, match=f"the stage answered {command.name} with {size} bytes"):
        asked(command).from_stage(number(size))


@pytest.mark.parametrize(
    "command", [c for c in AFTER_HELLO if c not in ANSWERED], ids=lambda command: command.name
)
def test_an_answer_without_a_question_is_refused(command: Command) -> None:
    with pytest.raises(PeerError, match="answered without a question"):
        asked(command).from_stage(answer(b"\0" * 8))


def test_a_second_answer_is_refused() -> None:
    relay = asked(Command.GET_ALIGNMENT)
    with pytest.raises(PeerError, match="answered without a question"):
        relay.from_stage(answer(number(64)) * 2)


@pytest.mark.parametrize("version", [(7, 0, 1), (7, 1, 0), (8, 0, 0), (0, 0, 0)])
def test_another_protocol_is_refused(version: tuple[int, int, int]) -> None:
    relay = new()
    relay.from_head(request(Command.HELLO, CAPS))
    with pytest.raises(PeerError, match=f"speaks RPC {'.'.join(map(str, version))}"):
        relay.from_stage(answer(bytes((*version, 0)) + bytes(24)))


def test_another_number_of_devices_is_refused() -> None:
    with pytest.raises(PeerError, match="has 2 devices instead of 1"):
        greeted().ask(request(Command.DEVICE_COUNT), index(2))


def test_a_buffer_is_given_once() -> None:
    stage, plan = greeted(), Allowance(4 * MB)
    stage.filter = RpcFilter(BUILD, plan)
    stage.ask(request(Command.HELLO, CAPS))
    stage.allocate()
    with pytest.raises(PeerError, match="one buffer twice"):
        stage.allocate()
    stage.filter.close()
    assert plan.free_bytes == 4 * MB


# --- whatever comes -----------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.booleans(), st.binary(max_size=700)), max_size=12),
    st.sampled_from([b"", request(Command.HELLO, CAPS)]),
)
def test_random_bytes_are_refused_at_most(pieces: list[tuple[bool, bytes]], first: bytes) -> None:
    plan = Allowance(MB)
    relay = RpcFilter(BUILD, plan)
    if first:
        Stage(relay).ask(first)
    feed_all(relay, pieces)
    relay.close()
    assert plan.free_bytes == MB


def feed_all(relay: RpcFilter, pieces: Sequence[tuple[bool, bytes]]) -> None:
    """Nothing but `PeerError` ever comes out."""
    for is_head, data in pieces:
        try:
            (relay.from_head if is_head else relay.from_stage)(data)
        except PeerError:
            return


@given(st.data())
def test_a_session_with_wrong_bytes_is_refused_at_most(data: st.DataObject) -> None:
    plan = Allowance(4 * MB)
    relay = RpcFilter(BUILD, plan)
    pieces = [piece for frame, said in session() for piece in ((True, frame), (False, said))]
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(pieces) - 1))
        is_head, part = pieces[at]
        changed = bytearray(part)
        if changed:
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):
            del changed[data.draw(st.integers(0, len(changed))) :]
        pieces[at] = (is_head, bytes(changed))
    feed_all(relay, pieces)
    relay.close()
    assert plan.free_bytes == 4 * MB
