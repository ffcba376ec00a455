from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from p2pmesh.identity.keys import NodeId
from p2pmesh.transport.base import DIAL_TIMEOUT_S
from p2pmesh.transport.outbox import BYTES_MAX, MESSAGES_MAX
from simulations.hosts import Cut, End, Failure, Payload, Traffic
from simulations.network import HANDLING_S, ONE_WAY_S, OVERHEAD_BYTES, Network
from simulations.schedule import Schedule

SOMEBODY = NodeId(bytes(16))


@dataclass(eq=False)
class Machine:
    number: int
    id: NodeId = SOMEBODY
    instance: int = 1
    versions: tuple[int, ...] = (1,)
    powered: bool = True
    listening: bool = True
    awake: bool = True
    ends: list[End] = field(default_factory=list)
    heard: list[tuple[float, Payload]] = field(default_factory=list)
    over: int = 0
    schedule: Schedule = field(default_factory=Schedule)

    def accepted(self, end: End) -> None:
        self.ends.append(end)

    def received(self, end: End, payload: Payload) -> None:
        self.heard.append((self.schedule.now, payload))

    def ended(self, end: End) -> None:
        self.over += 1


class Pair:
    """Two machines and, after `connect`, a connection from the first to the second."""

    def __init__(self, seed: int = 1) -> None:
        self.schedule = Schedule()
        self.network = Network(self.schedule, seed)
        self.a, self.b = (Machine(n, schedule=self.schedule) for n in (0, 1))
        self.network.traffic = {0: Traffic(), 1: Traffic()}
        self.one_way_s = self.network.one_way_s(0, 1)
        self.outcome: End | Failure | None = None

    def dial(self) -> None:
        def answered(outcome: End | Failure) -> None:
            self.outcome = outcome

        self.network.dial(self.a, self.b, answered)

    def connect(self) -> End:
        self.dial()
        self.run(1)
        assert isinstance(self.outcome, End)
        return self.outcome

    def run(self, seconds: float) -> None:
        self.schedule.run(self.schedule.now + seconds)

    def cut(self) -> Cut:
        cut = Cut(frozenset({0}), frozenset({1}))
        self.network.cuts.append(cut)
        return cut

    @property
    def heard(self) -> list[Payload]:
        return [message for _, message in self.b.heard]


def test_latency_is_drawn_once_per_pair_from_the_seed() -> None:
    one, other = Pair(1), Pair(1)
    assert one.one_way_s == other.network.one_way_s(1, 0)
    assert ONE_WAY_S[0] <= one.one_way_s <= ONE_WAY_S[1]
    assert Pair(2).one_way_s != one.one_way_s


def test_connecting_takes_a_round_trip_and_a_message_one_way() -> None:
    pair = Pair()
    pair.dial()
    pair.run(2 * pair.one_way_s - 1e-6)
    early = pair.outcome
    pair.run(2e-6)
    assert (early, type(pair.outcome)) == (None, End)
    end, sent_at = pair.connect(), pair.schedule.now
    pair.network.send(end, b"hello")
    pair.run(1)
    ((at, message),) = pair.b.heard
    assert message == b"hello"
    assert at - sent_at == pytest.approx(pair.one_way_s + HANDLING_S)
    assert pair.network.traffic[0].sent_bytes == 5 + OVERHEAD_BYTES


@pytest.mark.parametrize(
    ("state", "outcome", "after_s"),
    [
        ({"listening": False}, Failure.REFUSED, 0.11),
        ({"powered": False}, Failure.SILENCE, DIAL_TIMEOUT_S),
        ({"awake": False}, Failure.SILENCE, DIAL_TIMEOUT_S),
    ],
)
def test_who_is_down_refuses_and_who_is_frozen_is_silent(
    state: dict[str, bool], outcome: Failure, after_s: float
) -> None:
    pair = Pair()
    for name, value in state.items():
        setattr(pair.b, name, value)
    pair.dial()
    pair.run(after_s)
    assert pair.outcome is outcome


def test_loss_is_delay_and_never_changes_the_order() -> None:
    pair = Pair()
    end = pair.connect()
    pair.network.conditions.loss = 0.4
    sent = [b"%d" % number for number in range(100)]
    for message in sent:
        pair.network.send(end, message)
    pair.run(60)
    assert pair.heard == sent
    assert pair.b.heard[-1][0] > 1.2


def test_drops_and_duplicates_are_knobs_of_their_own() -> None:
    pair = Pair()
    end = pair.connect()
    pair.network.conditions.drop = pair.network.conditions.duplicate = 0.3
    for number in range(200):
        pair.network.send(end, b"%d" % number)
        pair.run(0.1)
    assert 100 < len(set(pair.heard)) < 180
    assert len(pair.heard) > len(set(pair.heard)) + 20


