"""This node's own membership: its credential, taken up, kept and renewed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import structlog
import trio

from p2pmesh.errors import LocalError, MeshError, PeerError
from p2pmesh.identity.credentials import (
    DAY_S,
    Basis,
    Credential,
    Role,
    found,
    is_signed,
    may_issue,
)
from p2pmesh.identity.hello import JOIN
from p2pmesh.identity.keys import NodeId, SigningKey, show_id
from p2pmesh.node.admission import ask_with
from p2pmesh.node.keystore import MeshInfo
from p2pmesh.node.mesh import Mesh
from p2pmesh.state.admission import Issuer

RENEW_INTERVAL_S = 3600.0  # between attempts, which begin when weeks are left
WARN_S = 7 * DAY_S  # before a credential runs out

log = structlog.get_logger(__name__)


def lost_with_this_node(reason: str) -> str:
    """Say that decisions about members are not on this disk, and why."""
    return f"What was decided about members is forgotten when this node stops: {reason}"


class Membership:
    """The membership of this node in one mesh.

    Args:
        key: This node's.
        card: The mesh, and the credential as of the start.
        mesh: The same, as it runs.
        keep: Remembers a mesh with another credential; raises `LocalError`.
    """

    def __init__(
        self, key: SigningKey, card: MeshInfo, mesh: Mesh, keep: Callable[[MeshInfo], None]
    ) -> None:
        self._key, self._card, self._mesh, self._keep = key, card, mesh, keep

    @property
    def credential(self) -> Credential:
        """Return what this node may do."""
        return self._card.credential

    def issuer(self) -> Issuer:
        """Return this node as one that signs credentials of others."""
        return Issuer(key=self._key, own=self.credential)

    @property
    def warnings(self) -> list[str]:
        """Sentences about what this node is about to lose."""
        said = [f"A member refuses this node: {self._mesh.refusal}"] if self._mesh.refusal else []
        if self._mesh.unsaved:
            said.append(lost_with_this_node(self._mesh.unsaved))
        left_s = self.credential.expires_at - self._mesh.now
        if left_s > WARN_S:
            return said
        days = max(0, int(left_s // DAY_S))
        soon = f"in {days} days" if days != 1 else "in 1 day"
        helper = "" if self._renewers() else ", and no member that could renew it is here"
        return [*said, f"This node's membership runs out {soon}{helper}; see p2pmesh members"]

    def recover(self, mesh_key: SigningKey) -> None:
        """Become an admin by the key of the mesh itself.

        Raises:
            LocalError: It is the key of another mesh, this node is an admin already, or it may be
                in this mesh no more.
        """
        if mesh_key.id != self._card.id:
            raise LocalError(f"this recovery code is not that of {self._card.name}")
        if self.credential.role is Role.ADMIN and self.credential.stage and not self._is_void():
            raise LocalError(f"this node is an admin of {self._card.name} already")
        credential = found(mesh_key, self._key.public, self._mesh.now, "recovery")
        if said := self._mesh.vouch(credential):
            raise LocalError(f"{said}; another node of the mesh can be its admin")
        self._use(credential)

    async def run(self) -> None:
        """Take up what this node is granted, and have its credential renewed in time."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._take_up)
            nursery.start_soon(self._renew)

    async def _take_up(self) -> None:
        while True:
            seen = self._mesh.changes.count
            granted = self._mesh.trust.best_grant(self._mesh.me, self._mesh.now)
            if granted and (granted.rank > self.credential.rank or self._is_void()):
                self._use(granted)
            await self._mesh.changes.wait(seen)

    async def _renew(self) -> None:
        while True:
            seen = self._mesh.changes.count
            if self._mesh.now >= self.credential.renews_at() and self._renewers():
                await self._ask_for_renewal()
                await trio.sleep(RENEW_INTERVAL_S)
            else:
                # Those who can renew it may come when this node is here no more for an hour.
                with trio.move_on_after(RENEW_INTERVAL_S):
                    await self._mesh.changes.wait(seen)

    async def _ask_for_renewal(self) -> None:
        for node in self._renewers():
            try:
                async with await self._mesh.open_stream(node, JOIN) as stream:
                    fresh = (await ask_with(stream, {"renew": True})).credential
                if fresh.node != self._mesh.me or not is_signed(fresh):
                    raise PeerError("a renewed credential that is not this node's")
            except MeshError as exc:
                log.info("not_renewed", by=show_id(node), reason=str(exc))
                continue
            if fresh.rank > self.credential.rank and not self._mesh.vouch(fresh):
                self._use(fresh)
                return

    def _renewers(self) -> list[NodeId]:
        """The linked members that could renew this node's credential."""
        last = self.credential.last
        basis: Basis = "lan" if last.basis == "lan" else "grant"
        found = []
        for node in sorted(self._mesh.linked):
            view = self._mesh.view.nodes.get(node)
            if (
                view
                and view.credential
                and self._mesh.me not in {one.node for one in view.credential.chain}
                and may_issue(view.credential, role=last.role, stage=last.stage, basis=basis)
            ):
                found.append(node)
        return found

    def _is_void(self) -> bool:
        return bool(self._mesh.vouch(self.credential))

    def _use(self, credential: Credential) -> None:
        self._card = replace(self._card, credential=credential)
        log.info("credential_taken_up", role=credential.role.word, stage=credential.stage)
        try:
            self._keep(self._card)
        except LocalError as exc:
            log.warning("credential_not_saved", reason=str(exc))
        self._mesh.use(credential)
