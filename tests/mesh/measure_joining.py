"""Measures how long joining takes, between machines of their own networks: run it as root.

    python -m tests.mesh.measure_joining

One line per figure. The times begin with the start of the process, Python's own start included.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import trio

from p2pmesh.config import Address
from p2pmesh.identity.hello import JOIN, LocalIdentity
from p2pmesh.identity.keys import SigningKey
from p2pmesh.identity.tokens import parse_token, prove
from p2pmesh.node.admission import ask_with
from p2pmesh.transport.tls import TlsTransport
from tests.mesh.hostile import QUESTION
from tests.mesh.namespaces import Host, network
from tests.mesh.nodes import environment, program

PORT = 9338
ADMISSIONS = 50
DEADLINE_S = 60.0
POLL_S = 0.02


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@dataclass
class Laptop:
    """A host and the node that was started on it."""

    host: Host
    home: Path
    process: subprocess.Popen[bytes]
    started: float

    def run_file(self) -> dict[str, Any]:
        try:
            fields: dict[str, Any] = json.loads((self.home / "run.json").read_text())
        except FileNotFoundError:
            return {}
        return fields

    def get(self, which: str, path: str, said: object = None) -> dict[str, Any]:
        run = self.run_file()
        headers = {"Authorization": f"Bearer {run['token']}", "Content-Type": "application/json"}
        data = None if said is None else json.dumps(said).encode()
        request = urllib.request.Request(f"http://{run[which]}{path}", data, headers)
        with self.host.inside(), urllib.request.urlopen(request, timeout=DEADLINE_S) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def sees(self, count: int) -> bool:
        """Whether this node sees so many live members, itself included."""
        if not self.run_file():
            return False
        nodes = self.get("console", "/api/status")["nodes"]
        return [one["state"] for one in nodes] == ["live"] * count


@contextmanager
def up(host: Host, folder: Path, *options: str) -> Iterator[Laptop]:
    home = folder / host.name
    command = ["up", "--json", "--until-eof", f"--home={home}", *options]
    started = time.monotonic()
    process = subprocess.Popen(
        [*host.command, *program(), *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=environment(),
    )
    try:
        yield Laptop(host, home, process, started)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def when(true: Callable[[], bool]) -> float:
    """Poll until it is so; returns the time."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < DEADLINE_S
        time.sleep(POLL_S)
    return time.monotonic()


def together(folder: Path) -> None:
    """Three laptops start in the same moment; then a fourth, and one with a token."""
    with network() as net, ExitStack() as stack:
        lan = net.lan()
        net.gateway(lan)
        hosts = [net.host(lan, name) for name in ("one", "two", "three")]
        laptops = [stack.enter_context(up(host, folder)) for host in hosts]
        at = when(lambda: all(one.sees(3) for one in laptops))
        say(f"three at once: {at - laptops[-1].started:.2f} s from the last start to one mesh")
        when(lambda: all(one.get("api", "/v1/models")["data"] for one in laptops))
        time.sleep(5.0)

        late = stack.enter_context(up(net.host(lan, "late"), folder))
        at = when(lambda: late.sees(4))
        say(f"a fourth, plain: {at - late.started:.2f} s from its start to joined")
        time.sleep(5.0)

        founder = next(one for one in laptops if _may_invite(one))
        token = founder.get("console", "/api/orders/invite", {"uses": 0})["token"]
        say(f"a token: {len(token)} characters")
        guest = stack.enter_context(
            up(net.host(lan, "guest"), folder, "--no-discovery", f"--join={token}")
        )
        when(lambda: bool(guest.run_file()))
        said = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8}
        guest.get("api", "/v1/chat/completions", said)
        at = time.monotonic()
        say(f"a fifth, by token: {at - guest.started:.2f} s from its start to an answer")
        _admissions(founder, token)


def _may_invite(laptop: Laptop) -> bool:
    try:
        laptop.get("console", "/api/orders/invite", {"uses": 1})
    except urllib.error.HTTPError:
        return False
    return True


def _admissions(founder: Laptop, token: str) -> None:
    node = psutil.Process(founder.run_file()["pid"])
    before = node.cpu_times()
    time.sleep(5.0)
    resting = node.cpu_times()
    began = time.monotonic()
    with founder.host.inside():
        trio.run(_join_often, token, Address(founder.host.address, PORT))
    took_s, after = time.monotonic() - began, node.cpu_times()
    idle_s = (resting.user + resting.system - before.user - before.system) / 5.0
    busy_s = after.user + after.system - resting.user - resting.system
    each_ms = 1000 * (busy_s - idle_s * took_s) / ADMISSIONS
    say(f"CPU of an admission: {each_ms:.1f} ms, of {ADMISSIONS} one after the other")


def _transport(me: LocalIdentity) -> TlsTransport:
    return TlsTransport(lambda: me, [])


async def _join_often(text: str, address: Address) -> None:
    token = parse_token(text)
    for _ in range(ADMISSIONS):
        me = LocalIdentity(key=SigningKey(secrets.token_bytes(32)), instance=1, mesh=None)
        asked = await _transport(me).ask(address, JOIN, replace(me, mesh=token.mesh))
        async with asked.stream:
            proof = prove(token, node=me.key.public, binding=asked.peer.binding)
            await ask_with(asked.stream, {"i": token.key.public, "s": proof})


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        together(Path(folder))
