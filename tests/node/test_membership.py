"""A node's own membership: what it is granted, what it renews, what it warns of."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.lowlevel
from trio.testing import MockClock, wait_all_tasks_blocked

from p2pmesh.errors import LocalError
from p2pmesh.identity.credentials import DAY_S, LAN_TTL_S, TTL_S, Basis, Credential, Role
from p2pmesh.identity.keys import SigningKey
from p2pmesh.node import membership as module
from p2pmesh.node.keystore import load_mesh
from tests.identity.builders import FOUNDERS, MESH_KEY, credential
from tests.node.members import Member, Members, founder_of, key_of, members
from tests.node.meshes import until
from tests.state.builders import NOW


@asynccontextmanager
async def minding(*those: Member) -> AsyncIterator[None]:
    """These mind their membership meanwhile."""
    async with trio.open_nursery() as nursery:
        for one in those:
            nursery.start_soon(one.membership.run)
        yield
        nursery.cancel_scope.cancel()


def aged(age_days: int, *, basis: Basis = "lan", ttl_s: int = LAN_TTL_S) -> Credential:
    """A credential of node 1 that the founder gave so many days ago."""
    return credential(key_of(1), basis=basis, now=NOW - age_days * DAY_S, ttl_s=ttl_s)


async def test_what_is_granted_is_taken_up_kept_and_shown_to_others(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        anna = await made.start_with("anna", 1, Role.SERVE, founder)
        async with minding(anna):
            founder.authority.grant("anna", role=Role.INVITE, stage=True)
            await until(anna.mesh, lambda: anna.membership.credential.role is Role.INVITE)
            own = anna.membership.credential
            assert own.stage
            assert anna.mesh.credential == own
            kept = load_mesh(anna.home)
            assert kept is not None
            assert kept.credential == own
            await until(founder.mesh, lambda: shown(founder, anna) == own)
            assert anna.membership.issuer().own == own


def shown(by: Member, of: Member) -> Credential | None:
    view = by.mesh.view.nodes.get(of.node)
    return view.credential if view else None


async def test_a_lower_role_is_taken_up_when_the_higher_one_is_void(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        anna = await made.start_with("anna", 1, Role.INVITE, founder)
        async with minding(anna):
            founder.authority.grant("anna", role=Role.SERVE, stage=None)
            await until(anna.mesh, lambda: anna.membership.credential.role is Role.SERVE)
            await until(founder.mesh, lambda: shown(founder, anna) == anna.card.credential)
            await trio.lowlevel.checkpoint()
            assert not anna.ended.is_set()
            await founder.knows(anna)


async def test_a_grant_that_is_worth_less_is_left(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        anna = await made.start_with("anna", 1, Role.ADMIN, founder, stage=True)
        async with minding(anna):
            founder.authority.grant("anna", role=Role.ADMIN, stage=None)
            await until(anna.mesh, lambda: bool(anna.mesh.trust.grants))
            await wait_all_tasks_blocked()
            assert anna.membership.credential == credential(key_of(1), Role.ADMIN, stage=True), (
                "it lasts longer"
            )


@pytest.mark.parametrize(("basis", "ttl_s"), [("lan", LAN_TTL_S), ("invite", TTL_S)])
async def test_a_credential_is_renewed_when_half_of_its_time_is_over(
    tmp_path: Path,
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
    basis: Basis,
    ttl_s: int,
) -> None:
    monkeypatch.setattr(module, "RENEW_INTERVAL_S", 60.0)
    via = b"i" * 16 if basis == "invite" else b""
    old = credential(key_of(1), basis=basis, now=NOW - ttl_s // 2 + 300, ttl_s=ttl_s, via=via)
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        anna = await made.start("anna", key=key_of(1), own=old, seeds=[founder])
        async with minding(anna):
            await anna.knows(founder)
            await trio.sleep(200)
            assert anna.membership.credential == old, "there is time left"
            await until(anna.mesh, lambda: anna.membership.credential != old)
        fresh = anna.membership.credential
    assert (fresh.node, fresh.role, fresh.last.issuer) == (old.node, old.role, FOUNDERS.node)
    assert fresh.last.basis == ("lan" if basis == "lan" else "grant")
    assert fresh.expires_at > old.expires_at
    kept = load_mesh(anna.home)
    assert kept is not None
    assert kept.credential == fresh


async def test_who_can_renew_it_is_asked_as_soon_as_it_is_here(tmp_path: Path) -> None:
    """A laptop that is on for less than an hour a day gets its credential renewed too."""
    async with members(tmp_path) as made:
        anna = await made.start("anna", key=key_of(1), own=aged(20))
        async with minding(anna):
            await wait_all_tasks_blocked()
            await made.start("founder", seeds=[anna])
            await until(anna.mesh, lambda: anna.membership.credential != aged(20))
    assert anna.membership.credential.expires_at > NOW + 29 * DAY_S


async def test_a_refused_renewal_is_asked_for_again_after_a_while(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RENEW_INTERVAL_S", 60.0)
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        asked: list[float] = []

        def refuse(*_: object) -> Credential:
            asked.append(trio.current_time())
            return aged(21)

        monkeypatch.setattr(founder.admission, "_renewed", refuse)
        anna = await made.start("anna", key=key_of(1), own=aged(20), seeds=[founder])
        async with minding(anna):
            await anna.knows(founder)
            await trio.sleep(130)
        assert anna.membership.credential == aged(20), "a shorter one is of no use"
        assert len(asked) == 3


async def test_a_credential_for_another_node_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        answered = trio.Event()

        def lie(*_: object) -> Credential:
            answered.set()
            return credential(key_of(2), Role.ADMIN)

        monkeypatch.setattr(founder.admission, "_renewed", lie)
        anna = await made.start("anna", key=key_of(1), own=aged(20), seeds=[founder])
        async with minding(anna):
            await answered.wait()
            await wait_all_tasks_blocked()
        assert anna.membership.credential == aged(20)


# Warnings


async def test_a_membership_that_lasts_warns_of_nothing(tmp_path: Path) -> None:
    async with founder_of(tmp_path) as founder:
        assert founder.membership.warnings == []


@pytest.mark.parametrize(
    ("left_s", "soon"), [(6.5 * DAY_S, "in 6 days"), (1.5 * DAY_S, "in 1 day"), (60, "in 0 days")]
)
async def test_a_membership_that_runs_out_is_said(
    tmp_path: Path, autojump_clock: MockClock, left_s: float, soon: str
) -> None:
    own = credential(key_of(1), basis="lan", now=NOW - DAY_S, ttl_s=DAY_S + int(left_s))
    async with members(tmp_path) as made:
        alone = await made.start("anna", key=key_of(1), own=own)
        (warning,) = alone.membership.warnings
        assert warning == (
            f"This node's membership runs out {soon}, and no member that could renew it is here; "
            "see p2pmesh members"
        )
        await alone_with_founder(made, alone)
        assert alone.membership.warnings == [
            f"This node's membership runs out {soon}; see p2pmesh members"
        ]


async def alone_with_founder(made: Members, node: Member) -> None:
    founder = await made.start("founder", seeds=[node])
    await node.knows(founder)


async def test_who_is_refused_by_a_member_is_told_so(tmp_path: Path) -> None:
    async with founder_of(tmp_path) as founder:
        founder.mesh.refused("this node's membership was revoked by anna")
        assert founder.membership.warnings == [
            "A member refuses this node: this node's membership was revoked by anna"
        ]


async def test_a_member_recovers_its_mesh_by_the_key_of_that(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        anna = await made.start_with("anna", 1, Role.SERVE, founder)
        bert = await made.start_with("bert", 2, Role.SERVE, founder)
        await anna.knows(bert)
        async with minding(anna):
            with pytest.raises(LocalError, match="this recovery code is not that of"):
                anna.membership.recover(SigningKey(b"x" * 32))
            assert anna.membership.credential.role is Role.SERVE
            anna.membership.recover(MESH_KEY)
            own = anna.membership.credential
            assert (own.role, own.stage, own.last.basis) == (Role.ADMIN, True, "recovery")
            with pytest.raises(LocalError, match=r"is an admin of .* already"):
                anna.membership.recover(MESH_KEY)
            await until(bert.mesh, lambda: shown(bert, anna) == own)
            anna.authority.revoke("founder", below=False)
            await until(bert.mesh, lambda: bool(bert.mesh.vouch(founder.card.credential)))
            await bert.knows(anna)
    kept = load_mesh(anna.home)
    assert kept is not None
    assert kept.credential == own


async def test_a_revoked_node_recovers_nothing(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        anna = await made.start_with("anna", 1, Role.SERVE, founder)
        founder.authority.revoke("anna", below=False)
        await until(anna.mesh, lambda: bool(anna.mesh.vouch(anna.card.credential)))
        with pytest.raises(LocalError, match=r"revoked by founder.* another node of the mesh can"):
            anna.membership.recover(MESH_KEY)
