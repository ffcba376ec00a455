"""What a stage would do whose head took it over: one attempt, named in the first argument.

A program of its own. It ends with 0 when the attempt worked, with REFUSED when the system refused
it, and with what Python gives it when anything else went wrong.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

REFUSED = 77
UNAVAILABLE = 78  # this system refuses it to everybody

_libc = ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: object) -> int:
    done: int = _libc.syscall(ctypes.c_long(number), *arguments)
    if done < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return done


def read_file(path: str) -> None:
    with open(path) as file:  # noqa: PTH123
        file.read()


def write_file(path: str) -> None:
    with open(path, "w"):  # noqa: PTH123
        pass


def list_folder(path: str) -> None:
    os.listdir(path)  # noqa: PTH208


def truncate(path: str) -> None:
    os.truncate(path, 0)


def chmod(path: str) -> None:
    os.chmod(path, 0o644)  # noqa: PTH101


def touch(path: str) -> None:
    os.utime(path)


def connect(port: str) -> None:
    socket.create_connection(("127.0.0.1", int(port))).close()


def connect_fast(port: str) -> None:
    with socket.socket() as client:
        client.sendto(b"x", socket.MSG_FASTOPEN, ("127.0.0.1", int(port)))


def listen(port: str) -> None:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", int(port)))
        server.listen()


def udp(_: str) -> None:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()


def unix(_: str) -> None:
    socket.socket(socket.AF_UNIX).close()


def netlink(_: str) -> None:
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()


def mptcp(_: str) -> None:
    socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262).close()


def pair(_: str) -> None:
    for one in socket.socketpair():
        one.close()


def execute(path: str) -> None:
    child = os.fork()
    if child == 0:
        os.execv(path, [path, "-c", ""])
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise PermissionError(errno.EPERM, signal.Signals(os.WTERMSIG(status)).name)


def kill(pid: str) -> None:
    os.kill(int(pid), signal.SIGCONT)


def signal_by_file(pid: str) -> None:
    import fcntl

    read, _ = os.pipe()
    fcntl.fcntl(read, fcntl.F_SETOWN, int(pid))


def limit(pid: str) -> None:
    import resource

    resource.prlimit(int(pid), resource.RLIMIT_CORE)


@contextmanager
def _child() -> Iterator[int]:
    """A process that ends by itself: a confined one may not signal its own child."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    try:
        yield child
    finally:
        os.close(write)
        os.close(read)
        os.waitpid(child, 0)


def trace(_: str) -> None:
    with _child() as child:
        _libc.ptrace.restype = ctypes.c_long
        seize, detach = 0x4206, 17
        if _libc.ptrace(seize, child, None, None) < 0:
            raise OSError(ctypes.get_errno(), "ptrace")
        _libc.ptrace(detach, child, None, None)


def read_memory(_: str) -> None:
    word = ctypes.create_string_buffer(8)
    there = struct.pack("PN", ctypes.addressof(word), 8)
    with _child() as child:
        done = _libc.process_vm_readv(child, there, ctypes.c_ulong(1), there, ctypes.c_ulong(1), 0)
        if done < 0:
            raise OSError(ctypes.get_errno(), "process_vm_readv")


def shared_memory(_: str) -> None:
    segment = _libc.shmget(0, 4096, 0o1600)
    if segment < 0:
        raise OSError(ctypes.get_errno(), "shmget")
    _libc.shmctl(segment, 0, None)


def namespace(_: str) -> None:
    if _libc.unshare(0x10000000) < 0:
        raise OSError(ctypes.get_errno(), "unshare")


def io_uring(_: str) -> None:
    os.close(_call(425, 1, bytes(120)))


def thread_and_fork(_: str) -> None:
    thread = threading.Thread(target=bytes)
    thread.start()
    thread.join()
    with _child():
        pass


ATTEMPTS: dict[str, Callable[[str], None]] = {
    attempt.__name__: attempt
    for attempt in (
        read_file, write_file, list_folder, truncate, chmod, touch, connect, connect_fast, listen,
        udp, unix, netlink, mptcp, pair, execute, kill, signal_by_file, limit, trace, read_memory,
        shared_memory, namespace, io_uring, thread_and_fork,
    )
}  # fmt: skip

if __name__ == "__main__":
    try:
        ATTEMPTS[sys.argv[1]](sys.argv[2])
    except OSError as exc:
        if exc.errno in (errno.EPERM, errno.EACCES):
            sys.exit(REFUSED)
        if exc.errno in (errno.ENOSYS, errno.EPROTONOSUPPORT, errno.ENOSPC):
            sys.exit(UNAVAILABLE)
        raise
