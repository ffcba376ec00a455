"""One process that runs discovery alone and prints what it hears.

Usage: python -m tests.mesh.discoverer NAME beacon|mdns announce|listen
"""

from __future__ import annotations

import sys
import time

import trio

from p2pmesh.discovery.service import Discovery
from p2pmesh.log import configure
from tests.discovery.networks import announcement, node_id


async def _discover(name: str, way: str, role: str) -> None:
    found = Discovery(
        node_id(name), name, 9338, with_beacon=way == "beacon", with_mdns=way == "mdns"
    )
    if role == "announce":
        found.announce(announcement(name, mesh=f"mesh-of-{name}"))
    shown = set()
    async with trio.open_nursery() as nursery:
        started, seen = time.monotonic(), found.changes.count
        await nursery.start(found.run)
        _say("ready")
        while True:
            seen = await found.changes.wait(seen)
            now = trio.current_time()
            for mesh in found.heard.meshes(now):
                for address in found.heard.addresses(mesh.id, now):
                    if (mesh.name, address) not in shown:
                        shown.add((mesh.name, address))
                        after_s = time.monotonic() - started
                        _say(f"{mesh.name} {address.host} {after_s:.3f}")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    configure(None, debug=False)
    trio.run(_discover, sys.argv[1], sys.argv[2], sys.argv[3])
