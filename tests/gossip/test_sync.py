from __future__ import annotations

from p2pmesh.gossip.events import Out, Send
from p2pmesh.gossip.sync import Sync
from p2pmesh.state.document import Document
from p2pmesh.wire.messages import Message, Records, Summary, decode_message
from tests.state.make import MESH, NODES, NOW, record

PEER = NODES[5]


def with_records(*owners: int) -> Document:
    document = Document(MESH)
    for owner in owners:
        document.merge(record(owner), NOW)
    return document


def said(outs: list[Out]) -> list[Message]:
    return [decode_message(out.message) for out in outs if isinstance(out, Send)]


def test_a_new_link_starts_with_what_is_held() -> None:
    document = with_records(0, 1)
    assert said(Sync(document).link_up(PEER)) == [
        Summary(versions=document.versions(), answer=False)
    ]


def test_a_summary_is_answered_with_what_it_lacks() -> None:
    theirs = Summary(versions=with_records(0).versions(), answer=False)
    lacking = said(Sync(with_records(0, 1)).answer(PEER, theirs))
    assert lacking == [Records(records=(record(1).raw,))]
    both = Summary(versions=with_records(0, 1).versions(), answer=True)
    (answer,) = said(Sync(with_records(0, 1)).answer(PEER, both))
    assert isinstance(answer, Summary)
    assert not answer.answer


def test_one_difference_may_be_on_its_way_two_are_repaired() -> None:
    sync = Sync(with_records(0))
    other = with_records(0, 1).fingerprint
    same = with_records(0).fingerprint
    assert sync.compare(PEER, other) == []
    assert sync.compare(PEER, same) == []
    assert sync.compare(PEER, other) == []
    (summary,) = said(sync.compare(PEER, other))
    assert isinstance(summary, Summary)
    assert summary.answer
    assert sync.compare(PEER, other) == []
    sync.link_down(PEER)
    assert sync.compare(PEER, other) == []
