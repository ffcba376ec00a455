"""What a person may have a node do about members, and what the mesh makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from p2pmesh.errors import ConfigError, LocalError
from p2pmesh.identity.credentials import Role
from p2pmesh.identity.keys import NodeId, show_id
from p2pmesh.node.authority import INVITE_S_MAX, find_id
from p2pmesh.node.keystore import load_statements
from p2pmesh.state.trust import REVOCATIONS_MAX, Trust
from p2pmesh.wire.statements import (
    USES_MAX,
    Grant,
    Invitation,
    Policy,
    Revocation,
    Statement,
    state,
)
from tests.identity.builders import FOUNDER, MESH, credential
from tests.node.members import Member, Members, founder_of, key_of, members, newcomer
from tests.node.meshes import until

OPEN_HINT = (
    "This mesh is open: somebody on this network can come back with a new key. "
    "To let in only whom you invite: p2pmesh up --private"
)


def may_not(node: Member, what: str, role: str) -> str:
    own = node.card.credential.role.word
    return (
        f"this node has the role {own} and may not {what}; an admin can: "
        f"p2pmesh grant {node.name} {role}"
    )


# Invitations


async def test_an_invitation_is_made_known_and_kept(tmp_path: Path) -> None:
    async with founder_of(tmp_path) as founder:
        made = founder.authority.invite(role=Role.INVITE, stage=True, for_s=600, uses=3)
        assert made.token.mesh == MESH
        assert made.token.addresses == (founder.address,)
        assert made.token.key.public == made.invitation.key
        assert made.invitation.until == int(founder.mesh.now) + 600
        statement = founder.mesh.trust.invitations[made.invitation.id]
        assert statement.body == Invitation(
            key=made.token.key.public,
            role=Role.INVITE,
            stage=True,
            until=made.invitation.until,
            uses=3,
        )
        assert statement in load_statements(founder.home, MESH)


@pytest.mark.parametrize(
    ("for_s", "uses"), [(0, 1), (-1, 1), (INVITE_S_MAX + 1, 1), (60, -1), (60, USES_MAX + 1)]
)
async def test_an_invitation_has_bounds(tmp_path: Path, for_s: int, uses: int) -> None:
    async with founder_of(tmp_path) as founder:
        with pytest.raises(ConfigError, match="an invitation lasts at most a year and is for at"):
            founder.authority.invite(role=Role.SERVE, stage=False, for_s=for_s, uses=uses)
        assert founder.mesh.trust.invitations == {}


async def test_who_may_not_invite_is_told_who_can_change_that(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        anna = await made.start_with("anna", 1, Role.SERVE, founder)
        with pytest.raises(LocalError) as caught:
            anna.invite()
        assert str(caught.value) == may_not(anna, "invite anybody", "invite")
        bert = await made.start_with("bert", 2, Role.INVITE, founder)
        with pytest.raises(LocalError) as caught:
            bert.invite(role=Role.ADMIN)
        assert str(caught.value) == may_not(bert, "give the role admin", "admin")
        with pytest.raises(LocalError, match="has not the right 'stage' and cannot give it"):
            bert.authority.invite(role=Role.SERVE, stage=True, for_s=60, uses=1)
        assert bert.mesh.trust.invitations == {}


async def test_who_is_too_far_from_the_founder_lets_nobody_in(tmp_path: Path) -> None:
    chain = credential(key_of(1), Role.INVITE)
    for number in (2, 3):
        own = key_of(number - 1)
        chain = credential(key_of(number), Role.INVITE, signer=own, own=chain)
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        last = await made.start("last", key=key_of(3), own=chain, seeds=[founder])
        await founder.knows(last)
        with pytest.raises(LocalError, match="too far from the founder to let in more"):
            last.invite()


async def test_a_revoked_invitation_lets_nobody_in_and_who_came_stays(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        token = founder.invite()
        own = await founder.join(token, newcomer(1))
        anna = await made.start("anna", key=key_of(1), own=own, seeds=[founder])
        await founder.knows(anna)
        shown = show_id(token.key.id)
        assert founder.authority.revoke(shown[:6], below=False) == [
            f"Nobody can join with the invitation {shown[:6]} any more.",
            "Who came in with it stays: anna; p2pmesh revoke NODE",
        ]
        assert founder.mesh.trust.invitations == {}
        assert founder.mesh.trust.allows(own)


async def test_an_invitation_of_another_is_revoked_by_admins(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        anna = await made.start_with("anna", 1, Role.INVITE, founder)
        token = founder.invite()
        await anna.hears(token)
        with pytest.raises(LocalError) as caught:
            anna.authority.revoke(show_id(token.key.id), below=False)
        assert str(caught.value) == may_not(anna, "revoke an invitation of another node", "admin")


# Revocations


async def with_child(made: Members, founder: Member) -> tuple[Member, Member]:
    """anna, who let bert in."""
    anna = await made.start_with("anna", 1, Role.INVITE, founder)
    own = credential(key_of(2), signer=anna.key, own=anna.card.credential)
    bert = await made.start("bert", key=key_of(2), own=own, seeds=[founder])
    await founder.knows(anna, bert)
    return anna, bert


@pytest.mark.parametrize("is_open", [True, False])
async def test_a_revoked_node_is_out_and_whom_it_let_in_stays(
    tmp_path: Path, *, is_open: bool
) -> None:
    async with members(tmp_path, is_open=is_open) as made:
        founder = await made.start("founder")
        anna, bert = await with_child(made, founder)
        said = founder.authority.revoke("anna", below=False)
        assert said == [
            "anna is out of the mesh.",
            "Whom it let in stays: bert. To revoke them as well: --below",
            *([OPEN_HINT] if is_open else []),
        ]
        await anna.ended.wait()
        assert anna.failure == (
            "this node's membership was revoked by founder; ask for a new invitation, then: "
            "p2pmesh join TOKEN"
        )
        await until(founder.mesh, lambda: anna.node not in founder.mesh.view.nodes)
        await founder.knows(bert)
        assert not founder.mesh.vouch(bert.card.credential)
        assert founder.mesh.vouch(anna.card.credential)


async def test_below_a_revoked_node_everybody_goes_if_that_is_wanted(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        anna, bert = await with_child(made, founder)
        said = founder.authority.revoke(show_id(anna.node), below=True)
        assert said[:2] == ["anna is out of the mesh.", "So is everybody whom it let in: bert."]
        await anna.ended.wait()
        await bert.ended.wait()
        assert founder.mesh.vouch(bert.card.credential)


async def test_nobody_revokes_itself_or_who_is_not_there(tmp_path: Path) -> None:
    async with founder_of(tmp_path) as founder:
        with pytest.raises(ConfigError, match="that is this node itself: p2pmesh leave"):
            founder.authority.revoke("founder", below=False)
        with pytest.raises(ConfigError, match="there is no node or invitation 'anna'; see p2pmesh"):
            founder.authority.revoke("anna", below=False)
        assert not any(isinstance(one.body, Revocation) for one in founder.mesh.statements)


async def test_members_revoke_whom_they_let_in_and_nobody_else(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        anna, bert = await with_child(made, founder)
        cleo = await made.start_with("cleo", 3, Role.SERVE, founder)
        await anna.knows(bert, cleo)
        for name in ("cleo", "founder"):
            with pytest.raises(LocalError) as caught:
                anna.authority.revoke(name, below=False)
            assert str(caught.value) == may_not(
                anna, "revoke a node that it did not let in", "admin"
            )
        assert anna.authority.revoke("bert", below=False)[0] == "bert is out of the mesh."
        await bert.ended.wait()


# Grants


async def test_a_grant_is_taken_up_by_its_node(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        anna = await made.start_with("anna", 1, Role.SERVE, founder)
        said = founder.authority.grant("anna", role=Role.INVITE, stage=None)
        assert said == "anna has the role invite now."
        said = founder.authority.grant("anna", role=None, stage=True)
        assert "and the right stage" in said
        granted = [one.body for one in founder.mesh.statements if isinstance(one.body, Grant)]
        assert granted[-1].credential.node == anna.node
        assert granted[-1].credential.last.issuer == FOUNDER.id


async def test_a_role_is_lowered_by_a_revocation_and_a_grant(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        anna, bert = await with_child(made, founder)
        assert founder.authority.grant("anna", role=Role.SERVE, stage=None) == (
            "anna has the role serve now."
        )
        assert founder.mesh.vouch(anna.card.credential), "the higher role is void"
        lower = founder.mesh.trust.best_grant(anna.node, founder.mesh.now)
        assert lower is not None
        assert (lower.role, founder.mesh.vouch(lower)) == (Role.SERVE, "")
        assert not founder.mesh.vouch(bert.card.credential), "whom it let in stays"


async def test_what_a_node_does_not_have_it_does_not_grant(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        anna = await made.start_with("anna", 1, Role.SERVE, founder)
        bert = await made.start_with("bert", 2, Role.INVITE, founder)
        for node in (anna, bert):
            await node.knows(anna if node is bert else bert)
        too_low = may_not(bert, "revoke a node that it did not let in", "admin")
        for node, target, role, says in (
            (anna, "bert", Role.SERVE, may_not(anna, "grant anything", "invite")),
            (bert, "anna", Role.ADMIN, may_not(bert, "give the role admin", "admin")),
            (bert, "founder", Role.SERVE, "founder stands above this node"),
            (bert, "anna", Role.USE, too_low),
        ):
            with pytest.raises(LocalError) as caught:
                node.authority.grant(target, role=role, stage=None)
            assert str(caught.value).startswith(says)
        with pytest.raises(ConfigError, match="there is no node 'dora'"):
            bert.authority.grant("dora", role=Role.SERVE, stage=None)


# Open and private


async def test_admins_open_and_close_the_mesh(tmp_path: Path) -> None:
    async with founder_of(tmp_path) as founder:
        assert not founder.authority.set_open(is_open=True)
        assert founder.authority.set_open(is_open=False)
        assert not founder.authority.set_open(is_open=False)
        rules = founder.mesh.trust.policy
        assert isinstance(rules, Policy)
        assert (rules.number, rules.open, rules.name) == (2, False, "quiet-otter")
        assert founder.authority.set_open(is_open=True)


async def test_only_admins_do(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        anna = await made.start_with("anna", 1, Role.INVITE, founder)
        with pytest.raises(LocalError) as caught:
            anna.authority.set_open(is_open=False)
        assert str(caught.value) == may_not(anna, "make this mesh private", "admin")


async def test_rules_of_a_revoked_admin_stay(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        anna = await made.start_with("anna", 1, Role.ADMIN, founder)
        anna.authority.set_open(is_open=False)
        await until(founder.mesh, lambda: not is_open(founder))
        await trio.sleep(1)
        founder.authority.revoke("anna", below=True)
        assert not is_open(founder)


def is_open(member: Member) -> bool:
    policy = member.mesh.trust.policy
    return policy is not None and policy.open


# Names and ids


A, B, C = b"\x00" * 16, b"\x00" * 15 + b"\xff", b"c" * 16


async def test_who_revokes_an_admin_takes_over_whom_that_one_revoked(tmp_path: Path) -> None:
    """Whoever has the old admin's key makes no statement in whose favour its word gives way."""
    gone = NodeId(b"g" * 16)
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        anna = await made.start_with("anna", 1, Role.ADMIN, founder)
        now = founder.mesh.now
        own = anna.card.credential

        def revoked(keeps: set[bytes], at: float) -> Statement:
            body = Revocation(target=gone, keeps=frozenset(keeps))
            return state(anna.key, own, body, mesh=MESH, now=at)

        founder.mesh.declare(revoked(set(), now - 10))
        founder.authority.revoke("anna", below=True)
        later = revoked({b"k" * 16}, now + 5)
        founder.mesh.declare(later)
        (counts,) = founder.mesh.trust.revoking(gone)
        assert (counts.owner, counts.issued_at) == (founder.mesh.me, int(now) - 10)
        assert counts.body == Revocation(target=gone, keeps=frozenset())
        assert later in founder.mesh.statements, "it stands, and counts for nothing"


