"""Starts one engine with few rights: the program between the launcher and a confined engine.

A program of its own, run by file path with `-I -S`: standard library only, nothing of p2pmesh.
It takes rights from itself and then becomes the engine, so the engine has the process id that the
launcher knows and never runs a single instruction with more. Linux alone.

    RULE VALUE … -- COMMAND …          `confinement.rules` writes the rules

- `read PATH`, `list PATH`, `execute PATH`, `device PATH`: what may be opened, with all below it.
  Paths that are not there are passed over, and nothing else can be opened at all.
- `bind PORT`, `connect PORT`: TCP. Landlock knows ports, not addresses. 0 is any port that the
  system chooses.

**Landlock** keeps files, and TCP from ABI 4 of it on. **seccomp** keeps what Landlock leaves
open: sockets of other kinds, TCP Fast Open (it connects without `connect`), modes and times of
files, System V memory, signals to and memory of other processes, namespaces, and the parts of the
kernel that an engine never needs.

Invariant: when anything here fails, the engine does not start; the reason is the only output.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Iterable, Sequence

CANNOT_CONFINE = 126  # the exit code; what shells say of a program that may not be run

# --- Landlock -----------------------------------------------------------------------------------

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_RULE_PATH, _RULE_PORT = 1, 2
_EXECUTE, _WRITE, _READ, _LIST = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_TRUNCATE, _IOCTL = 1 << 14, 1 << 15
_OF_FILES = _EXECUTE | _WRITE | _READ | _TRUNCATE | _IOCTL
_BIND, _CONNECT = 1 << 0, 1 << 1
_ABSTRACT_SOCKETS, _SIGNALS = 1 << 0, 1 << 1

_PATH_RULES = {
    "read": _READ | _LIST,
    "list": _LIST,
    "execute": _READ | _EXECUTE,
    "device": _READ | _WRITE | _IOCTL,
}
_PORT_RULES = {"bind": _BIND, "connect": _CONNECT}

_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
_SECCOMP_MODE_FILTER = 2


def handled(abi: int) -> tuple[int, int, int]:
    """Return the rights that a kernel with this ABI can take: on files, on TCP, across processes.

    Rights that it does not know would make it refuse all of them.
    """
    last = 12 if abi == 1 else 13 if abi == 2 else 14 if abi < 5 else 15
    scoped = _ABSTRACT_SOCKETS | _SIGNALS
    return (2 << last) - 1, _BIND | _CONNECT if abi >= 4 else 0, scoped if abi >= 6 else 0


def landlock_abi() -> int:
    """Return the ABI of this kernel's Landlock, or a negative error number without it."""
    if sys.platform != "linux":
        return -errno.ENOSYS
    try:
        return _call(_libc(), _CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_ulong(1))
    except OSError as exc:
        return -(exc.errno or errno.ENOSYS)


def has_filters() -> bool:
    """Whether this kernel has seccomp filters: it then looks at the missing one, and fails."""
    if sys.platform != "linux":
        return False
    try:
        _prctl(_libc(), _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, None)
    except OSError as exc:
        return exc.errno == errno.EFAULT
    return False


def _restrict(libc: ctypes.CDLL, rules: Sequence[tuple[str, str]]) -> None:
    """Take every right on files and TCP from this process that no rule gives it."""
    files, tcp, scoped = handled(landlock_abi())
    attributes = struct.pack("=QQQ", files, tcp, scoped)
    ruleset = _call(libc, _CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    for kind, value in rules:
        if kind in _PATH_RULES:
            _allow_path(libc, ruleset, value, _PATH_RULES[kind] & files)
        elif rights := _PORT_RULES[kind] & tcp:
            rule = struct.pack("=QQ", rights, int(value))
            _call(libc, _ADD_RULE, ruleset, _RULE_PORT, rule, 0)
    _call(libc, _RESTRICT_SELF, ruleset, 0)


def _allow_path(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH)
    except OSError:  # the engine cannot open it either
        return
    if not os.path.isdir(path):  # noqa: PTH112 - pathlib doubles start-up time
        rights &= _OF_FILES
    _call(libc, _ADD_RULE, ruleset, _RULE_PATH, struct.pack("=Qi", rights, descriptor), 0)
    os.close(descriptor)


# --- seccomp ------------------------------------------------------------------------------------

# The numbers of x86_64 and of aarch64, which lacks the old forms of some calls.
_CALLS: dict[str, tuple[int, int | None]] = {
    "ioctl": (16, 29), "socket": (41, 198), "connect": (42, 203), "sendto": (44, 206),
    "sendmsg": (46, 211), "clone": (56, 220), "execve": (59, 221), "kill": (62, 129),
    "fcntl": (72, 25), "rt_sigqueueinfo": (129, 138), "setpriority": (141, 140),
    "tgkill": (234, 131), "rt_tgsigqueueinfo": (297, 240), "prlimit64": (302, 261),
    "sendmmsg": (307, 269), "clone3": (435, 435),
}  # fmt: skip

# Refused whatever is asked of them.
_REFUSED: dict[str, tuple[int, int | None]] = {
    # Other processes, and other programs.
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "tkill": (200, 130),
    "execveat": (322, 281),
    # Ways to other processes that no file and no socket stands for.
    "socketpair": (53, 199), "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195),
    "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192),
    "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187),
    "mq_open": (240, 180), "mq_unlink": (241, 181), "mq_notify": (244, 184),
    # What Landlock lets everybody do to a file: its mode, owner, times and attributes.
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "truncate": (76, 45),
    # Parts of the kernel that have no use here and had many faults.
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "modify_ldt": (154, None), "fanotify_init": (300, 262), "personality": (135, 92),
    # Namespaces, mounts, and what only an administrator may do: the node may be one.
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171),
    "sethostname": (170, 161), "setdomainname": (171, 162), "iopl": (172, None),
    "ioperm": (173, None), "syslog": (103, 116), "vhangup": (153, 58),
}  # fmt: skip

