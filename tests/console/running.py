"""Starts consoles as processes, for tests that need a server outside their own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.console.fake import SELF_ID, TOKEN

ROOT = Path(__file__).parents[2]
STOP_S = 10.0


class Console:
    """A console process that shows what it is told."""

    def __init__(self, port: int = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.console.process", str(port)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def show(self, status: dict[str, Any]) -> None:
        """Show another status from now on."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(status) + "\n")
        self.process.stdin.flush()

    def stop(self) -> int:
        """Stop it gracefully; its exit code."""
        self.process.communicate(timeout=STOP_S)
        return self.process.returncode


@contextmanager
def console(port: int = 0) -> Iterator[Console]:
    """A console process, gone at the end."""
    running = Console(port)
    try:
        yield running
    finally:
        running.process.kill()  # does nothing to one that ended
        with contextlib.suppress(ValueError):  # its pipes were closed when it was stopped
            running.process.communicate()


def write_run_file(path: Path, *, pid: int, console_port: int, api_port: int = 9) -> dict[str, Any]:
    """Write what a node would write into its `run.json`; returns it."""
    fields = {
        "pid": pid,
        "api": f"127.0.0.1:{api_port}",
        "console": f"127.0.0.1:{console_port}",
        "peer": "0.0.0.0:9338",
        "token": TOKEN,
        "id": SELF_ID,
        "name": "kitchen-pc",
        "mesh": {"id": "q7zp4v2mk3dxn5hcyw6tb8j9ra", "name": "amber-otter"},
        "started_at": 1_790_000_000,
    }
    path.write_text(json.dumps(fields))
    path.chmod(0o600)
    return fields
