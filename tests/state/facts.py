"""Facts that meet in conflicts, and documents that are told of them, for tests."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from hypothesis import strategies as st

from p2pmesh.state.document import Document
from p2pmesh.wire.evidence import Certificate, make_fork
from p2pmesh.wire.facts import Fact
from p2pmesh.wire.records import Record
from tests.state.builders import MESH, NOW, certificate, record

EPOCH_S = 50  # between two lives of an owner
SEQ_S = 10  # between two versions
TTLS = {"member": 60, "wants": 400}


def written(owner: int, register: str, epoch: int, seq: int, value: int = 1) -> Record:
    """One version of many, issued in the order of their numbers."""
    return record(
        owner,
        register,
        epoch=NOW + epoch,
        seq=seq,
        issued_at=NOW + EPOCH_S * epoch + SEQ_S * seq,
        ttl_s=TTLS.get(register, 9999),
        body={"value": value},
    )


# A few owners, registers, epochs and versions, so that most orders meet a conflict.
RECORDS = [
    written(owner, register, epoch, seq, value)
    for owner in (0, 1)
    for register in ("member", "caps", "wants")
    for epoch in (0, 1)
    for seq, value in ((1, 1), (2, 1), (2, 2))
]
FORKS = [
    make_fork(one, other)
    for one, other in pairwise(RECORDS)
    if (one.key, one.epoch, one.seq) == (other.key, other.epoch, other.seq)
]
CERTIFICATES = [
    certificate(0, accusers, seq=seq, issued_at=NOW + SEQ_S * seq)
    for seq in (1, 2)
    for accusers in ((2,), (2, 3))
]
FACTS: list[Fact] = [*RECORDS, *FORKS, *CERTIFICATES]
LATER = NOW + EPOCH_S + 2 * SEQ_S  # when all of them have been issued
some_facts = st.lists(st.sampled_from(range(len(FACTS))), max_size=20)
some_records = st.lists(st.sampled_from(range(len(RECORDS))), max_size=12)


def tell(document: Document, facts: Iterable[Fact], now: float = LATER) -> Document:
    said = list(facts)
    # A certificate that came before the record that it names is offered again.
    for fact in [*said, *(one for one in said if isinstance(one, Certificate))]:
        document.merge(fact, now)
    return document


def told(facts: Iterable[Fact | int], now: float = LATER) -> Document:
    chosen = [FACTS[fact] if isinstance(fact, int) else fact for fact in facts]
    return tell(Document(MESH), chosen, now)


def items(document: Document) -> list[Fact]:
    found = [document.item(item) for item in document.ids()]
    assert None not in found
    return [item for item in found if item is not None]


def raws(document: Document) -> list[bytes]:
    return [one.raw for one in document.records()]
