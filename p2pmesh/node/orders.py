"""The orders that a person gives to the running node: about members, and questions about the plan.

Each order has a name and takes a map of values, as they came over the control API: every value is
checked here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from p2pmesh.config import Address, parse_address, parse_join
from p2pmesh.errors import ConfigError, LocalError
from p2pmesh.identity.credentials import ROLES, STAGE, Role
from p2pmesh.identity.keys import NodeId, show_id
from p2pmesh.identity.recovery import parse_recovery_code
from p2pmesh.identity.tokens import ADDRESSES_MAX, parse_token
from p2pmesh.node.authority import find_id
from p2pmesh.node.joining import Entry, Joiner
from p2pmesh.node.life import MeshLife
from p2pmesh.node.local_network import LocalNetwork
from p2pmesh.node.membership import lost_with_this_node
from p2pmesh.node.plan_report import WHAT_IF_MAX

Order = Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]

HOUR_S = 3600


class Orders:
    """What a running node does when it is told to.

    Args:
        life: Returns its life in the present mesh.
        joiner: Gets it into other meshes.
        network: What is around it.
        change_mesh: Begins to leave the present mesh for another one.
        leave: Begins the node's end, after which it belongs to no mesh.
    """

    def __init__(
        self,
        life: Callable[[], MeshLife],
        joiner: Joiner,
        network: LocalNetwork,
        change_mesh: Callable[[Entry], None],
        leave: Callable[[], None],
    ) -> None:
        self._life, self._joiner, self._network = life, joiner, network
        self._change_mesh, self._leave = change_mesh, leave
        self._orders: Mapping[str, Order] = {
            "invite": self._invite,
            "revoke": self._revoke,
            "grant": self._grant,
            "admit": self._admit,
            "recover": self._recover,
            "join": self._join,
            "leave": self._leave_mesh,
            "plan": self._plan,
        }

    async def give(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out one order.

        Raises:
            ConfigError: There is no such order, or a value cannot be used.
            LocalError: This node cannot do it, or may not.
        """
        order = self._orders.get(name)
        if order is None:
            raise ConfigError(f"there is no order {name!r}")
        return await order(values)

    async def _invite(self, values: Mapping[str, Any]) -> dict[str, Any]:
        role = _role(_text(values, "role", Role.SERVE.word))
        default_stage = role >= Role.SERVE and self._life().membership.credential.stage
        invited = self._life().authority.invite(
            role=role,
            stage=_flag(values, "stage", default=default_stage),
            for_s=_number(values, "for_s", 24 * HOUR_S),
            uses=_number(values, "uses", 1),
            addresses=_addresses(values, "addresses"),
        )
        invitation = invited.invitation
        return {
            "token": str(invited.token),
            "id": show_id(invitation.id),
            "role": invitation.role.word,
            "stage": invitation.stage,
            "until": invitation.until,
            "uses": invitation.uses,
            "addresses": [str(one) for one in invited.token.addresses],
        }

    async def _revoke(self, values: Mapping[str, Any]) -> dict[str, Any]:
        below = _flag(values, "below", default=False)
        sentences = self._life().authority.revoke(_text(values, "target"), below=below)
        return {"sentences": [*sentences, *self._unsaved()]}

    async def _grant(self, values: Mapping[str, Any]) -> dict[str, Any]:
        what = _text(values, "what")
        role = None if what in (STAGE, f"no-{STAGE}") else _role(what)
        stage = {STAGE: True, f"no-{STAGE}": False}.get(what)
        sentence = self._life().authority.grant(_text(values, "target"), role=role, stage=stage)
        return {"sentences": [sentence, *self._unsaved()]}

    async def _recover(self, values: Mapping[str, Any]) -> dict[str, Any]:
        life = self._life()
        life.membership.recover(parse_recovery_code(_text(values, "code")))
        sentence = f"This node is an admin of {life.card.name} now."
        advice = "To put out a node that is lost or stolen: p2pmesh revoke NODE"
        return {"sentences": [sentence, advice, *self._unsaved()]}

    async def _admit(self, values: Mapping[str, Any]) -> dict[str, Any]:
        life = self._life()
        life.authority.check_may_admit()
        waiting = {bytes(one.node): one.name for one in life.admission.waiting}
        waiting |= {bytes(one.node): one.name for one in self._network.waiting}
        target = _text(values, "target")
        node = NodeId(find_id(target, waiting, "node waiting"))
        life.admission.allow(node)
        self._network.admit(node)
        return {"sentences": [f"{waiting[node]} may join now, which it does when it asks again."]}

    async def _join(self, values: Mapping[str, Any]) -> dict[str, Any]:
        text = _text(values, "join")
        try:
            way = parse_join(text)
        except ValueError as exc:
            raise ConfigError(str(exc)) from exc
        wanted = parse_token(way) if isinstance(way, str) else way
        entry = await self._joiner.by_name([wanted], _refuse)
        present = self._life().card
        if entry.card.id == present.id:
            return {"sentences": [f"This node is in the mesh {present.name} already."]}
        self._change_mesh(entry)
        return {"sentences": [f"This node leaves {present.name} and joins {entry.card.name}."]}

    async def _plan(self, values: Mapping[str, Any]) -> dict[str, Any]:
        explained = _text(values, "explain") if values.get("explain") is not None else None
        return await self._life().planner.answer(
            explained=explained, what_if=_texts(values, "what_if", WHAT_IF_MAX)
        )

    def _unsaved(self) -> list[str]:
        reason = self._life().mesh.unsaved
        return [lost_with_this_node(reason)] if reason else []

    async def _leave_mesh(self, _values: Mapping[str, Any]) -> dict[str, Any]:
        name = self._life().card.name
        self._leave()
        return {"sentences": [f"This node leaves the mesh {name} and stops."]}


def _refuse(sentence: str) -> None:
    """An order that cannot be carried out changes nothing."""
    raise LocalError(sentence)


def _text(values: Mapping[str, Any], name: str, default: str = "") -> str:
    value = values.get(name, default)
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{name} is missing, or no text")
    return value.strip()


def _number(values: Mapping[str, Any], name: str, default: int) -> int:
    value = values.get(name, default)
    if type(value) is not int:
        raise ConfigError(f"{name} is no whole number")
    return value


def _flag(values: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = values.get(name, default)
    if type(value) is not bool:
        raise ConfigError(f"{name} is neither true nor false")
    return value


def _texts(values: Mapping[str, Any], name: str, count_max: int) -> list[str]:
    texts = values.get(name, [])
    is_list = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    if not is_list or len(texts) > count_max:
        raise ConfigError(f"{name} is no list of at most {count_max} texts")
    return list(texts)


def _addresses(values: Mapping[str, Any], name: str) -> tuple[Address, ...]:
    texts = values.get(name, [])
    if not isinstance(texts, list) or len(texts) > ADDRESSES_MAX:
        raise ConfigError(f"{name} is no list of at most {ADDRESSES_MAX} addresses")
    try:
        return tuple(parse_address(text if isinstance(text, str) else "") for text in texts)
    except ValueError as exc:
        raise ConfigError(f"{name}: {exc}") from exc


def _role(word: str) -> Role:
    if word not in ROLES:
        raise ConfigError(f"{word!r} is no role: use, serve, invite or admin")
    return ROLES[word]
