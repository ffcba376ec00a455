"""Starts one engine, keeps its log, and takes it along when the node goes away.

A program of its own, run by file path with `-I -S`: standard library only, nothing of p2pmesh.

    node ──pipe──► launcher ──► engine
         ◄─lines──          ◄─output──

- **Nothing survives the node.** The node holds the write end of the launcher's standard input and
  never closes it while it lives. End of file means that the node is gone, by whatever means: the
  launcher kills its whole process group, itself included. A byte `t` asks the engine to end in
  its own way (SIGTERM).
- A stopped launcher goes as well: it has a process group of its own, and the kernel sends SIGHUP
  and SIGCONT to a stopped group whose parent ended.
- On Linux the engine also dies with the launcher (PR_SET_PDEATHSIG). That signal follows the
  forking *thread*, so it would be a trap in the node, whose threads come and go; here the main
  thread forks once and stays. On macOS the node kills the group when a launcher dies. On Windows
  nobody but the launcher can end an engine whose launcher was killed from the task manager.
- The engine writes into the launcher, not into the node: a busy or stopped node never blocks it,
  and lines that nobody reads cost the node nothing.

Lines to the node: `pid N`, `log TEXT` (what the engine says until it listens, and its last words),
`listening HOST PORT`, `exit CODE`.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import IO, BinaryIO

# Two files of this size are kept: enough for days of requests, too little to fill a disk.
LOG_BYTES_MAX = 4 * 1024 * 1024
LAST_WORDS_LINES = 40
LINE_BYTES_MAX = 4096


class Log:
    """A log file of bounded size with one older generation beside it.

    A disk that is full or gone costs the log, never the engine.
    """

    def __init__(self, path: str, size_bytes_max: int = LOG_BYTES_MAX) -> None:
        self._path = path
        self._max = size_bytes_max
        self._file: BinaryIO | None = None
        self._size = 0

    def write(self, line: bytes) -> None:
        """Appends one line, end of line included; starts a new file when this one is full."""
        try:
            if self._file is None:
                self._open()
            if self._size + len(line) > self._max and self._size > 0:
                self.close()
                os.replace(self._path, f"{self._path}.1")  # noqa: PTH105 - doubles start-up time
                self._open()
            assert self._file is not None
            self._file.write(line)
            self._size += len(line)
        except OSError:
            self.close()

    def close(self) -> None:
        """Closes the file; a further line opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._file = os.fdopen(descriptor, "ab", buffering=0)
        self._size = self._file.tell()


def main(arguments: list[str]) -> int:
    """Run `LOGFILE LISTENING -- COMMAND…` until the engine or the node ends.

    LISTENING is a regular expression for the line in which the engine says where it listens; its
    two groups are host and port.

    Returns:
        The engine's exit code; 127 when it could not be started.
    """
    log_path, listening, separator, *command = arguments
    assert separator == "--"
    secret = os.environ.get("LLAMA_API_KEY", "").encode()
    try:
        engine = _start(command)
    except OSError as exc:
        _tell(f"log error: cannot start {command[0]}: {exc.strerror}".encode())
        _tell(b"exit 127")
        return 127
    _tell(b"pid %d" % engine.pid)
    threading.Thread(target=_watch_node, args=(engine,), daemon=True).start()
    assert engine.stdout is not None
    log = Log(log_path)
    last_words = _follow(engine.stdout, re.compile(listening.encode()), log, secret)
    log.close()
    code = engine.wait()
    for line in last_words:
        _tell(b"log " + line)
    _tell(b"exit %d" % code)
    return code if code >= 0 else 128 - code


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # Python ignores SIGPIPE, and so shall the engine: ggml-rpc-server would end with any
        # client that hangs up before it was answered.
        restore_signals=False,
        # Safe here, where no other thread runs yet.
        preexec_fn=_die_with_me(os.getpid()) if sys.platform == "linux" else None,  # noqa: PLW1509
    )


def _die_with_me(launcher_pid: int) -> Callable[[], None]:
    import ctypes

    prctl = ctypes.CDLL(None).prctl  # looked up before the fork

    def arrange() -> None:
        prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != launcher_pid:  # it died between fork and prctl
            os._exit(1)

    return arrange


def _watch_node(engine: subprocess.Popen[bytes]) -> None:
    while byte := os.read(0, 1):
        if byte == b"t":
            engine.terminate()
    if sys.platform == "win32":
        engine.kill()
        os._exit(1)
    os.killpg(0, signal.SIGKILL)


def _follow(
    output: IO[bytes], listening: re.Pattern[bytes], log: Log, secret: bytes
) -> deque[bytes]:
    """Read the engine's output to its end and return the last lines of it."""
    is_listening = False
    last_words: deque[bytes] = deque(maxlen=LAST_WORDS_LINES)
    while line := output.readline(LINE_BYTES_MAX):
        if secret:
            line = line.replace(secret, b"***")
        log.write(line if line.endswith(b"\n") else line + b"\n")
        line = line.rstrip()
        if not is_listening:
            _tell(b"log " + line)
            match = listening.search(line)
            if match is not None:
                _tell(b"listening %s %s" % (match[1].strip(b"[]"), match[2]))
                is_listening = True
        elif line:
            last_words.append(line)
    return last_words


def _tell(line: bytes) -> None:
    # When the node is gone this fails; end of file on standard input deals with that.
    with contextlib.suppress(OSError):
        os.write(1, line[:LINE_BYTES_MAX] + b"\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
