"""The caches that simulated nodes share; a node notices only the time that they save.

Records are read once and their signatures are checked once for all, equal parts of documents exist
once, and each set of members has one overlay. All of it follows from the arguments alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar

from p2pmesh.gossip.overlay import Overlay
from p2pmesh.gossip.shared import MemberInfo, Shared, read_accused, read_member
from p2pmesh.identity.keys import NodeId
from p2pmesh.state.owner_records import OwnerRecords
from p2pmesh.wire.evidence import Accusation
from p2pmesh.wire.records import (
    Head,
    Record,
    RecordCheck,
    digest_of,
    parse,
    peek,
    verify_record,
)

OVERLAYS = 256  # sets of members that different nodes may hold at one time
RECORDS = 200_000  # remembered; those of an hour at 1000 nodes come to a tenth of that

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Remembered(dict[K, V]):
    """A function's answers, for as long as few enough questions are asked; then it starts anew."""

    __slots__ = ("_answer", "_most")

    def __init__(self, answer: Callable[[K], V], most: int = RECORDS) -> None:
        super().__init__()
        self._answer, self._most = answer, most

    def __missing__(self, question: K) -> V:
        if len(self) >= self._most:
            self.clear()
        answer = self[question] = self._answer(question)
        return answer


class Memory:
    """The memory of one world."""

    def __init__(self) -> None:
        self.archive: dict[bytes, Record] = {}  # every record that was ever read, oldest first
        self._peeked: Remembered[bytes, Head | None] = Remembered(peek)
        self._digests: Remembered[bytes, bytes] = Remembered(digest_of)
        self._verified: dict[bytes, bool] = {}
        self._members: dict[bytes, MemberInfo | None] = {}
        self._accused: dict[bytes, tuple[Accusation, ...]] = {}
        self._held: OrderedDict[OwnerRecords, OwnerRecords] = OrderedDict()
        self._grown: dict[tuple[tuple[bytes, ...], bytes], OwnerRecords] = {}
        self._overlays: OrderedDict[frozenset[tuple[NodeId, bool]], Overlay] = OrderedDict()
        self.shared = Shared(
            check=RecordCheck(
                peek=self._peeked.__getitem__,
                digest=self._digests.__getitem__,
                parse=self._parse,
                verify=self._verify,
            ),
            overlay=self._overlay,
            member=self._member,
            accused=self._accusations,
            held=self._intern,
            grown=self._grow,
            homes={},
        )

    def _parse(self, raw: bytes) -> Record:
        record = self.archive.get(raw)
        if record is None:
            record = self.archive[raw] = parse(raw)
        return record

    def _verify(self, record: Record) -> bool:
        good = self._verified.get(record.raw)
        if good is None:
            good = self._verified[record.raw] = verify_record(record)
        return good

    def _member(self, record: Record) -> MemberInfo | None:
        if record.raw not in self._members:
            self._members[record.raw] = read_member(record)
        return self._members[record.raw]

    def _accusations(self, record: Record) -> tuple[Accusation, ...]:
        rows = self._accused.get(record.raw)
        if rows is None:
            rows = self._accused[record.raw] = read_accused(record)
        return rows

    def _intern(self, held: OwnerRecords) -> OwnerRecords:
        known = self._held.get(held)
        if known is None:
            self._held[held] = known = held
            if len(self._held) > RECORDS:
                self._held.popitem(last=False)
        return known

    def _grow(self, held: OwnerRecords, record: Record) -> OwnerRecords:
        step = held.digests, record.digest
        after = self._grown.get(step)
        if after is None:
            if len(self._grown) >= RECORDS:
                self._grown.clear()
            after = self._grown[step] = held.with_record(record)
        return after

    def _overlay(self, members: frozenset[tuple[NodeId, bool]], like: Overlay | None) -> Overlay:
        overlay = self._overlays.get(members)
        if overlay is None:
            overlay = self._overlays[members] = Overlay(members, like)
            if len(self._overlays) > OVERLAYS:
                self._overlays.popitem(last=False)
        else:
            self._overlays.move_to_end(members)
        return overlay
