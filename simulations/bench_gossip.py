"""The cost of gossip for one core: run `python -m simulations.bench_gossip`.

Taking a record in with its signature, knowing that one is known or old, merging one that was
checked, and comparing the ids of three thousand; beside each what it would cost to check the
signature alone, so that machines can be compared by the ratios. Each figure is the best of several
rounds: what else the machine does can only make it worse.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from p2pmesh.gossip.events import LinkUp, Received
from p2pmesh.gossip.membership import Gossip
from p2pmesh.gossip.ranges import SPLIT, split
from p2pmesh.identity.keys import MeshId, NodeId, SigningKey
from p2pmesh.state.document import Document
from p2pmesh.state.registers import Caps
from p2pmesh.wire.messages import Push
from p2pmesh.wire.records import Record, RecordCheck, seal
from p2pmesh.wire.registers import MEMBER

T = TypeVar("T")

NOW_S = 1_800_000_000
MESH = MeshId(b"a measured mesh ")
PEER = NodeId(b"a linked peer   ")
ROUNDS = 7
RECORDS = 3000
REGISTERS = (MEMBER, "caps", "serving", "models/0")  # of each owner

# What the project promises of itself, in microseconds.
TARGETS: Mapping[str, float] = {"accept_us": 130, "stale_us": 6, "older_us": 6, "merge_us": 10}
NAMES: Mapping[str, str] = {
    "signature_us": "a signature alone",
    "accept_us": "a new record, from its bytes to the document",
    "stale_us": "a record that is known",
    "older_us": "an older version of one that is known",
    "handle_us": "a new record, as a message, through the whole core",
    "merge_us": "a checked record into the document",
    "ranges_us": f"the ids of all, split {SPLIT} ways with fingerprints",
}


def records(count: int, *, seq: int) -> list[Record]:
    """So many records of a quarter as many owners, of about the usual size."""
    owners = -(-count // len(REGISTERS))
    keys = [SigningKey(number.to_bytes(32, "big")) for number in range(1, owners + 1)]
    return [
        seal(
            keys[number % owners],
            mesh=MESH,
            register=REGISTERS[number // owners],
            epoch=NOW_S,
            seq=seq,
            instance=number,
            issued_at=NOW_S + seq,
            ttl_s=3600,
            body=Caps(budget_bytes=(number + 1) << 30, engine="embedded", rpc="").to_wire(),
        )
        for number in range(count)
    ]


def accept(document: Document, check: RecordCheck, raw: bytes) -> bool:
    """Do what the core does with a neighbour's record, but for counting its rate."""
    head = check.peek(raw)
    if head is not None:
        owner, register, epoch, seq = head
        if document.stale(owner, register, epoch, seq):
            return False
        mine = document.get(owner, register)
        if mine is not None and mine.raw == raw:
            return False
    record = check.parse(raw)
    outcome = document.judge(record, NOW_S)
    return (
        outcome.may_count and check.verify(record) and bool(document.merge(record, NOW_S, outcome))
    )


def hear(core: Gossip, raw: bytes) -> None:
    """Do what a node does with a message that brings it one new record."""
    core.handle(Received(node=PEER, message=Push(records=(raw,))), NOW_S)


def measure(count: int = RECORDS, rounds: int = ROUNDS) -> dict[str, float]:
    """Microseconds per operation, the best of the rounds.

    Args:
        count: Records in each round.
        rounds: How often everything is measured.
    """
    check = RecordCheck()
    older, made = records(count, seq=1), records(count, seq=2)
    best: dict[str, float] = {}

    def note(name: str, operation: Callable[[], object], operations: int = count) -> None:
        began = time.perf_counter()
        operation()
        each_us = (time.perf_counter() - began) / operations * 1e6
        best[name] = min(best.get(name, each_us), each_us)

    for _ in range(rounds):
        full, merged = Document(MESH), Document(MESH)
        take = partial(accept, full, check)
        news, old = [one.raw for one in made], [one.raw for one in older]
        known = [bytes(bytearray(raw)) for raw in news]  # as read from a link: other objects
        note("signature_us", partial(_each, check.verify, made))
        note("accept_us", partial(_each, take, news))
        note("stale_us", partial(_each, take, known))
        note("older_us", partial(_each, take, old))
        note("merge_us", partial(_each, partial(_merge, merged), made))
        core = Gossip(key=SigningKey(bytes(32)), mesh=MESH, instance=1, epoch=NOW_S)
        core.start(NOW_S)
        core.handle(LinkUp(node=PEER, version=1), NOW_S)
        note("handle_us", partial(_each, partial(hear, core), news))
        ids = full.ids()  # which are kept from one message to the next
        note("ranges_us", partial(split, ids, b"", b""), 1)
        assert full.fingerprint == merged.fingerprint == core.document.fingerprint
    return {name: round(best[name], 2) for name in NAMES}


def _each(operation: Callable[[T], object], on: Sequence[T]) -> None:
    for one in on:
        operation(one)


def _merge(document: Document, record: Record) -> None:
    document.merge(record, NOW_S)


def show(figures: Mapping[str, float]) -> str:
    """The report as people read it."""
    signature = figures["signature_us"]
    lines = [f"{'':<52}{'µs':>10}{'signatures':>13}{'target':>14}"]
    for name, text in NAMES.items():
        value, target = figures[name], TARGETS.get(name)
        told = "" if target is None else f"{target:g}" + (" MISSED" if value > target else "")
        lines.append(f"{text:<52}{value:>10.2f}{value / signature:>13.3f}{told:>14}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 1 when a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m simulations.bench_gossip")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--quick", action="store_true", help="one short round")
    options = parser.parse_args(arguments)
    figures = measure(count=100, rounds=1) if options.quick else measure()
    print(json.dumps(figures) if options.json else show(figures))
    missed = any(figures[name] > most for name, most in TARGETS.items())
    return 1 if missed and not options.quick else 0


if __name__ == "__main__":
    sys.exit(main())
