"""The filter of system calls, run here as the kernel runs it, for both architectures."""

from __future__ import annotations

import errno
import struct

import pytest

from p2pmesh.engine.confine import Instruction, filter_program, handled

PID, PATH_AT = 4242, 0x1234_5678_9ABC
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOWED, REFUSED, KILLED = 0x7FFF0000, 0x50000 | errno.EPERM, 0x80000000
MISSING = 0x50000 | errno.ENOSYS
OTHER = {"x86_64": "aarch64", "aarch64": "x86_64"}
MACHINES = pytest.mark.parametrize("machine", ARCHITECTURES)

# Names, numbers, arguments and verdicts.
CALLS = {
    "read": ((0, 63), (), ALLOWED),
    "mmap": ((9, 222), (), ALLOWED),
    "futex": ((202, 98), (), ALLOWED),
    "TCP": ((41, 198), (2, 0x80001, 6), ALLOWED),
    "TCP over IPv6": ((41, 198), (10, 1, 0), ALLOWED),
    "UDP": ((41, 198), (2, 2, 0), REFUSED),
    "unix": ((41, 198), (1, 1, 0), REFUSED),
    "raw": ((41, 198), (2, 3, 1), REFUSED),
    "MPTCP": ((41, 198), (2, 1, 262), REFUSED),
    "send": ((44, 206), (3, 0, 0, 0x4000), ALLOWED),
    "send with fast open": ((44, 206), (3, 0, 0, 0x20004000), REFUSED),
    "sendmsg with fast open": ((46, 211), (3, 0, 0x20000000), REFUSED),
    "thread": ((56, 220), (0x3D0F00,), ALLOWED),
    "namespace": ((56, 220), (0x10000011,), REFUSED),
    "clone3": ((435, 435), (), MISSING),
    "kill itself": ((62, 129), (PID, 6), ALLOWED),
    "kill another": ((62, 129), (1, 6), REFUSED),
    "kill the group": ((62, 129), (0, 6), REFUSED),
    "abort": ((234, 131), (PID, PID, 6), ALLOWED),
    "fcntl": ((72, 25), (3, 4), ALLOWED),
    "F_SETOWN": ((72, 25), (3, 8), REFUSED),
    "F_SETSIG": ((72, 25), (3, 10), REFUSED),
    "F_SETOWN_EX": ((72, 25), (3, 15), REFUSED),
    "own limits": ((302, 261), (0, 7), ALLOWED),
    "limits of another": ((302, 261), (1, 7), REFUSED),
    "ptrace": ((101, 117), (), REFUSED),
    "bpf": ((321, 280), (), REFUSED),
    "the engine": ((59, 221), (PATH_AT,), ALLOWED),
    "another program": ((59, 221), (PATH_AT + 1,), KILLED),
    "another half": ((59, 221), (PATH_AT ^ 1 << 40,), KILLED),
    "execveat": ((322, 281), (3, PATH_AT), REFUSED),
    "a new call": ((463, 463), (), MISSING),
    "32-bit pointers": ((0x40000000, 0x40000000), (), MISSING),
}


def verdict(
    program: list[Instruction], architecture: int, number: int, arguments: tuple[int, ...] = ()
) -> int:
    """What the kernel would do: a machine with one register and forward jumps."""
    six = (*arguments, *(0,) * (6 - len(arguments)))
    data = struct.pack("<IIQ6Q", number, architecture, 0, *six)
    register = at = 0
    while True:
        code, when_true, when_false, operand = program[at]
        at += 1
        if code == 0x06:
            return operand
        if code == 0x20:
            register = struct.unpack_from("<I", data, operand)[0]
        elif code == 0x54:
            register &= operand
        else:
            holds = {0x15: register == operand, 0x35: register >= operand}[code]
            at += when_true if holds else when_false


@MACHINES
@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_decided_by_what_it_asks_for(machine: str, name: str) -> None:
    numbers, arguments, expected = CALLS[name]
    number = numbers[list(ARCHITECTURES).index(machine)]
    program = filter_program(machine, PID, PATH_AT, connects=False)
    assert verdict(program, ARCHITECTURES[machine], number, arguments) == expected


@MACHINES
def test_calls_of_another_architecture_end_the_engine(machine: str) -> None:
    program = filter_program(machine, PID, PATH_AT, connects=False)
    assert verdict(program, ARCHITECTURES[OTHER[machine]], 0) == KILLED


@pytest.mark.parametrize(("machine", "number"), [("x86_64", 42), ("aarch64", 203)])
def test_only_the_head_of_a_pipeline_connects(machine: str, number: int) -> None:
    """Also where Landlock has no rules for TCP."""
    for connects, expected in ((False, REFUSED), (True, ALLOWED)):
        program = filter_program(machine, PID, PATH_AT, connects=connects)
        assert verdict(program, ARCHITECTURES[machine], number) == expected


@MACHINES
def test_a_filter_is_one_that_the_kernel_takes(machine: str) -> None:
    program = filter_program(machine, PID, PATH_AT, connects=False)
    assert len(program) < 4096
    for number, (code, when_true, when_false, operand) in enumerate(program):
        assert 0 <= operand < 1 << 32
        assert max(when_true, when_false) < min(256, len(program) - number - 1) or code == 0x06


def test_no_kernel_is_asked_for_rights_that_it_does_not_know() -> None:
    """What landlock(7) lists: 13 rights at first, then REFER, TRUNCATE, TCP, IOCTL, scopes."""
    files = [handled(abi)[0].bit_count() for abi in range(1, 8)]
    assert files == [13, 14, 15, 15, 16, 16, 16]
    assert [handled(abi)[1:] for abi in (3, 4, 5, 6)] == [(0, 0), (3, 0), (3, 0), (3, 3)]
