"""Bringing two documents together: everything on a new link, the difference when probes disagree.

Pure. Each side says which versions it holds and is sent what it lacks. Fingerprints travel in
every probe; while records are on their way they differ for a moment, so only two differing ones
in a row from the same node start an exchange.
"""

from __future__ import annotations

from p2pmesh.gossip.events import Out, Send
from p2pmesh.identity.keys import NodeId
from p2pmesh.state.document import Document
from p2pmesh.wire.messages import Summary, encode_message, in_messages

DIFFERENCES_TO_REPAIR = 2


class Sync:
    """Repair of one node's document with its linked peers."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._differed: dict[NodeId, int] = {}

    def link_up(self, node: NodeId) -> list[Out]:
        """Tell a new peer what is held here; it does the same."""
        self._differed.pop(node, None)
        return [self._summary(node, answer=False)]

    def link_down(self, node: NodeId) -> None:
        """Forget what was counted."""
        self._differed.pop(node, None)

    def compare(self, node: NodeId, fingerprint: bytes) -> list[Out]:
        """A peer said what its document's fingerprint is."""
        if fingerprint == self._document.fingerprint:
            self._differed.pop(node, None)
            return []
        count = self._differed.get(node, 0) + 1
        if count < DIFFERENCES_TO_REPAIR:
            self._differed[node] = count
            return []
        self._differed.pop(node)
        return [self._summary(node, answer=True)]

    def answer(self, node: NodeId, summary: Summary) -> list[Out]:
        """Send a peer what it lacks, and if it asks, what is held here."""
        lacking = (record.raw for record in self._document.lacking(summary.versions))
        out: list[Out] = [
            Send(node=node, message=encode_message(message)) for message in in_messages(lacking)
        ]
        return [*out, self._summary(node, answer=False)] if summary.answer else out

    def _summary(self, node: NodeId, *, answer: bool) -> Send:
        summary = Summary(versions=self._document.versions(), answer=answer)
        return Send(node=node, message=encode_message(summary))