# The first number that nobody had looked at when these tables were made. Beyond are x86's calls
# with 32-bit pointers as well. All of it "does not exist", so that libraries take the older way.
_UNKNOWN = 463

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_ANY = 0xFFFFFFFF
_NAMESPACES = 0x7E020080  # CLONE_NEW* of `clone`
_FAST_OPEN = 0x20000000  # MSG_FASTOPEN
_OWNER_OF_SIGNALS = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: signals by way of a file
_FIOSETOWN, _SIOCSPGRP, _TIOCSTI, _TIOCLINUX = 0x8901, 0x8902, 0x5412, 0x541C
_INET, _INET6, _STREAM, _TCP = 2, 10, 1, 6  # MPTCP, 262, would pass by Landlock

# (argument, mask, values, wanted): whether the masked argument is one of the values must be
# `wanted`. Arguments are 32-bit numbers here.
_Check = tuple[int, int, tuple[int, ...], bool]

_LOAD, _EQUAL, _AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
_NO_SUCH_CALL = 0x00050000 | errno.ENOSYS
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand


def is_known_machine(machine: str) -> bool:
    """Whether the numbers of this architecture's system calls are known here."""
    return machine in _ARCHITECTURES and sys.maxsize > 1 << 32


def filter_program(machine: str, pid: int, path_at: int, *, connects: bool) -> list[Instruction]:
    """Return the seccomp filter of an engine.

    Args:
        machine: The architecture, as `os.uname` names it.
        pid: The process that may be signalled: the engine itself.
        path_at: The address of the only path that may be executed.
        connects: Whether it may connect to anything; where to is Landlock's to say.
    """
    column, architecture = _ARCHITECTURES[machine]
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_AT_LEAST, 0, 1, _UNKNOWN),
        (_RETURN, 0, 0, _NO_SUCH_CALL),
        # Its flags are in memory, where no filter can look; libraries fall back to `clone`.
        *_when(_CALLS["clone3"][column], [(_RETURN, 0, 0, _NO_SUCH_CALL)]),
        *_when(_CALLS["execve"][column], _only_path(path_at)),
    ]
    for name, checks in _checks(pid).items():
        program += _when(_CALLS[name][column], _all_of(checks))
    refused = [*_REFUSED.values(), *([] if connects else [_CALLS["connect"]])]
    for numbers in refused:
        program += _when(numbers[column], [(_RETURN, 0, 0, _REFUSE)])
    return [*program, (_RETURN, 0, 0, _ALLOW)]


def _checks(pid: int) -> dict[str, list[_Check]]:
    own: list[_Check] = [(0, _ANY, (pid,), True)]
    return {
        "socket": [
            (0, _ANY, (_INET, _INET6), True),
            (1, 0xF, (_STREAM,), True),
            (2, _ANY, (0, _TCP), True),
        ],
        "sendto": [(3, _FAST_OPEN, (0,), True)],
        "sendmsg": [(2, _FAST_OPEN, (0,), True)],
        "sendmmsg": [(3, _FAST_OPEN, (0,), True)],
        "clone": [(0, _NAMESPACES, (0,), True)],
        "kill": own,
        "tgkill": own,
        "rt_sigqueueinfo": own,
        "rt_tgsigqueueinfo": own,
        "fcntl": [(1, _ANY, _OWNER_OF_SIGNALS, False)],
        "ioctl": [(1, _ANY, (_FIOSETOWN, _SIOCSPGRP, _TIOCSTI, _TIOCLINUX), False)],
        "prlimit64": [(0, _ANY, (0, pid), True)],
        "setpriority": [(1, _ANY, (0,), True)],
    }


