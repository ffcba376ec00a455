"""What gossip costs one core: run `python -m simulations.bench_gossip`.

Accepting a record with its signature, one that is stale, merging one that was checked, and the
summary of a thousand records; beside each what it would cost to check the signature alone, so
that machines can be compared by the ratios. Each figure is the best of several rounds: what else
the machine does can only make it worse.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from p2pmesh.gossip.events import Received
from p2pmesh.gossip.membership import Gossip
from p2pmesh.identity.keys import NodeId
from p2pmesh.state.document import Document
from p2pmesh.wire.messages import Records, Summary, encode_message
from p2pmesh.wire.records import Record, parse, seal, verify_record
from simulations.node import START_S
from simulations.world import MESH, caps, key_of

ROUNDS = 7
PEER = NodeId(b"a linked peer   ")

# What the project promises of itself, in microseconds.
TARGETS: Mapping[str, float] = {"accept_us": 130, "stale_us": 6}
NAMES: Mapping[str, str] = {
    "signature_us": "a signature alone",
    "accept_us": "a new record, from its bytes to the document",
    "stale_us": "a record that is known",
    "handle_us": "a new record, as a message, through the whole core",
    "merge_us": "a checked record into the document",
    "summary_us": "the summary of 1000 records, encoded",
}


def records(count: int) -> list[Record]:
    """So many records of so many owners, of about the usual size."""
    return [
        seal(
            key_of(0, number % 250),
            mesh=MESH,
            register=f"x/{number // 250}",
            epoch=START_S,
            seq=1,
            instance=number,
            issued_at=START_S,
            ttl_s=3600,
            body=caps(number + 1).body or {},
        )
        for number in range(count)
    ]


def accept(document: Document, raw: bytes) -> bool:
    """What the core does with a record that a peer sends."""
    record = parse(raw)
    return document.judge(record, START_S).value == "news" and (
        verify_record(record) and document.merge(record, START_S)
    )


def measure(count: int = 1000, rounds: int = ROUNDS) -> dict[str, float]:
    """Microseconds per operation, the best of the rounds.

    Args:
        count: Records in each round, at most 16000.
        rounds: How often everything is measured.
    """
    made = records(count)
    raws = [record.raw for record in made]
    said = [encode_message(Records(records=(raw,))) for raw in raws]
    best: dict[str, float] = {}

    def note(name: str, operation: Callable[[], object], operations: int) -> None:
        began = time.perf_counter()
        operation()
        each_us = (time.perf_counter() - began) / operations * 1e6
        best[name] = min(best.get(name, each_us), each_us)

    for _ in range(rounds):
        full = Document(MESH)
        core = Gossip(key=key_of(0, 999), mesh=MESH, instance=1, epoch=START_S)
        core.start(START_S)
        note("signature_us", lambda: [verify_record(record) for record in made], count)
        note("accept_us", partial(_each, partial(accept, full), raws), count)
        note("stale_us", partial(_each, partial(accept, full), raws), count)
        note("handle_us", partial(_hear, core, said), count)
        empty = Document(MESH)
        note("merge_us", partial(_merge, empty, made), count)
        assert full.fingerprint == empty.fingerprint == core.document.fingerprint
        note("summary_us", partial(_summary, full), 1)
    return {name: round(value, 2) for name, value in best.items()}


def _each(operation: Callable[[bytes], object], raws: Sequence[bytes]) -> None:
    for raw in raws:
        operation(raw)


def _hear(core: Gossip, said: Sequence[bytes]) -> None:
    for message in said:
        core.handle(Received(node=PEER, message=message), START_S)


def _merge(document: Document, made: Sequence[Record]) -> None:
    for record in made:
        document.merge(record, START_S)


def _summary(document: Document) -> bytes:
    return encode_message(Summary(versions=document.versions(), answer=False))


def show(figures: Mapping[str, float]) -> str:
    """The report as people read it."""
    signature = figures["signature_us"]
    lines = [f"{'':<52}{'µs':>10}{'signatures':>13}{'target':>9}"]
    for name, text in NAMES.items():
        value, target = figures[name], TARGETS.get(name)
        told = "" if target is None else f"{target:g}" + (" MISSED" if value > target else "")
        lines.append(f"{text:<52}{value:>10.2f}{value / signature:>13.3f}{told:>9}")
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
