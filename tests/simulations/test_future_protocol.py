from __future__ import annotations

import pytest

from p2pmesh.state.registers import Member
from p2pmesh.wire.messages import Own, Ping, Push, Unknown, decode_message
from p2pmesh.wire.registers import CAPS, SERVING, WANTS
from simulations.convergence import READERS, misread, unsettled
from simulations.future_protocol import REGISTER, VERSIONS, in_newer_words, newer_body, newer_words
from simulations.hosts import End, Payload
from simulations.world import World


def test_what_a_newer_version_adds_is_skipped() -> None:
    (said,) = in_newer_words(Own())
    assert decode_message(said) == Own()
    assert b"colour" in said
    zeros = bytes(16)
    probe = Ping(token=1, at_ms=2, cutoff=3, fingerprint=zeros, plan=zeros, keep=True)
    rumour, same = map(decode_message, in_newer_words(probe))
    assert (rumour, same) == (Unknown(kind="rumour"), probe)


def test_what_newer_nodes_sign_goes_through_older_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1, 4)
    newer = world.nodes[1], world.nodes[2]
    for node in newer:
        node.versions = VERSIONS
    spoken: list[Payload] = []
    send = world.network.send

    def listen(end: End, payload: Payload) -> None:
        spoken.append(payload)
        send(end, payload)

    monkeypatch.setattr(world.network, "send", listen)
    world.start_all()
    world.run(10)
    assert list(unsettled(world)) == []
    assert any(isinstance(one, bytes) for one in spoken)
    assert any(isinstance(one, Push) for one in spoken)
    for node in world.nodes:
        assert node.core is not None
        for other in newer:
            future = node.core.document.get(other.id, REGISTER)
            member = node.core.document.get(other.id, "member")
            assert future is not None
            assert member is not None
            assert future.body == newer_body(other.number)
            assert member.body == newer_words(Member.from_wire(member.body).to_wire())


def test_a_newer_nodes_words_are_read_as_they_are_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1, 6)
    for node in world.nodes:
        node.versions = VERSIONS
    world.start_all()
    world.run(10)
    assert list(misread(world)) == []
    said = {register for node in world.nodes for register in node.bodies}
    assert {CAPS, SERVING, WANTS, "models/0"} <= said
    monkeypatch.setitem(READERS, SERVING, lambda body: body["serves"])
    assert any("misreads serving" in text for text in misread(world))
