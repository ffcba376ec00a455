from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.config import Address
from p2pmesh.errors import PeerError
from p2pmesh.state import bodies
from p2pmesh.state.bodies import Caps, Member, Served, Wanted
from p2pmesh.wire.codec import decode, encode
from p2pmesh.wire.records import RECORD_BYTES_MAX
from tests.state.make import NOW, card, digest, held, member, record

WANTED = Wanted(digest=digest(1), stem="m", replicas=2, priority=1, context=4096, slots=4)


WISH = {"digest": digest(1), "stem": "m", "replicas": 1, "priority": 0, "context": 1, "slots": 1}


def over_the_wire(body: dict[str, Any]) -> dict[str, Any]:
    decoded: dict[str, Any] = decode(encode(body), bytes_max=RECORD_BYTES_MAX)
    return decoded


def test_each_register_survives_the_wire() -> None:
    here = member(addresses=(Address("10.0.0.5", 9338), Address("fe80::1", 1)), left=True)
    assert Member.from_wire(over_the_wire(here.to_wire())) == here
    caps = Caps(budget_bytes=8 << 30, engine="embedded b11549", rpc="")
    assert Caps.from_wire(over_the_wire(caps.to_wire())) == caps
    served = (Served(digest=digest(1), state="ready"), Served(digest=digest(2), state="failed"))
    assert bodies.serves_from_wire(over_the_wire(bodies.serves_to_wire(served))) == served
    assert bodies.wants_from_wire(over_the_wire(bodies.wants_to_wire([WANTED]))) == (WANTED,)


@given(st.integers(0, 80), st.integers(1, 200))
def test_held_models_are_paged_within_the_bound_of_a_record(count: int, layers: int) -> None:
    uneven = card(layers=layers, layer_bytes=tuple(range(layers)))
    models = [held(number, card=uneven) for number in range(count)]
    pages = bodies.held_pages(models)
    for number, page in enumerate(pages):
        sealed = record(register=bodies.held_register(number), body=page, issued_at=NOW)
        assert len(sealed.raw) <= RECORD_BYTES_MAX
    again = [one for page in pages for one in bodies.held_from_wire(over_the_wire(page))]
    assert again == sorted(models, key=lambda one: one.digest)


@pytest.mark.parametrize(
    ("read", "body"),
    [
        (Member.from_wire, {}),
        (Member.from_wire, {**member().to_wire(), "addresses": ["nowhere"]}),
        (Member.from_wire, {**member().to_wire(), "name": "x" * 65}),
        (Caps.from_wire, {"budget_bytes": -1, "engine": "", "rpc": ""}),
        (bodies.serves_from_wire, {"serves": [["00", "ready", ""]]}),
        (bodies.serves_from_wire, {"serves": [[digest(1), "dancing", ""]]}),
        (bodies.wants_from_wire, {"wants": [{}]}),
        (bodies.wants_from_wire, {"wants": [{**WISH, "slots": 65}]}),
        (bodies.wants_from_wire, {"wants": [{**WISH, "context": 2**40}]}),
        (lambda body: list(bodies.held_from_wire(body)), {"held": [{"digest": "x"}]}),
    ],
)
def test_what_does_not_read_is_a_peers_fault(read: Any, body: dict[str, Any]) -> None:
    with pytest.raises(PeerError):
        read(body)


def test_texts_of_peers_are_made_fit_for_terminals_and_command_lines() -> None:
    bad, good = "\x1b[2J a\0b\u202ec\n", "[2J a b c"
    here = Member.from_wire({**member().to_wire(), "name": bad, "version": bad})
    assert (here.name, here.version) == (good, good)
    caps = Caps.from_wire({"budget_bytes": 1, "engine": bad, "rpc": bad})
    assert (caps.engine, caps.rpc) == (good, good)
    (wanted,) = bodies.wants_from_wire(bodies.wants_to_wire([replace(WANTED, stem=bad)]))
    assert wanted.stem == good
    (page,) = bodies.held_pages([held(1, stem=bad)])
    assert [one.stem for one in bodies.held_from_wire(page)] == [good]
    (served,) = bodies.serves_from_wire({"serves": [[digest(1), "failed", bad]]})
    assert served.detail == good


def test_what_an_engine_says_is_sent_as_one_line_of_bounded_length() -> None:
    said = Served(digest=digest(1), state="failed", detail="out of\nmemory" + "!" * 500)
    (row,) = bodies.serves_to_wire([said])["serves"]
    assert row[2].startswith("out of memory!!!")
    assert len(row[2]) == bodies.DETAIL_CHARS_MAX
