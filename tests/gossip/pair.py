"""Two documents that repair each other with nothing but `AntiEntropy` between them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from functools import lru_cache

from p2pmesh.gossip.antientropy import AntiEntropy
from p2pmesh.gossip.events import Send
from p2pmesh.identity.keys import NodeId, SigningKey
from p2pmesh.state.document import Document
from p2pmesh.wire.evidence import (
    Accusation,
    Certificate,
    Fork,
    accused_to_wire,
    make_certificate,
    make_fork,
)
from p2pmesh.wire.facts import FACT_KINDS, Fact
from p2pmesh.wire.messages import FetchRequest, Items, Message, Push, Ranges, encode_message
from p2pmesh.wire.records import (
    DIGEST_BYTES,
    Record,
    RecordCheck,
)
from p2pmesh.wire.registers import ACCUSED, MEMBER
from tests.state.builders import MESH, NOW, sealed

LINK_BYTES = 100  # what the figures of the simulator count for each message beside its payload
PEER, OTHER = NodeId(b"p" * 16), NodeId(b"o" * 16)  # with whom one side alone talks
ELSE = b"else" * 4  # a fingerprint of something else


@lru_cache(None)
def key(owner: int) -> SigningKey:
    return SigningKey(b"pair" + owner.to_bytes(28, "big"))


@lru_cache(None)
def record(owner: int, register: str = MEMBER, seq: int = 1, value: int = 0) -> Record:
    return sealed(key(owner), register, seq=seq, body={"value": value})


def certificate(subject: int, accusers: Iterable[int], seq: int = 1) -> Certificate:
    accusation = Accusation(NodeId(key(subject).id), NOW, seq)
    body = accused_to_wire([accusation])
    evidence = [sealed(key(accuser), ACCUSED, seq=9, body=body) for accuser in accusers]
    return make_certificate(accusation, evidence)


def fork(owner: int, seq: int = 1) -> Fork:
    return make_fork(record(owner, "caps", seq, 1), record(owner, "caps", seq, 2))


def add(document: Document, facts: Iterable[Fact], now: float = NOW) -> None:
    for fact in facts:
        document.merge(fact, now)


def with_facts(*facts: Fact) -> Document:
    document = Document(MESH)
    add(document, facts)
    return document


def members(owners: Iterable[int]) -> list[Record]:
    return [record(owner) for owner in owners]


def triples(owners: int) -> list[Fact]:
    return [record(o, r) for o in range(owners) for r in (MEMBER, "caps", "serving")]


def junk(number: int) -> bytes:
    """An id of nothing."""
    return number.to_bytes(DIGEST_BYTES, "big")


class Side:
    """One of the two."""

    def __init__(self, number: int, document: Document, *, accept: bool = True) -> None:
        self.node = NodeId(key(1_000_000 + number).id)
        self.document = document
        self.sync = AntiEntropy(document)
        self.accept = accept

    def receive(self, peer: NodeId, message: Message, now: float) -> list[Send]:
        match message:
            case Ranges():
                return self.sync.ranges(peer, message, now)
            case Items():
                return self.sync.items(peer, message, now)
            case FetchRequest():
                return self.sync.want(peer, message, now)
            case Push():
                facts = [
                    kind.parse(raw, RecordCheck())
                    for kind in FACT_KINDS.values()
                    for raw in message.of(kind)
                ]
                if self.accept:
                    add(self.document, facts, now)
                return self.sync.pulled(peer, {fact.id for fact in facts}, now)
            case _:
                raise AssertionError(message)


class Pair:
    """Two sides and what is on its way between them, in order."""

    def __init__(self, one: Document, other: Document) -> None:
        self.one, self.other = Side(1, one), Side(2, other)
        self.log: list[tuple[Side, Message]] = []  # by whom each was sent
        self._under_way: deque[tuple[Side, Message]] = deque()

    def peer(self, side: Side) -> Side:
        return self.other if side is self.one else self.one

    def send(self, side: Side, sends: Sequence[Send]) -> None:
        for send in sends:
            assert send.node == self.peer(side).node
            self.log.append((side, send.message))
            self._under_way.append((side, send.message))

    def run(self, now: float = NOW, *, lose: int | None = None) -> None:
        """Until nothing more is said; one message may get lost, by its number."""
        delivered = 0
        while self._under_way:
            sender, message = self._under_way.popleft()
            if delivered != lose:
                receiver = self.peer(sender)
                self.send(receiver, receiver.receive(sender.node, message, now))
            delivered += 1

    def begin(self, side: Side | None = None, now: float = NOW) -> None:
        side = side or self.one
        self.send(side, side.sync.begin(self.peer(side).node, now))

    def repair(self, side: Side | None = None, now: float = NOW) -> None:
        self.begin(side, now)
        self.run(now)

    @property
    def is_equal(self) -> bool:
        return self.one.document.ids() == self.other.document.ids()

    def bytes_of(self, *kinds: type[Message]) -> int:
        return sum(
            len(encode_message(message)) + LINK_BYTES
            for _, message in self.log
            if not kinds or isinstance(message, kinds)
        )
