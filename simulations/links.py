"""The links of one simulated node, by the rules of `p2pmesh.transport.links`.

At most one link per peer: of two that cross the one that the smaller id dialled, otherwise the
newer. A message for nobody is dropped, an attempt that is under way is not made twice, and who
sends what does not decode is cut off and stays away for a while.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from p2pmesh.config import Address
from p2pmesh.errors import PeerError
from p2pmesh.gossip.events import DialFailed, Event, LinkDown, LinkUp, Received
from p2pmesh.identity.keys import NodeId
from p2pmesh.transport.banlist import Banlist
from p2pmesh.transport.links import CROSSING_S
from p2pmesh.wire.messages import decode_message
from simulations.future_protocol import NEWER, in_newer_words
from simulations.hosts import End, Failure, Host, Payload
from simulations.network import Network
from simulations.schedule import Schedule


class Owner(Host, Protocol):
    """The node whose links they are."""

    def tell(self, event: Event) -> None:
        """Give its core an event, once it is awake."""
        ...

    def once_awake(self, action: Callable[[], None]) -> None:
        """Call `action` now or when the process goes on."""
        ...


class Links:
    """All links of one node.

    Args:
        owner: The node.
        schedule: The heap.
        network: Where they run.
        at: Whose address that is at the moment.
    """

    def __init__(
        self,
        owner: Owner,
        schedule: Schedule,
        network: Network,
        at: Callable[[Address], Host | None],
    ) -> None:
        self.ends: dict[NodeId, End] = {}
        self._owner, self._schedule, self._network, self._at = owner, schedule, network, at
        self._dialling: set[NodeId | Address] = set()
        self._barred = Banlist()

    def send(self, node: NodeId, payload: Payload) -> None:
        """Queue a message, if there is a link."""
        end = self.ends.get(node)
        if end is None:
            return
        if end.version >= NEWER and not isinstance(payload, bytes):
            for words in in_newer_words(payload):
                self._network.send(end, words)
        else:
            self._network.send(end, payload)

    def dial(self, node: NodeId | None, addresses: tuple[Address, ...]) -> None:
        """Try to get a link to `node`, or to whoever answers."""
        key = node if node is not None else addresses[0]
        if key in self._dialling:
            return
        self._dialling.add(key)
        instance = self._owner.instance
        attempt = _Attempt(node=node, key=key, instance=instance, left=len(addresses))
        for address in addresses:
            target = self._at(address)
            self._network.dial(self._owner, target, lambda found: self._dialled(attempt, found))

    def accepted(self, end: End) -> None:
        """Somebody connected."""
        if end.far.host.id == self._owner.id or self._is_barred(end):
            self._network.close(end)
        else:
            self._serve(end)

    def received(self, end: End, payload: Payload) -> None:
        """A message came; one on a link that was replaced means nothing any more."""
        peer = end.far.host.id
        if self.ends.get(peer) is not end:
            return
        if isinstance(payload, bytes):
            try:
                payload = decode_message(payload)
            except PeerError:
                self.cut_off(peer)
                return
        self._owner.tell(Received(node=peer, message=payload))

    def ended(self, end: End) -> None:
        """A connection is over; the core hears of it unless another has replaced it."""
        peer = end.far.host.id
        if self.ends.get(peer) is end:
            del self.ends[peer]
            self._owner.tell(LinkDown(node=peer))

    def close(self, node: NodeId) -> None:
        """Close the link to `node`, if there is one; the core hears of it soon."""
        if end := self.ends.get(node):
            self._network.close(end)
            self._schedule.after(0, self.ended, end)

    def cut_off(self, node: NodeId) -> None:
        """Close the link to `node`, which broke the protocol, and have none for a while."""
        self._barred.bar(node, self._schedule.now)
        self.close(node)

    def forget(self, *, told: bool) -> None:
        """The process is gone: its kernel tells the peers, or there is no kernel any more."""
        for end in self.ends.values():
            if told:
                self._network.close(end)
            else:
                self._network.vanish(end)
        self.ends.clear()
        self._dialling.clear()
        self._barred = Banlist()

    def _dialled(self, attempt: _Attempt, found: End | Failure) -> None:
        if not self._owner.listening or attempt.instance != self._owner.instance:
            if isinstance(found, End):
                self._network.close(found)
        else:
            self._owner.once_awake(lambda: self._settle(attempt, found))

    def _settle(self, attempt: _Attempt, found: End | Failure) -> None:
        attempt.left -= 1
        if isinstance(found, End):
            peer = found.far.host.id
            expected = peer == (attempt.node or peer) and peer != self._owner.id
            if expected and not attempt.won and not self._is_barred(found):
                attempt.won = True
                self._dialling.discard(attempt.key)
                self._serve(found)
                return
            self._network.close(found)
        attempt.refused &= found is Failure.REFUSED
        if not attempt.left and not attempt.won:
            self._dialling.discard(attempt.key)
            self._owner.tell(DialFailed(node=attempt.node, nobody_there=attempt.refused))

    def _serve(self, end: End) -> None:
        peer = end.far.host.id
        older = self.ends.get(peer)
        if older is not None:
            if not self._replaces(end, older):
                self._network.close(end)
                return
            self._network.close(older)
        end.since = self._schedule.now
        self.ends[peer] = end
        self._owner.tell(LinkUp(node=peer, version=end.version))

    def _replaces(self, newer: End, older: End) -> bool:
        aged = self._schedule.now - older.since >= CROSSING_S
        if aged or newer.far.instance != older.far.instance:
            return True
        mine = self._owner.id < newer.far.host.id
        return newer.outgoing == mine or older.outgoing != mine

    def _is_barred(self, end: End) -> bool:
        return self._barred.is_barred(end.far.host.id, self._schedule.now)


@dataclass(slots=True, kw_only=True)
class _Attempt:
    """One dialling, at one or several addresses."""

    node: NodeId | None
    key: NodeId | Address
    instance: int
    left: int
    won: bool = False
    refused: bool = True
