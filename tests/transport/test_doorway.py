from __future__ import annotations

import pytest

from p2pmesh.transport.banlist import TROUBLE_BURST, TROUBLE_RATE_PER_S
from p2pmesh.transport.doorway import (
    FRIENDS_MAX,
    STRANGERS_PER_NETWORK_MAX,
    Doorway,
    network_of,
)

HERE, HOST, OTHER = "127.0.0.1", "192.0.2.5", "192.0.2.6"


def strangers(count: int) -> list[str]:
    return [f"198.51.100.{number}" for number in range(count)]


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("192.0.2.5", "192.0.2.5"),
        ("::ffff:192.0.2.5", "192.0.2.5"),
        ("127.3.2.1", "loopback"),
        ("::1", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("unknown", "unknown"),
    ],
)
def test_the_network_of_an_address(host: str, network: str) -> None:
    assert network_of(host) == network


# Places


def test_the_oldest_gives_way_to_the_newest() -> None:
    doorway = Doorway[str](3)
    hosts = strangers(5)
    assert [doorway.enter(host, host) for host in hosts] == [None, None, None, *hosts[:2]]
    doorway.leave(hosts[3])
    assert doorway.enter(OTHER, "free now") is None
    doorway.leave(hosts[0])  # it had given way
    assert doorway.enter(HOST, "newest") == hosts[2]


def test_one_network_takes_places_from_itself_only() -> None:
    doorway = Doorway[int](64)
    doorway.enter(OTHER, -1)
    gone = [doorway.enter(HOST, number) for number in range(100)]
    kept = STRANGERS_PER_NETWORK_MAX
    assert gone == [None] * kept + list(range(100 - kept))


@pytest.mark.parametrize("host", [HOST, HERE, "2001:db8::1"])
def test_members_have_places_of_their_own_and_all_of_them(host: str) -> None:
    doorway = Doorway[str](8)
    doorway.proved("2001:db8::ff" if ":" in host else host)
    friends = [f"friend {number}" for number in range(8)]
    assert [doorway.enter(host, one) for one in friends] == [None] * 8
    assert not set(friends).intersection(doorway.enter(one, one) for one in strangers(100))
    assert doorway.enter(host, "one more") == friends[0]


def test_who_became_known_meanwhile_leaves_the_place_it_took() -> None:
    doorway = Doorway[str](1)
    doorway.enter(HOST, "first")
    doorway.proved(HOST)
    doorway.leave("first")
    assert doorway.enter(OTHER, "stranger") is None
    assert doorway.enter(HOST, "second") is None


def test_the_network_that_was_proved_longest_ago_is_forgotten() -> None:
    doorway = Doorway[str](8)
    networks = [f"10.0.{number // 256}.{number % 256}" for number in range(FRIENDS_MAX)]
    for host in networks:
        doorway.proved(host)
    doorway.proved(networks[0])
    doorway.proved(HOST)
    assert (networks[0] in doorway._proved, networks[1] in doorway._proved) == (True, False)


# Trouble


def heard(doorway: Doorway[str], host: str, seconds: int) -> int:
    """How many of 64 hellos each second from `host`, all for nothing, are listened to at once."""
    times = 0
    for step in range(64 * seconds):
        if not doorway.is_unwelcome(host, step / 64) and not doorway.must_wait(host, step / 64):
            times += 1
            doorway.failed(host, step / 64)
    return times


@pytest.mark.parametrize("host", [HOST, HERE, OTHER])
def test_trouble_without_end_is_heard_at_a_rate(host: str) -> None:
    doorway = Doorway[str](8)
    doorway.proved(OTHER)
    assert heard(doorway, host, 60) == pytest.approx(TROUBLE_BURST + 60 * TROUBLE_RATE_PER_S, abs=3)


def test_strangers_in_trouble_are_hung_up_on_and_members_wait() -> None:
    doorway = Doorway[str](8)
    doorway.proved(OTHER)
    for host in (HOST, OTHER, HERE):
        assert not doorway.is_unwelcome(host, 0.0)
        assert not doorway.must_wait(host, 0.0)
        for _ in range(2 * TROUBLE_BURST):
            doorway.failed(host, 0.0)
    assert [doorway.is_unwelcome(host, 0.0) for host in (HOST, OTHER, HERE)] == [True, False, False]
    assert [doorway.must_wait(host, 0.0) for host in (HOST, OTHER, HERE)] == [False, True, True]
    assert not doorway.is_unwelcome("192.0.2.99", 0.0)


def test_the_addresses_of_one_ipv6_network_are_in_trouble_together() -> None:
    doorway = Doorway[str](8)
    for number in range(2 * TROUBLE_BURST):
        doorway.failed(f"2001:db8::{number:x}", 0.0)
    assert doorway.is_unwelcome("2001:db8::ffff", 0.0)
    assert not doorway.is_unwelcome("2001:db8:0:1::1", 0.0)