def test_a_cut_holds_messages_back_until_a_retransmission_after_it_heals() -> None:
    pair = Pair()
    end = pair.connect()
    cut = pair.cut()
    pair.network.send(end, b"late")
    pair.network.send(end.far, b"other way")
    pair.run(5)
    assert pair.heard == []
    assert [message for _, message in pair.a.heard] == [b"other way"]
    pair.network.cuts.remove(cut)
    pair.run(10)
    assert pair.heard == [b"late"]
    assert pair.b.heard[0][0] > 6


def test_a_connection_is_given_up_after_long_silence() -> None:
    pair = Pair()
    end = pair.connect()
    pair.cut()
    pair.network.send(end, b"lost")
    pair.run(1100)
    assert (pair.a.over, end.open) == (1, False)


def test_a_frozen_process_finds_everything_when_it_goes_on() -> None:
    pair = Pair()
    end = pair.connect()
    pair.b.awake = False
    for number in range(3):
        pair.network.send(end, b"%d" % number)
    pair.run(100)
    assert pair.heard == []
    pair.b.awake = True
    pair.network.wake(pair.b.number)
    pair.run(0.1)
    assert pair.heard == [b"0", b"1", b"2"]


def test_closing_comes_behind_what_was_sent() -> None:
    pair = Pair()
    end = pair.connect()
    pair.network.send(end, b"last")
    pair.network.close(end)
    pair.network.send(end, b"too late")
    pair.run(1)
    assert (pair.heard, pair.b.over, end.far.open) == ([b"last"], 1, False)


def test_who_lost_power_answers_nothing_until_its_kernel_is_back() -> None:
    pair = Pair()
    end = pair.connect()
    pair.network.vanish(end.far)
    pair.b.powered = False
    pair.network.send(end, b"anybody?")
    pair.run(30)
    assert pair.a.over == 0
    pair.b.powered = True
    pair.run(60)
    assert pair.a.over == 1


def test_a_lost_connection_is_silent_and_another_can_be_made() -> None:
    pair = Pair()
    end = pair.connect()
    pair.network.lose(end)
    pair.network.send(end, b"anybody?")
    pair.network.send(end.far, b"anybody?")
    pair.run(60)
    assert (pair.a.heard, pair.b.heard, pair.a.over, pair.b.over) == ([], [], 0, 0)
    again = pair.connect()
    pair.network.send(again, b"here I am")
    pair.run(1)
    assert pair.heard == [b"here I am"]


def test_a_reset_ends_a_connection_for_both() -> None:
    pair = Pair()
    end = pair.connect()
    pair.network.send(end, b"never seen")
    pair.network.reset(end)
    pair.run(1)
    assert (pair.heard, pair.a.over, pair.b.over) == ([], 1, 1)
    assert (end.open, end.far.open) == (False, False)


def test_an_uplink_takes_its_time_for_each_byte() -> None:
    pair = Pair()
    end = pair.connect()
    pair.network.conditions.bytes_per_s = 1000
    for _ in range(3):
        pair.network.send(end, bytes(900))
    sent_at = pair.schedule.now
    pair.run(10)
    took = [at - sent_at - end.one_way_s - HANDLING_S for at, _ in pair.b.heard]
    assert took == [pytest.approx(seconds) for seconds in (1, 2, 3)]
    pair.network.conditions.bytes_per_s = 0
    pair.network.send(end, bytes(900))
    pair.run(end.one_way_s + 2 * HANDLING_S)
    assert len(pair.b.heard) == 4


@pytest.mark.parametrize(("size", "count"), [(1, MESSAGES_MAX), (BYTES_MAX // 4, 4)])
def test_a_full_queue_ends_the_connection(size: int, count: int) -> None:
    pair = Pair()
    end = pair.connect()
    pair.b.awake = False
    for _ in range(count):
        pair.network.send(end, bytes(size))
    assert end.open
    pair.network.send(end, b"x")
    pair.run(1)
    traffic = pair.network.traffic[0]
    assert (pair.a.over, end.open, traffic.overflows) == (1, False, 1)
    assert (traffic.queue_max, traffic.queue_bytes_max) == (count + 1, size * count + 1)


def test_both_ends_speak_the_newest_version_that_they_share() -> None:
    pair = Pair()
    pair.a.versions = (1, 2, 3)
    assert pair.connect().version == 1
    pair.b.versions = (1, 2)
    assert pair.connect().version == 2
