"""The counters of the gateway, for metrics and the console."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from p2pmesh.models.cards import ModelDigest


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """The gateway at one moment; totals are since its start.

    Attributes:
        connections: Open connections from clients and streams from peers.
        requests: Requests begun, refused ones included.
        in_flight: Requests being answered by a replica, by the model's digest.
        queued: Requests that wait for a place.
        waiting: Requests that wait for a replica to be ready.
        responses: Answers begun, by status.
        retries: Replicas that failed before the first byte and were passed over.
        failures: Answers that broke off after it.
        clients_gone: Requests whose client left before the end.
        junk: Connections that sent what is not HTTP.
    """

    connections: int
    requests: int
    in_flight: Mapping[ModelDigest, int]
    queued: int
    waiting: int
    responses: Mapping[int, int]
    retries: int
    failures: int
    clients_gone: int
    junk: int
    received_bytes: int
    sent_bytes: int


@dataclass(slots=True)
class Counters:
    """The numbers behind `Statistics`, while they change."""

    requests: int = 0
    in_flight: Counter[ModelDigest] = field(default_factory=Counter)
    waiting: int = 0
    responses: Counter[int] = field(default_factory=Counter)
    retries: int = 0
    failures: int = 0
    clients_gone: int = 0
    junk: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0

    def freeze(self, *, connections: int, queued: int) -> Statistics:
        """A snapshot that does not change any more."""
        return Statistics(
            connections=connections,
            requests=self.requests,
            in_flight=dict(+self.in_flight),
            queued=queued,
            waiting=self.waiting,
            responses=dict(self.responses),
            retries=self.retries,
            failures=self.failures,
            clients_gone=self.clients_gone,
            junk=self.junk,
            received_bytes=self.received_bytes,
            sent_bytes=self.sent_bytes,
        )
