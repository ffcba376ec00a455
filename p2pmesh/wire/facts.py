"""The kinds of facts that nodes sign and pass on, in one table.

Pure. A fact is one or more signed records put together, travels as the bytes that were signed, and
has an owner, an id and a time that follow from those bytes. Adding a kind is a row of `FACT_KINDS`,
a field of `messages.Push` and the rule by which `state.document` merges it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from p2pmesh.identity.credentials import is_signed
from p2pmesh.wire.evidence import (
    CERTIFICATE_BYTES_MAX,
    EVIDENCE_MAX,
    FORK_BYTES_MAX,
    Certificate,
    Fork,
    parse_certificate,
    parse_fork,
)
from p2pmesh.wire.records import RECORD_BYTES_MAX, Record, RecordCheck, credential_of
from p2pmesh.wire.statements import (
    STATEMENT_BYTES_MAX,
    STATEMENT_SIGNATURES_MAX,
    Statement,
    parse_statement,
    verify_statement,
)

Fact = Statement | Record | Certificate | Fork


class FactKind(NamedTuple):
    """One kind of fact.

    Attributes:
        name: The field of `messages.Push` that holds them.
        key: The same on the wire.
        bytes_max: Of one fact.
        signatures_max: What checking one may cost.
        parse: Reads the bytes and checks their form; raises `PeerError`.
    """

    name: str
    key: str
    bytes_max: int
    signatures_max: int
    parse: Callable[[bytes, RecordCheck], Fact]


# In the order in which they are read: what a statement decides holds for the records beside it.
FACT_KINDS: Mapping[type[Fact], FactKind] = {
    Statement: FactKind(
        "statements",
        "s",
        STATEMENT_BYTES_MAX,
        STATEMENT_SIGNATURES_MAX,
        lambda raw, _check: parse_statement(raw),
    ),
    Record: FactKind("records", "r", RECORD_BYTES_MAX, 1, lambda raw, check: check.parse(raw)),
    Certificate: FactKind(
        "certificates", "c", CERTIFICATE_BYTES_MAX, EVIDENCE_MAX, parse_certificate
    ),
    Fork: FactKind("forks", "f", FORK_BYTES_MAX, 2, parse_fork),
}


def verify(fact: Fact, check: RecordCheck) -> bool:
    """Whether everything in `fact` is signed by the key of the node that it is from."""
    if isinstance(fact, Statement):
        return verify_statement(fact)
    if isinstance(fact, Record) and (own := credential_of(fact)) and not is_signed(own):
        return False
    return all(check.verify(record) for record in fact.signed)
