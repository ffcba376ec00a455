from __future__ import annotations

import dataclasses

import pytest

from p2pmesh.wire.evidence import Certificate, Fork
from p2pmesh.wire.facts import FACT_KINDS, verify
from p2pmesh.wire.messages import Push, decode_message, encode_message, gather
from p2pmesh.wire.records import Record, RecordCheck, verify_record
from tests.state.builders import certificate, fork, record

SOME: list[Record | Certificate | Fork] = [record(), certificate(0, (2, 3)), fork()]


@pytest.mark.parametrize("fact", SOME, ids=lambda fact: type(fact).__name__)
def test_a_fact_of_each_kind_survives_the_wire(fact: Record | Certificate | Fork) -> None:
    kind = FACT_KINDS[type(fact)]
    verified: list[Record] = []

    def counted(one: Record) -> bool:
        verified.append(one)
        return verify_record(one)

    message = decode_message(encode_message(gather([fact])))
    assert isinstance(message, Push)
    assert not any(message.of(other) for other in FACT_KINDS.values() if other is not kind)
    (raw,) = message.of(kind)
    read = kind.parse(raw, RecordCheck())
    assert read == fact
    assert verify(read, RecordCheck(verify=counted))
    assert isinstance(read, Record | Certificate | Fork)
    assert tuple(verified) == fact.signed
    assert len(verified) <= kind.signatures_max
    assert len(raw) <= kind.bytes_max
    assert not verify(read, RecordCheck(verify=lambda one: one is not read.signed[-1]))


def test_the_table_names_the_fields_of_a_message() -> None:
    fields = {field.name for field in dataclasses.fields(Push)} - {"asked"}
    assert {kind.name for kind in FACT_KINDS.values()} == fields
    assert len({kind.key for kind in FACT_KINDS.values()}) == len(FACT_KINDS)
