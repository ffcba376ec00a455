"""A circuit breaker: which replicas this node avoids, because they failed its own requests.

Pure: the time is passed in. A replica that failed is avoided for a while that doubles with each
further failure. After it, one trial request may go there: its success forgets all, its failure
begins a longer pause. Avoided means last in the choice, not refused: when all replicas are
avoided, they are tried all the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from p2pmesh.models.parts import ReplicaKey

# A passing trouble, like a restart, costs the replica hardly any of its requests.
PAUSE_MIN_S = 1.0
PAUSE_MAX_S = 30.0
# A failure that kept a client waiting is avoided for so many times as long: a replica that never
# answers, noticed after 5 s, may cost one client these 5 s twice a minute, and not each in turn.
PAUSE_PER_LOST_S = 6.0
# While one trial is under way the others stay away; a trial whose client left ends with this.
TRIAL_S = 10.0
# A replica without a failure for so long begins anew with the shortest pause.
FORGET_S = 300.0


@dataclass(slots=True)
class _Fault:
    """The faults of one replica that failed.

    Attributes:
        until: When the pause, or the trial, is over.
        pause_s: How long the last pause was.
        failures: How many requests failed since the last success.
        on_trial: Whether a trial request was let through since the last failure.
    """

    until: float
    pause_s: float
    failures: int
    on_trial: bool = False


class Breaker:
    """The replicas that this node avoids. All times are on one clock, in seconds."""

    def __init__(self) -> None:
        self._faults: dict[ReplicaKey, _Fault] = {}

    def is_avoided(self, key: ReplicaKey, now: float) -> bool:
        """Whether requests should go elsewhere, if another replica can take them."""
        fault = self._faults.get(key)
        return fault is not None and now < fault.until

    def failures(self, key: ReplicaKey) -> int:
        """How many requests the replica failed since it last answered one."""
        fault = self._faults.get(key)
        return 0 if fault is None else fault.failures

    def attempted(self, key: ReplicaKey, now: float) -> None:
        """Count a request that goes to a replica: the first one after a pause is the trial."""
        fault = self._faults.get(key)
        if fault is not None and now >= fault.until:
            fault.on_trial = True
            fault.until = now + TRIAL_S

    def failed(self, key: ReplicaKey, now: float, *, lost_s: float = 0.0) -> None:
        """Count a failure.

        Args:
            key: The replica.
            now: The present time.
            lost_s: How long the request was kept waiting for nothing.
        """
        self._forget(now)
        fault = self._faults.get(key)
        failures = self.failures(key) + 1
        pause_s = max(PAUSE_MIN_S, PAUSE_PER_LOST_S * lost_s)
        if fault is not None:
            # Those that were under way together and fail together are one failure.
            pause_s = max(pause_s, fault.pause_s * (2 if fault.on_trial else 1))
        pause_s = min(pause_s, PAUSE_MAX_S)
        self._faults[key] = _Fault(until=now + pause_s, pause_s=pause_s, failures=failures)

    def succeeded(self, key: ReplicaKey) -> None:
        """Count an answer: nothing is held against the replica any more."""
        self._faults.pop(key, None)

    def _forget(self, now: float) -> None:
        for key in [key for key, fault in self._faults.items() if fault.until + FORGET_S <= now]:
            del self._faults[key]