def _when(number: int | None, then: list[Instruction]) -> list[Instruction]:
    """Return what decides about one call and passes on the others; the number stays loaded."""
    return [] if number is None else [(_EQUAL, 0, len(then), number), *then]


def _all_of(checks: Iterable[_Check]) -> list[Instruction]:
    decided: list[Instruction] = []
    for argument, mask, values, wanted in checks:
        decided += [(_LOAD, 0, 0, _ARGUMENTS_AT + 8 * argument), (_AND, 0, 0, mask)]
        # A match leaves the comparisons: to the next check, or to the refusal just before it.
        for left in range(len(values), 0, -1):
            matched = left if wanted else left - 1
            missed = 0 if left > 1 or wanted else 1
            decided.append((_EQUAL, matched, missed, values[-left]))
        decided.append((_RETURN, 0, 0, _REFUSE))
    return [*decided, (_RETURN, 0, 0, _ALLOW)]


def _only_path(path_at: int) -> list[Instruction]:
    """Allow to execute the path at one address. A guess costs the process that makes it."""
    return [
        (_LOAD, 0, 0, _ARGUMENTS_AT),
        (_EQUAL, 0, 3, path_at & _ANY),
        (_LOAD, 0, 0, _ARGUMENTS_AT + 4),
        (_EQUAL, 0, 1, path_at >> 32),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _KILL),
    ]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _filter(libc: ctypes.CDLL, program: Sequence[Instruction]) -> None:
    """Put a filter before all system calls of this process and of those that it starts."""
    packed = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    loaded = _Program(len(program), packed)
    _prctl(libc, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(loaded))


# --- the program --------------------------------------------------------------------------------


def main(words: Sequence[str]) -> int:
    """Become the command under the rules.

    Returns:
        An exit code, only when that failed.
    """
    split = words.index("--")
    rules = list(zip(words[0:split:2], words[1:split:2], strict=True))
    command = words[split + 1 :]
    libc = _libc()
    step = "no_new_privs"
    try:
        _prctl(libc, _PR_SET_NO_NEW_PRIVS, 1, 0)
        step = "Landlock"
        _restrict(libc, rules)
        step = "seccomp"
        path = _at_secret_place(libc, os.fsencode(command[0]))
        connects = any(kind == "connect" for kind, _ in rules)
        program = filter_program(os.uname().machine, os.getpid(), path, connects=connects)
        _filter(libc, program)
        step = "start"
        _execute(libc, path, command)
    except OSError as exc:
        os.write(1, f"error: the engine cannot be confined: {step}: {exc.strerror}\n".encode())
    return CANNOT_CONFINE


def _at_secret_place(libc: ctypes.CDLL, path: bytes) -> int:
    """Return the address of a copy of the path, where nobody can guess it.

    The filter lets this address be executed, once: the copy goes with the memory of this program,
    and the engine does not know where it was. 46 bits are half of a program's addresses, 38 are
    those of small ARM kernels.
    """
    libc.mmap.restype = ctypes.c_void_p
    size = 2 * len(path) + 8192
    read_write, private_anonymous_exactly_there = 3, 0x100022
    for bits in (46, 46, 38, 38):
        secret = (int.from_bytes(os.urandom(8), "little") & ((1 << bits) - 1)) | 1 << 32
        page = ctypes.c_void_p(secret & ~0xFFFF)
        done = libc.mmap(
            page, ctypes.c_size_t(size + 0x10000), read_write,
            private_anonymous_exactly_there, -1, ctypes.c_long(0),
        )  # fmt: skip
        if done == page.value:
            ctypes.memmove(secret, path + b"\0", len(path) + 1)
            return secret
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def _execute(libc: ctypes.CDLL, path: int, command: Sequence[str]) -> None:
    arguments = [os.fsencode(word) for word in command]
    environment = [name + b"=" + value for name, value in os.environb.items()]
    libc.execve(
        ctypes.c_void_p(path),
        (ctypes.c_char_p * (len(arguments) + 1))(*arguments, None),
        (ctypes.c_char_p * (len(environment) + 1))(*environment, None),
    )
    raise _error()


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _prctl(libc: ctypes.CDLL, option: int, first: int, second: object) -> None:
    unused = ctypes.c_ulong(0)
    if libc.prctl(option, ctypes.c_ulong(first), second, unused, unused) < 0:
        raise _error()


def _call(libc: ctypes.CDLL, number: int, *arguments: object) -> int:
    done: int = libc.syscall(ctypes.c_long(number), *arguments)
    if done < 0:
        raise _error()
    return done


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
