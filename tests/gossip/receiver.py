"""A `Receiver` with what stands behind it, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from p2pmesh.errors import PeerError
from p2pmesh.gossip.receive import PushResult, Receiver
from p2pmesh.wire.evidence import parse_fork
from p2pmesh.wire.messages import Push
from p2pmesh.wire.records import Record, RecordCheck, digest_of, parse, verify_record
from p2pmesh.wire.registers import CAPS
from p2pmesh.wire.statements import Statement
from tests.gossip.builders import STARTED, View, mesh_of
from tests.state.builders import NODES, NOW, record

ME, PEER = NODES[0], NODES[7]


class Inlet:
    """The receiver of node 0 with what stands behind it, and a count of checked signatures."""

    def __init__(self, view: View | None = None) -> None:
        self.view = view or mesh_of(5)
        self.verified: list[Record] = []
        self.parsed: list[bytes] = []
        check = RecordCheck(verify=self._verify, parse=self._parse)
        self.receiver = Receiver(ME, self.view.document, self.view.removal, check)

    def _verify(self, one: Record) -> bool:
        self.verified.append(one)
        return verify_record(one)

    def _parse(self, raw: bytes) -> Record:
        self.parsed.append(raw)
        return parse(raw)

    def take(
        self,
        *records: Record | bytes,
        statements: Sequence[Statement | bytes] = (),
        forks: Sequence[bytes] = (),
        certificates: Sequence[bytes] = (),
        asked: bool = False,
        at: float = NOW,
    ) -> PushResult:
        raws = tuple(one if isinstance(one, bytes) else one.raw for one in records)
        facts = Push(
            statements=tuple(one if isinstance(one, bytes) else one.raw for one in statements),
            records=raws,
            forks=tuple(forks),
            certificates=tuple(certificates),
            asked=asked,
        )
        wanted = {digest_of(raw) for raw in raws} if asked else set[bytes]()
        wanted |= {one.id for one in statements if isinstance(one, Statement) and asked}
        for raw in forks if asked else ():
            with suppress(PeerError):
                wanted.add(parse_fork(raw, RecordCheck()).id)
        taken = self.receiver.take(PEER, facts, at, at, wanted)
        self.view.refresh(taken.owners)
        return taken


def caps(owner: int = 1, seq: int = 1, **changes: Any) -> Record:
    return record(owner, CAPS, **{"epoch": STARTED, "seq": seq, **changes})
