"""The inputs and outputs of the gossip core. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from p2pmesh.config import Address
from p2pmesh.identity.credentials import Credential
from p2pmesh.identity.keys import NodeId
from p2pmesh.wire.messages import Message
from p2pmesh.wire.statements import Statement


class Health(Enum):
    """This node's own view of another node. Local, immediate, reversible."""

    LIVE = "live"
    SUSPECT = "suspect"  # not answering right now: routing avoids it
    DEAD = "dead"  # placement does without it


# --- in ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkUp:
    """A link to `node` is there; both ends speak this version of the protocol on it."""

    node: NodeId
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkDown:
    """The link to `node` is gone."""

    node: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class DialFailed:
    """No address led to `node` (None: to the node that a user named by address).

    Attributes:
        nobody_there: The machine itself said that nothing listens.
    """

    node: NodeId | None
    nobody_there: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A message came over the link to `node`; what does not decode never gets here."""

    node: NodeId
    message: Message


@dataclass(frozen=True, slots=True, kw_only=True)
class TimerFired:
    """A timer set by `SetTimer` ran out."""

    token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish:
    """One of this node's own registers has a new value; None withdraws it."""

    register: str
    body: dict[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Declare:
    """This node makes statements of trust."""

    statements: tuple[Statement, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UseCredential:
    """This node has this credential from now on, for its records to carry."""

    credential: Credential


Event = LinkUp | LinkDown | DialFailed | Received | TimerFired | Publish | Declare | UseCredential


# --- out --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """Queue `message` on the link to `node`; without one it is dropped."""

    node: NodeId
    message: Message


@dataclass(frozen=True, slots=True, kw_only=True)
class SetTimer:
    """Give `TimerFired(token)` back after that time."""

    after_s: float
    token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Dial:
    """Try to get a link to `node`."""

    node: NodeId | None
    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Disconnect:
    """Close the link to `node`.

    Attributes:
        hostile: It broke the protocol: there is to be no link with it for a while.
    """

    node: NodeId
    reason: str
    hostile: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PersistEpoch:
    """Sync `epoch` to disk before anything that follows goes out."""

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StateChanged:
    """Records of these owners changed."""

    owners: frozenset[NodeId]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustChanged:
    """The statements of trust that stand are others now: keep them, and look who still counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthChanged:
    """This node's own view of `node` changed."""

    node: NodeId
    health: Health


@dataclass(frozen=True, slots=True, kw_only=True)
class TwinFound:
    """Another running node uses this node's key, and this one has to give way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """Something that `node` sent was not believed; for the log."""

    node: NodeId
    reason: str


Out = (
    Send
    | SetTimer
    | Dial
    | Disconnect
    | PersistEpoch
    | StateChanged
    | TrustChanged
    | HealthChanged
    | TwinFound
    | Rejected
)