async def test_nobody_puts_itself_out_with_those_below_another(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        anna = await made.start_with("anna", 1, Role.ADMIN, founder)
        await anna.knows(founder)
        with pytest.raises(LocalError, match="this node's own membership rests on founder's"):
            anna.authority.revoke("founder", below=True)
        assert anna.authority.revoke("founder", below=False)[0] == "founder is out of the mesh."
        assert not anna.mesh.vouch(anna.card.credential)


async def test_whom_a_node_kept_before_it_keeps_again(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        anna, _bert = await with_child(made, founder)
        child = NodeId(b"c" * 16)
        body = Revocation(target=anna.mesh.me, keeps=frozenset([child]))
        earlier = state(
            founder.key, founder.card.credential, body, mesh=MESH, now=founder.mesh.now - 2000
        )
        fresh = credential(anna.key, Role.INVITE, now=founder.mesh.now - 1000)
        assert Trust([earlier]).allows(fresh)
        founder.mesh.declare(earlier)
        revocation = founder.authority._revocation(anna.mesh.me, [b"d" * 16])
        assert revocation.keeps == {child, b"d" * 16}
        assert founder.authority._revocation(anna.mesh.me, []).keeps == frozenset()


async def test_a_node_makes_no_revocation_for_which_an_older_one_would_give_way(
    tmp_path: Path,
) -> None:
    async with members(tmp_path) as made:
        founder = await made.start("founder")
        anna = await made.start_with("anna", 1, Role.SERVE, founder)
        some = [
            state(
                founder.key,
                founder.card.credential,
                Revocation(target=number.to_bytes(16, "big"), keeps=frozenset()),
                mesh=MESH,
                now=founder.mesh.now - 5,
            )
            for number in range(REVOCATIONS_MAX)
        ]
        founder.mesh.declare(*some)
        with pytest.raises(LocalError, match=f"made the {REVOCATIONS_MAX} revocations"):
            founder.authority.revoke("anna", below=False)
        assert founder.mesh.trust.allows(anna.card.credential)
        assert len(founder.mesh.trust.revocations_by(founder.mesh.me)) == REVOCATIONS_MAX


def test_a_node_is_found_by_name_id_or_the_beginning_of_its_id() -> None:
    names = {A: "anna", B: "bert", C: "cleo"}
    assert find_id(" anna ", names, "node") == A
    assert find_id(show_id(B), names, "node") == B
    assert find_id(show_id(B).upper(), names, "node") == B
    assert find_id(show_id(C)[:4], names, "node") == C


@pytest.mark.parametrize("text", ["", "dora", "c", "Anna", show_id(C)[:3], show_id(C) + "a"])
def test_what_is_none_of_them_is_said(text: str) -> None:
    with pytest.raises(ConfigError, match=r"there is no node .*see p2pmesh members"):
        find_id(text, {A: "anna", B: "bert", C: "cleo"}, "node")


def test_what_can_be_several_is_said_with_their_ids() -> None:
    names = {A: "anna", B: "anna", C: "cleo"}
    for text in ("anna", "aaaa"):
        with pytest.raises(ConfigError) as caught:
            find_id(text, names, "node")
        first, second = sorted((show_id(A), show_id(B)))
        assert str(caught.value) == f"'{text}' can be any of several: {first}, {second}"


def test_a_node_that_took_the_id_of_another_for_its_name_does_not_stand_in_for_it() -> None:
    assert find_id(show_id(C), {A: show_id(C), C: "cleo"}, "node") == C
    with pytest.raises(ConfigError, match="can be any of several"):
        find_id(show_id(C)[:6], {A: show_id(C)[:6], C: "cleo"}, "node")
