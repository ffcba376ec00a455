"""Learning at a start what earlier lives of this node wrote. Pure.

A disk may be lost or old. So before it writes anything a node asks its first neighbours for what
they hold with its key; whatever they hold, its own epoch has to be higher. It goes on asking
everybody whom it meets: two that run with one key take each other's links, and find out so.
"""

from __future__ import annotations

from p2pmesh.gossip.events import Out, Send, SetTimer
from p2pmesh.identity.keys import NodeId
from p2pmesh.wire.messages import Own

LEARN_S = 2.0  # how long a start waits for word of it
LEARN_MORE_S = 0.3  # once the first has answered
LEARN_FROM = 3
LEARNED = "learned"


class Recovery:
    """One node's question to its neighbours.

    Attributes:
        done: It may write.

    Args:
        done: There is nobody to ask.
    """

    def __init__(self, *, done: bool) -> None:
        self.done = done
        self._asked: set[NodeId] = set()
        self._answered: set[NodeId] = set()

    def begin(self) -> list[Out]:
        """The start."""
        return [] if self.done else [SetTimer(after_s=LEARN_S, token=LEARNED)]

    def ask(self, node: NodeId) -> list[Out]:
        """There is a link to `node`."""
        self._asked.add(node)
        return [Send(node=node, message=Own())]

    def is_reply(self, node: NodeId) -> bool:
        """Whether facts of `node`, which somebody asked for, are its answer; each only once."""
        if node not in self._asked:
            return False
        self._asked.discard(node)
        if not self.done:
            self._answered.add(node)
        return True

    def replied(self) -> list[Out]:
        """An answer was taken in."""
        if len(self._answered) >= LEARN_FROM:
            self.done = True
        return [] if self.done else [SetTimer(after_s=LEARN_MORE_S, token=LEARNED)]

    def lost(self, node: NodeId) -> None:
        """The link to `node` is gone."""
        self._asked.discard(node)
