"""Letting others in: one member that is asked on streams in memory, and its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, memory_stream_pair, wait_all_tasks_blocked

from p2pmesh.config import Address
from p2pmesh.errors import LinkError, LocalError, PeerError
from p2pmesh.home import Home
from p2pmesh.identity.credentials import (
    LAN_TTL_S,
    TTL_S,
    Credential,
    Role,
    is_signed,
)
from p2pmesh.identity.hello import EXPIRED, REVOKED, STRANGER, RefusedError
from p2pmesh.identity.keys import show_id
from p2pmesh.identity.tokens import Token, prove
from p2pmesh.node import admission as module
from p2pmesh.node.admission import (
    ADDRESSES_MAX,
    ANSWER_BYTES_MAX,
    ANSWER_TIMEOUT_S,
    AT_ONCE_MAX,
    LAN_BURST,
    LAN_PER_ADDRESS_BURST,
    REQUEST_BYTES_MAX,
    REQUEST_TIMEOUT_S,
    WAITING_MAX,
    WAITING_S,
    ask_with,
    read_answer,
)
from p2pmesh.node.keystore import load_used, save_used
from p2pmesh.transport.handshake import receive_frame, send_frame
from p2pmesh.wire.codec import encode
from p2pmesh.wire.statements import parse_statement
from tests.identity.builders import FOUNDER, MESH, credential
from tests.node.members import (
    Member,
    founder_of,
    key_of,
    members,
    newcomer,
    policy,
    request_with,
)
from tests.state.builders import NOW

DAY_S = 86400


@pytest.fixture
def patient_clock() -> MockClock:
    """A clock that waits for threads, which write files."""
    return MockClock(autojump_threshold=0.05)


async def refusal_of(founder: Member, token: Token, number: int) -> RefusedError:
    """Why a newcomer is not let in."""
    with pytest.RaisesGroup(RefusedError, allow_unwrapped=True, flatten_subgroups=True) as caught:
        await founder.join(token, newcomer(number))
    return first(caught.value)


def first(exc: BaseException) -> RefusedError:
    while isinstance(exc, BaseExceptionGroup):
        (exc,) = exc.exceptions
    assert isinstance(exc, RefusedError)
    return exc


# Invitations


async def test_an_invitation_makes_a_member(tmp_path: Path) -> None:
    async with founder_of(tmp_path) as founder:
        token = founder.invite(uses=1)
        answer = await founder.ask(newcomer(1), request_with(token, newcomer(1)))
    own = answer.credential
    assert is_signed(own)
    assert (own.node, own.mesh, own.role, own.stage) == (key_of(1).id, MESH, Role.SERVE, False)
    assert (own.last.basis, own.last.issuer) == ("invite", FOUNDER.id)
    assert own.expires_at - own.last.issued_at == TTL_S == 90 * DAY_S
    assert parse_statement(answer.policy) == policy()
    assert answer.addresses == (founder.address,)


async def test_a_use_is_on_disk_before_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def save(home: Home, used: Mapping[bytes, Any]) -> None:
        save_used(home, used)
        events.append("kept")

    monkeypatch.setattr(module, "save_used", save)
    async with founder_of(tmp_path) as founder:
        token = founder.invite(uses=2)
        await founder.join(token, newcomer(1))
        events.append("answered")
        assert events == ["kept", "answered"]
        assert load_used(founder.home) == {token.key.id: [newcomer(1).node]}
        assert founder.admission.uses(token.key.id) == 1


async def test_five_at_once_for_two_uses_are_two(tmp_path: Path) -> None:
    async with founder_of(tmp_path) as founder:
        token = founder.invite(uses=2)
        let_in, refused = list[Credential](), list[RefusedError]()

        async def join(number: int) -> None:
            try:
                let_in.append(await founder.join(token, newcomer(number)))
            except* RefusedError as group:
                refused.append(first(group))

        async with trio.open_nursery() as nursery:
            for number in range(1, 6):
                nursery.start_soon(join, number)
        assert len(let_in) == 2
        assert {str(one) for one in refused} == {
            "this invitation was used 2 times, as often as it may be"
        }
        assert len(refused) == 3
        assert load_used(founder.home)[token.key.id] == [one.node for one in let_in]


async def test_uses_outlast_a_restart_of_the_issuer(tmp_path: Path) -> None:
    async with founder_of(tmp_path) as founder:
        token = founder.invite(uses=2)
        await founder.join(token, newcomer(1))
        founder.restart_admission()
        await founder.join(token, newcomer(2))
        founder.restart_admission()
        refused = await refusal_of(founder, token, 3)
    assert (str(refused), refused.why) == (
        "this invitation was used 2 times, as often as it may be",
        STRANGER,
    )


async def test_the_same_node_uses_an_invitation_once(tmp_path: Path) -> None:
    async with founder_of(tmp_path) as founder:
        token = founder.invite(uses=1)
        for _ in range(3):
            assert (await founder.join(token, newcomer(1))).node == newcomer(1).node
        assert founder.admission.uses(token.key.id) == 1
        refused = await refusal_of(founder, token, 2)
    assert str(refused) == "this invitation was used once, as often as it may be"


async def test_with_a_full_disk_nobody_is_let_in_and_nothing_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise LocalError("Cannot write invitations.json: no space left on device")

    async with founder_of(tmp_path) as founder:
        token = founder.invite(uses=1)
        with monkeypatch.context() as full:
            full.setattr(module, "save_used", fail)
            refused = await refusal_of(founder, token, 1)
        assert str(refused) == "this member cannot write to its disk; ask another"
        assert founder.admission.uses(token.key.id) == 0
        assert not founder.home.invitations_file.exists()
        await founder.join(token, newcomer(2))
        assert founder.admission.uses(token.key.id) == 1


async def test_an_invitation_without_a_limit_is_not_counted(tmp_path: Path) -> None:
    async with founder_of(tmp_path) as founder:
        token = founder.invite(uses=0)
        for number in range(1, 4):
            await founder.join(token, newcomer(number))
        assert not founder.home.invitations_file.exists()


async def test_what_was_recorded_is_worth_nothing_elsewhere(tmp_path: Path) -> None:
    async with founder_of(tmp_path) as founder:
        token = founder.invite(uses=0)
        recorded = request_with(token, newcomer(1))
        for thief in (newcomer(2), replace(newcomer(1), binding=b"b" * 32)):
            with pytest.RaisesGroup(LinkError, flatten_subgroups=True):
                await founder.ask(thief, recorded)
        assert [str(one) for one in founder.dropped] == [
            "the other side did not prove that it has the invitation"
        ] * 2


async def test_an_invitation_that_nobody_made_is_not_known(tmp_path: Path) -> None:
    async with founder_of(tmp_path) as founder:
        made_up = Token(mesh=MESH, seed=b"s" * 16, addresses=(founder.address,))
        refused = await refusal_of(founder, made_up, 1)
    assert (str(refused), refused.why) == (
        "this invitation is not known here, or it was revoked",
        STRANGER,
    )


async def test_an_invitation_ends(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with founder_of(tmp_path) as founder:
        token = founder.invite(for_s=60)
        await trio.sleep(61)
        refused = await refusal_of(founder, token, 1)
    assert (str(refused), refused.why) == ("this invitation is over; ask for a new one", EXPIRED)


async def test_a_revoked_node_needs_a_newer_invitation(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        anna = await made.start_with("anna", 1, Role.SERVE, founder)
        old = founder.invite()
        founder.authority.revoke("anna", below=False)
        refused = await refusal_of(founder, old, 1)
        assert (str(refused), refused.why) == (
            "this node was revoked after that invitation was made",
            REVOKED,
        )
        await trio.sleep(1)
        again = await founder.join(founder.invite(), newcomer(1))
    assert again.node == anna.node


# Members that are asked in place of the one that decides


async def test_any_member_that_may_invite_redeems_an_invitation_without_a_limit(
    tmp_path: Path,
) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        anna = await made.start_with("anna", 1, Role.INVITE, founder)
        token = founder.invite(uses=0)
        await anna.hears(token)
        founder.scope.cancel()
        own = await anna.join(token, newcomer(2))
    assert (own.last.issuer, len(own.chain)) == (anna.node, 3)


async def test_a_member_that_may_not_decide_asks_the_one_that_made_the_invitation(
    tmp_path: Path,
) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        for name, number, role in (("anna", 1, Role.SERVE), ("bert", 2, Role.INVITE)):
            other = await made.start_with(name, number, role, founder)
            token = founder.invite(uses=1)
            await other.hears(token)
            asking = newcomer(10 + number)
            own = await other.join(token, asking)
            assert (own.node, own.last.issuer, len(own.chain)) == (asking.node, FOUNDER.id, 2)
            assert load_used(founder.home)[token.key.id] == [asking.node]
            assert load_used(other.home) == {}
            refused = await refusal_of(other, token, 20 + number)
            assert str(refused) == "this invitation was used once, as often as it may be"


async def test_without_a_limit_a_member_without_the_right_asks_any_that_has_it(
    tmp_path: Path,
) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        anna = await made.start_with("anna", 1, Role.INVITE, founder)
        bert = await made.start_with("bert", 2, Role.SERVE, founder)
        await bert.knows(anna)
        token = founder.invite(uses=0)
        await anna.hears(token)
        await bert.hears(token)
        founder.scope.cancel()
        own = await bert.join(token, newcomer(3))
    assert own.last.issuer == anna.node


@pytest.mark.parametrize("how", ["gone", "silent"])
async def test_a_maker_of_an_invitation_that_is_not_reachable_is_named(
    tmp_path: Path, patient_clock: MockClock, how: str
) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        anna = await made.start_with("anna", 1, Role.INVITE, founder)
        token = founder.invite(uses=1)
        await anna.hears(token)
        if how == "gone":
            founder.scope.cancel()
        else:
            made.network.unreachable.add(founder.address)
        refused = await refusal_of(anna, token, 2)
    assert str(refused) == (
        "founder, which made this invitation, is not reachable; try again when it is"
    )


async def test_a_maker_of_an_invitation_that_never_answers_is_named(
    tmp_path: Path, patient_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        anna = await made.start_with("anna", 1, Role.INVITE, founder)
        token = founder.invite(uses=1)
        await anna.hears(token)

        async def stuck(*_: object) -> Credential:
            await trio.sleep_forever()
            raise AssertionError

        monkeypatch.setattr(founder.admission, "_by_invitation", stuck)
        refused = await refusal_of(anna, token, 2)
    assert "founder, which made this invitation, is not reachable" in str(refused)


async def test_a_request_that_was_passed_on_is_not_passed_on_again(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        anna = await made.start_with("anna", 1, Role.INVITE, founder)
        token = founder.invite(uses=1)
        await anna.hears(token)
        asking, passing = newcomer(5), newcomer(6, own=credential(key_of(6), Role.SERVE))
        request = {**request_with(token, asking), "k": asking.public, "b": asking.binding}
        with pytest.RaisesGroup(RefusedError, flatten_subgroups=True) as caught:
            await anna.ask(passing, request)
        assert str(first(caught.value)) == (
            "this member may not let anybody in with that invitation"
        )
        assert load_used(founder.home) == {}
        assert (await founder.ask(passing, request)).credential.node == asking.node


@pytest.mark.parametrize("own", [None, credential(key_of(6), Role.USE)])
async def test_strangers_and_guests_do_not_ask_for_others(
    tmp_path: Path, own: Credential | None
) -> None:
    async with founder_of(tmp_path) as founder:
        token, asking = founder.invite(uses=1), newcomer(5)
        request = {**request_with(token, asking), "k": asking.public, "b": asking.binding}
        with pytest.RaisesGroup(LinkError, flatten_subgroups=True):
            await founder.ask(newcomer(6, own=own), request)
        (dropped,) = founder.dropped
        assert str(dropped) == "a stranger that asks for another node"
        assert founder.admission.uses(token.key.id) == 0


async def test_a_member_that_passes_on_needs_the_newcomers_proof(tmp_path: Path) -> None:
    async with founder_of(tmp_path) as founder:
        token, asking = founder.invite(uses=1), newcomer(5)
        passing = newcomer(6, own=credential(key_of(6), Role.SERVE))
        proof = prove(token, node=passing.public, binding=asking.binding)
        request = {
            "i": token.key.public, "s": proof, "k": asking.public, "b": asking.binding,
        }  # fmt: skip
        with pytest.RaisesGroup(LinkError, flatten_subgroups=True):
            await founder.ask(passing, request)
        assert founder.admission.uses(token.key.id) == 0


# Requests that are none


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"",
        b"\xc1",
        encode([]),
        encode({}),
        encode({"i": b"short", "s": b"s" * 64}),
        encode({"i": b"i" * 32}),
        encode({"i": b"i" * 32, "s": 5}),
        encode({"renew": 1}),
        encode({"name": 5}),
        b"x" * REQUEST_BYTES_MAX,
    ],
)
@pytest.mark.parametrize("purpose", ["join", "lan"])
async def test_junk_ends_the_stream_and_nothing_else(
    tmp_path: Path, request_bytes: bytes, purpose: str
) -> None:
    async with founder_of(tmp_path, is_open=False) as founder:
        ours, theirs = memory_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(founder.serve, newcomer(1), theirs, purpose)
            await send_frame(ours, request_bytes)
            try:
                said = await receive_frame(ours)
            except LinkError:
                assert all(isinstance(one, PeerError) for one in founder.dropped)
                assert founder.dropped
            else:
                with pytest.raises(RefusedError):
                    read_answer(said)
            await ours.aclose()
        await founder.join(founder.invite(), newcomer(2))


async def test_a_request_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    async with founder_of(tmp_path) as founder:
        ours, theirs = memory_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(founder.serve, newcomer(1), theirs)
            await ours.send_all((REQUEST_BYTES_MAX + 1).to_bytes(4, "big"))
            with pytest.raises(LinkError):
                await receive_frame(ours)
        assert len(founder.dropped) == 1


async def test_a_request_that_never_comes_is_not_waited_for(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with founder_of(tmp_path) as founder:
        _ours, theirs = memory_stream_pair()
        began = trio.current_time()
        await founder.serve(newcomer(1), theirs)
        assert trio.current_time() - began == pytest.approx(REQUEST_TIMEOUT_S)
        assert [str(one) for one in founder.dropped] == ["a newcomer did not go on"]


async def test_a_request_of_a_byte_a_second_is_not_waited_for(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with founder_of(tmp_path) as founder:
        ours, theirs = memory_stream_pair()

        async def trickle() -> None:
            for byte in (1000).to_bytes(4, "big") + bytes(100):
                await ours.send_all(bytes([byte]))
                await trio.sleep(0.7)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trickle)
            began = trio.current_time()
            await founder.serve(newcomer(1), theirs)
            assert trio.current_time() - began == pytest.approx(REQUEST_TIMEOUT_S)
            nursery.cancel_scope.cancel()


async def test_a_newcomer_that_takes_no_answer_ends_within_its_time(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with founder_of(tmp_path) as founder:
        token, ends = founder.invite(), memory_stream_pair()
        await send_frame(ends[0], encode(request_with(token, newcomer(1))))
        began = trio.current_time()
        await founder.serve(newcomer(1), ends[1])
        assert trio.current_time() - began < ANSWER_TIMEOUT_S


async def test_more_newcomers_than_can_be_answered_are_told_to_ask_again(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with founder_of(tmp_path) as founder, trio.open_nursery() as nursery:
        token, quiet = founder.invite(), [memory_stream_pair() for _ in range(AT_ONCE_MAX)]
        for number, (_, theirs) in enumerate(quiet):
            nursery.start_soon(founder.serve, newcomer(100 + number), theirs)
        await wait_all_tasks_blocked()
        refused = await refusal_of(founder, token, 1)
        assert str(refused) == "too many ask to join at this moment; ask again"
        await trio.sleep(REQUEST_TIMEOUT_S + 0.1)
        assert (await founder.join(token, newcomer(1))).node == newcomer(1).node


# The network around


async def test_an_open_mesh_takes_who_is_on_the_network(tmp_path: Path) -> None:
    async with founder_of(tmp_path) as founder:
        own = await founder.join_lan(newcomer(1))
        assert founder.admission.waiting == []
    assert is_signed(own)
    assert (own.node, own.role, own.stage) == (key_of(1).id, Role.SERVE, False)
    assert (own.last.basis, own.expires_at - own.last.issued_at) == ("lan", LAN_TTL_S)
    assert LAN_TTL_S == 30 * DAY_S


async def test_any_member_that_serves_takes_who_is_on_the_network(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        anna = await made.start_with("anna", 1, Role.SERVE, founder)
        own = await anna.join_lan(newcomer(2))
    assert (own.last.issuer, own.last.basis, own.role) == (anna.node, "lan", Role.SERVE)


async def refused_on_lan(founder: Member, number: int, **changes: Any) -> RefusedError:
    with pytest.RaisesGroup(RefusedError, flatten_subgroups=True) as caught:
        await founder.join_lan(newcomer(number, **changes), "anna's laptop\x1b[2J")
    return first(caught.value)


async def test_where_this_node_does_not_speak_for_its_mesh_nobody_joins(tmp_path: Path) -> None:
    async with founder_of(tmp_path) as founder:
        founder.lan_refusal = "not on this network"
        assert str(await refused_on_lan(founder, 1)) == "not on this network"
        assert founder.admission.waiting == []


async def test_a_private_mesh_has_newcomers_wait_for_a_persons_word(tmp_path: Path) -> None:
    async with founder_of(tmp_path, is_open=False) as founder:
        refused = await refused_on_lan(founder, 1)
        assert refused.why == STRANGER
        assert str(refused) == (
            "this mesh is private: ask a member for an invitation, or to run "
            f"`p2pmesh admit {show_id(newcomer(1).node)}`"
        )
        (waiting,) = founder.admission.waiting
        assert (waiting.node, waiting.name, waiting.host) == (
            newcomer(1).node, "anna's laptop [2J", newcomer(1).host,
        )  # fmt: skip
        founder.lan_refusal = "not on this network"  # a person's word goes before
        founder.admission.allow(newcomer(1).node)
        own = await founder.join_lan(newcomer(1))
        assert (own.role, own.stage, own.last.basis) == (Role.SERVE, False, "grant")
        assert founder.admission.waiting == []
        founder.lan_refusal = ""
        await refused_on_lan(founder, 2)
        await refused_on_lan(founder, 1)  # the word was for once


async def test_those_who_wait_are_bounded_and_forgotten(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with founder_of(tmp_path, is_open=False) as founder:
        for number in range(1, WAITING_MAX + 11):
            await refused_on_lan(founder, number)
        waiting = {one.node for one in founder.admission.waiting}
        assert waiting == {newcomer(n).node for n in range(11, WAITING_MAX + 11)}
        await trio.sleep(WAITING_S - 1)
        await refused_on_lan(founder, 11)
        await trio.sleep(2)
        assert [one.node for one in founder.admission.waiting] == [newcomer(11).node]


async def test_a_revoked_node_does_not_come_back_over_the_network(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        await made.start_with("anna", 1, Role.SERVE, founder)
        founder.authority.revoke("anna", below=False)
        refused = await refused_on_lan(founder, 1)
    assert (str(refused), refused.why) == (
        "this node was revoked; an admin can invite it again",
        REVOKED,
    )


BUSY = "too many joined from this network lately; ask for an invitation"


async def test_four_join_from_one_address(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with founder_of(tmp_path) as founder:
        for number in range(LAN_PER_ADDRESS_BURST):
            await founder.join_lan(newcomer(number))
        assert str(await refused_on_lan(founder, 10)) == BUSY
        await founder.join_lan(newcomer(10, host="192.168.1.51"))
        await trio.sleep(3600 / LAN_PER_ADDRESS_BURST)
        await founder.join_lan(newcomer(11))
        assert str(await refused_on_lan(founder, 12)) == BUSY
    assert LAN_PER_ADDRESS_BURST == 4


async def test_sixty_four_join_in_an_hour(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with founder_of(tmp_path) as founder:
        join = [partial(newcomer, n, host=f"192.168.1.{n}") for n in range(1, LAN_BURST + 3)]
        for who in join[:LAN_BURST]:
            await founder.join_lan(who())
        assert str(await refused_on_lan(founder, 100, host="192.168.2.1")) == BUSY
        await trio.sleep(3600 / LAN_BURST + 1)
        await founder.join_lan(join[LAN_BURST]())
        assert str(await refused_on_lan(founder, 101, host="192.168.2.1")) == BUSY
    assert LAN_BURST == 64


async def test_whom_a_person_named_is_let_in_however_many_came(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with founder_of(tmp_path) as founder:
        for number in range(LAN_PER_ADDRESS_BURST):
            await founder.join_lan(newcomer(number))
        founder.admission.allow(newcomer(10).node)
        assert (await founder.join_lan(newcomer(10))).node == newcomer(10).node


# Renewal


async def test_a_credential_is_renewed_with_its_rights(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    old = credential(key_of(1), basis="lan", now=NOW - 20 * DAY_S, ttl_s=LAN_TTL_S)
    async with founder_of(tmp_path) as founder:
        answer = await founder.ask(newcomer(1, own=old), {"renew": True})
    fresh = answer.credential
    assert (fresh.node, fresh.role, fresh.last.basis) == (old.node, Role.SERVE, "lan")
    assert fresh.expires_at - old.expires_at == pytest.approx(20 * DAY_S, abs=5)


async def test_a_stranger_has_nothing_to_renew(tmp_path: Path) -> None:
    async with founder_of(tmp_path) as founder:
        with pytest.RaisesGroup(RefusedError, flatten_subgroups=True) as caught:
            await founder.ask(newcomer(1), {"renew": True})
    assert str(first(caught.value)) == "there is no credential to renew"


async def test_a_guest_that_asks_for_renewal_is_noted_and_told_where_members_are(
    tmp_path: Path,
) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        old = credential(key_of(1), Role.USE)
        answer = await founder.ask(newcomer(1, own=old), {"renew": True, "name": "anna"})
        assert (answer.credential, answer.addresses) == (old, (founder.address,))
        (guest,) = founder.admission.guests.values()
        assert (guest.name, guest.credential) == ("anna", old)


# Answers


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"junk",
        encode([]),
        encode({}),
        encode({"no": 5}),
        encode({"c": b"", "p": b"", "a": []}),
        encode({"c": b"junk", "p": b"", "a": []}),
        encode({"c": credential(key_of(1)).raw, "p": b"", "a": 5}),
    ],
)
def test_a_damaged_answer_is_an_error_of_the_peer(said: bytes) -> None:
    with pytest.raises(PeerError) as caught:
        read_answer(said)
    assert not isinstance(caught.value, RefusedError)


def test_addresses_that_cannot_be_read_are_left_out() -> None:
    own = credential(key_of(1))
    said = {"c": own.raw, "p": b"", "a": ["nowhere", 5, "anna:1", b"x"], "new": 1}
    answer = read_answer(encode(said))
    assert (answer.credential, answer.addresses) == (own, (Address("anna", 1),))
    many = read_answer(encode({**said, "a": ["anna:1"] * (ADDRESSES_MAX + 1)}))
    assert len(many.addresses) == ADDRESSES_MAX


def test_a_refusal_cannot_steer_a_terminal() -> None:
    with pytest.raises(RefusedError) as caught:
        read_answer(encode({"no": "\x1b[2Jgo away", "why": "role"}))
    assert (str(caught.value), caught.value.why) == ("[2Jgo away", "role")
    with pytest.raises(RefusedError, match="it did not say why"):
        read_answer(encode({"no": "\u202e"}))


async def test_an_answer_that_never_comes_is_not_waited_for(autojump_clock: MockClock) -> None:
    ours, _theirs = memory_stream_pair()
    began = trio.current_time()
    with pytest.raises(LinkError, match="did not answer in time"):
        await ask_with(ours, {"name": "anna"})
    assert trio.current_time() - began == pytest.approx(ANSWER_TIMEOUT_S)


async def test_an_answer_that_is_too_long_is_not_read() -> None:
    ours, theirs = memory_stream_pair()
    await theirs.send_all((ANSWER_BYTES_MAX + 1).to_bytes(4, "big"))
    with pytest.raises(PeerError):
        await ask_with(ours, {"name": "anna"})
