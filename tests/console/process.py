"""A console as a process of its own, fed over its standard input; run as a script.

Prints its port as one line. Each line that comes in is a status as JSON, shown from then on;
the end of the input, or a call of its API, stops it gracefully.
"""

from __future__ import annotations

import json
import sys

import trio

from p2pmesh.console.api import create_app
from p2pmesh.console.serve import serve
from tests.console.fake import FakeNode


async def main(port: int) -> None:
    """Serve a fake node on `port` of loopback (0: a free one)."""
    node = FakeNode()
    app = create_app(node)
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
        await nursery.start(serve, app, listeners)
        print(listeners[0].socket.getsockname()[1], flush=True)  # noqa: T201 - the answer
        nursery.start_soon(_until_stopped, node, nursery.cancel_scope)
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            node.set_status(json.loads(line))
        nursery.cancel_scope.cancel()


async def _until_stopped(node: FakeNode, scope: trio.CancelScope) -> None:
    await node.stopped.wait()
    scope.cancel()


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]))
