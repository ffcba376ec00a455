from __future__ import annotations

import base64
import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from structlog.testing import capture_logs

from p2pmesh.config import Address
from p2pmesh.errors import LocalError
from p2pmesh.home import Home
from p2pmesh.identity.credentials import Role, is_signed
from p2pmesh.identity.keys import MeshId, NodeId, SigningKey, show_id
from p2pmesh.node.keystore import (
    forget_mesh,
    found_mesh,
    load_book,
    load_mesh,
    load_statements,
    load_used,
    next_epoch,
    node_key,
    save_book,
    save_mesh,
    save_statements,
    save_used,
)
from p2pmesh.state.document import EPOCH_AHEAD_S_MAX
from p2pmesh.wire.codec import INT_MAX
from p2pmesh.wire.statements import Policy, Revocation, Statement, state
from tests.identity.builders import FOUNDER, FOUNDERS, MESH
from tests.node.cards import card_of

CARD = card_of()
KEY = SigningKey(b"k" * 32)
NOW = 2_000_000_000.0
NODE = NodeId(b"n" * 16)
BOOK = {
    NODE: (Address("192.168.1.5", 9338), Address("fd00::5", 9338)),
    NodeId(b"o" * 16): (Address("kitchen-pc.local", 9338),),
}


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home.at(tmp_path / "home")
    home.create()
    yield home
    left = [path.name for path in home.root.iterdir() if path.name.startswith(".")]
    assert left == []


def pem(key: Ed25519PrivateKey | X25519PrivateKey, secrecy: KeySerializationEncryption) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, secrecy)


def files(home: Home) -> list[str]:
    return sorted(path.name for path in home.root.iterdir() if path.is_file())


GOOD = Ed25519PrivateKey.from_private_bytes(bytes(32))


# Keys


def test_a_node_keeps_its_key(home: Home) -> None:
    first = node_key(home)
    assert node_key(home).id == first.id
    assert home.node_key.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----\n")


def test_two_nodes_have_different_keys(home: Home, tmp_path: Path) -> None:
    other = Home.at(tmp_path / "other")
    other.create()
    assert node_key(home).id != node_key(other).id


def test_a_key_of_another_program_is_read(home: Home) -> None:
    home.node_key.write_bytes(pem(GOOD, NoEncryption()))
    assert node_key(home).public == SigningKey(bytes(32)).public


@pytest.mark.skipif(sys.platform == "win32", reason="permission bits")
def test_only_the_owner_reads_the_key(home: Home) -> None:
    node_key(home)
    assert stat.S_IMODE(home.node_key.stat().st_mode) == 0o600


@pytest.mark.skipif(sys.platform == "win32", reason="permission bits")
def test_a_key_that_others_could_read_is_closed_to_them_and_logged(home: Home) -> None:
    before = node_key(home).id
    home.node_key.chmod(0o644)
    with capture_logs() as logs:
        assert node_key(home).id == before
    assert [entry["event"] for entry in logs] == ["key_was_readable"]
    assert stat.S_IMODE(home.node_key.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"junk",
        pem(GOOD, NoEncryption())[:60],
        pem(GOOD, BestAvailableEncryption(b"secret")),
        pem(X25519PrivateKey.from_private_bytes(bytes(32)), NoEncryption()),
    ],
    ids=["empty", "junk", "cut", "encrypted", "another kind"],
)
def test_a_damaged_key_is_never_replaced(home: Home, damaged: bytes) -> None:
    home.node_key.write_bytes(damaged)
    with pytest.raises(LocalError) as caught:
        node_key(home)
    assert str(caught.value) == (
        f"{home.node_key} holds no usable key; restore it, or delete it to be a new node"
    )
    assert home.node_key.read_bytes() == damaged


def test_a_key_that_cannot_be_read_says_so(home: Home) -> None:
    home.node_key.mkdir()
    with pytest.raises(LocalError, match=r"^Cannot read .*node\.key"):
        node_key(home)


# The mesh


def test_a_new_home_belongs_to_no_mesh(home: Home) -> None:
    assert load_mesh(home) is None


def test_a_mesh_is_remembered(home: Home) -> None:
    save_mesh(home, CARD)
    assert load_mesh(home) == CARD


@pytest.mark.parametrize(
    ("written", "name"), [("\x1b[2Jquiet\notter", "[2Jquiet otter"), ("\u202e", "unnamed")]
)
def test_a_name_that_steers_terminals_is_cleaned_when_it_is_read(
    home: Home, written: str, name: str
) -> None:
    save_mesh(home, card_of(name=written))
    assert load_mesh(home) == card_of(name=name)


@pytest.mark.parametrize("is_open", [True, False])
def test_a_founded_mesh_is_remembered_with_its_rules_and_a_founder(
    home: Home, *, is_open: bool
) -> None:
    card = found_mesh(home, KEY, name="our house", is_open=is_open, now=NOW)
    assert load_mesh(home) == card
    assert (card.name, card.founded_at, card.joined_at) == ("our house", NOW, NOW)
    own = card.credential
    assert (own.role, own.stage, own.last.basis) == (Role.ADMIN, True, "founder")
    assert own.node == KEY.id
    assert own.mesh == card.id
    assert is_signed(own)
    (rules,) = load_statements(home, card.id)
    assert bytes(rules.owner) == card.id
    assert rules.credential is None
    assert rules.body == Policy(number=1, open=is_open, name="our house", founded_at=int(NOW))


def test_a_mesh_without_a_name_gets_two_words(home: Home) -> None:
    card = found_mesh(home, KEY, name="", is_open=True, now=NOW)
    first, _, second = card.name.partition("-")
    assert first.isalpha()
    assert second.isalpha()


def test_each_founded_mesh_is_another_one(home: Home) -> None:
    first, second = (found_mesh(home, KEY, name="x", is_open=True, now=NOW) for _ in range(2))
    assert first.id != second.id
    assert load_mesh(home) == second
    assert load_statements(home, first.id) == ()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_mesh_that_cannot_be_kept_is_not_founded(home: Home) -> None:
    home.root.chmod(0o500)
    try:
        with pytest.raises(LocalError, match="Cannot write"):
            found_mesh(home, KEY, name="x", is_open=True, now=NOW)
    finally:
        home.root.chmod(0o700)


def test_the_key_of_a_founded_mesh_is_nowhere(home: Home) -> None:
    card = found_mesh(home, KEY, name="x", is_open=True, now=NOW)
    assert files(home) == ["mesh.json", "statements.json"]
    for path in (home.mesh_file, home.statements_file):
        assert b"PRIVATE" not in path.read_bytes()
    assert card.credential.chain[0].signer != KEY.public


def test_a_mesh_is_forgotten_with_all_that_was_kept_of_it(home: Home) -> None:
    card = found_mesh(home, KEY, name="x", is_open=True, now=NOW)
    save_book(home, card.id, BOOK)
    save_used(home, {b"i" * 16: [NODE]})
    node_key(home)
    forget_mesh(home)
    assert files(home) == ["node.key"]
    assert load_mesh(home) is None
    forget_mesh(home)


def test_a_file_that_cannot_be_forgotten_is_said(home: Home) -> None:
    home.peers_file.mkdir()
    with pytest.raises(LocalError, match=r"^Cannot delete .*peers\.json \("):
        forget_mesh(home)


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "junk",
        "[]",
        "[" * 100_000,
        "null",
        "{}",
        '{"id": "abc", "name": "x"}',
        '{"id": 5, "name": "x"}',
        f'{{"id": "{show_id(MESH)}", "name": "of an earlier version"}}',
        "\udcff",
    ],
)
def test_a_damaged_mesh_file_says_what_to_do_and_stays(home: Home, damaged: str) -> None:
    home.mesh_file.write_text(damaged, "utf-8", errors="surrogateescape")
    before = home.mesh_file.read_bytes()
    with pytest.raises(LocalError) as caught:
        load_mesh(home)
    assert str(caught.value) == (
        f"{home.mesh_file} is damaged, or of an earlier version of p2pmesh; restore it, or "
        "start afresh, without this membership: p2pmesh leave"
    )
    assert home.mesh_file.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        {"id": show_id(b"x" * 16)},
        {"credential": ""},
        {"credential": "%%%"},
        {"credential": base64.b64encode(b"junk").decode()},
        {"credential": base64.b64encode(CARD.credential.raw[:-1]).decode()},
        {"credential": None},
        {"founded_at": "then"},
        {"founded_at": None},
        {"joined_at": []},
    ],
)
def test_a_mesh_file_with_a_wrong_field_is_damaged(home: Home, change: dict[str, object]) -> None:
    save_mesh(home, CARD)
    fields = json.loads(home.mesh_file.read_text("utf-8"))
    home.mesh_file.write_text(json.dumps({**fields, **change}), "utf-8")
    with pytest.raises(LocalError, match=r"mesh\.json is damaged, or of an earlier version"):
        load_mesh(home)


# Statements


def revocation(target: bytes) -> Statement:
    body = Revocation(target=target, keeps=frozenset())
    return state(FOUNDER, FOUNDERS, body, mesh=MESH, now=NOW)


def test_statements_are_remembered_for_their_mesh(home: Home) -> None:
    said = (revocation(b"a" * 16), revocation(b"b" * 16))
    assert load_statements(home, MESH) == ()
    save_statements(home, MESH, said)
    assert load_statements(home, MESH) == said
    assert load_statements(home, MeshId(b"x" * 16)) == ()


def statements_text(*raws: bytes, mesh: bytes = MESH) -> str:
    texts = [base64.b64encode(raw).decode() for raw in raws]
    return json.dumps({"mesh": show_id(mesh), "statements": texts})


FLIPPED = bytearray(revocation(b"a" * 16).raw)
FLIPPED[5] ^= 1


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "junk",
        "[]",
        "[" * 100_000,
        "{}",
        "\udcff",
        f'{{"mesh": "{show_id(MESH)}"}}',
        f'{{"mesh": "{show_id(MESH)}", "statements": 5}}',
        f'{{"mesh": "{show_id(MESH)}", "statements": ["%"]}}',
        f'{{"mesh": "{show_id(MESH)}", "statements": [null]}}',
        statements_text(b""),
        statements_text(b"junk" * 50),
        statements_text(bytes(FLIPPED)),
        statements_text(revocation(b"a" * 16).raw)[:-30],
    ],
)
def test_damaged_statements_are_never_passed_over(home: Home, damaged: str) -> None:
    """Without them, whoever was revoked would be back."""
    home.statements_file.write_text(damaged, "utf-8", errors="surrogateescape")
    before = home.statements_file.read_bytes()
    with pytest.raises(LocalError) as caught:
        load_statements(home, MESH)
    assert str(caught.value) == (
        f"{home.statements_file} is damaged; restore it, or join the mesh anew: p2pmesh leave"
    )
    assert home.statements_file.read_bytes() == before


# Uses of invitations


def test_uses_are_remembered(home: Home) -> None:
    used = {b"i" * 16: [NODE, NodeId(b"o" * 16)], b"j" * 16: []}
    assert load_used(home) == {}
    save_used(home, used)
    assert load_used(home) == used


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "junk",
        "[]",
        "[" * 100_000,
        "null",
        "\udcff",
        '{"junk": []}',
        f'{{"{show_id(MESH)}": 5}}',
        f'{{"{show_id(MESH)}": ["junk"]}}',
        f'{{"{show_id(MESH)}": [7]}}',
    ],
)
def test_damaged_uses_are_never_passed_over(home: Home, damaged: str) -> None:
    """Without them, more would get in than were invited."""
    home.invitations_file.write_text(damaged, "utf-8", errors="surrogateescape")
    before = home.invitations_file.read_bytes()
    with pytest.raises(LocalError, match=r"invitations\.json is damaged; delete it, and revoke"):
        load_used(home)
    assert home.invitations_file.read_bytes() == before


# The epoch


def test_epochs_grow_and_are_at_least_the_time(home: Home) -> None:
    assert next_epoch(home, 1000.9) == 1000
    assert next_epoch(home, 1000.9) == 1001
    assert next_epoch(home, 500.0) == 1002, "a clock that was set back"
    assert next_epoch(home, 2000.0) == 2000
    assert home.epoch_file.read_text("ascii") == "2000\n"


@pytest.mark.parametrize("damaged", ["", "junk", "1.5", "9" * 30, "9" * 5000, "-7", "\0\0\0"])
def test_a_damaged_epoch_starts_again_from_the_time(home: Home, damaged: str) -> None:
    home.epoch_file.write_text(damaged, "ascii")
    with capture_logs() as logs:
        assert next_epoch(home, 1000.0) == 1000
    assert [entry["event"] for entry in logs] == ["epoch_unreadable"]
    assert next_epoch(home, 1000.0) == 1001


@pytest.mark.parametrize("ahead_s", [EPOCH_AHEAD_S_MAX // 2, EPOCH_AHEAD_S_MAX, INT_MAX])
def test_an_epoch_of_a_clock_that_was_far_ahead_is_given_up(home: Home, ahead_s: int) -> None:
    home.epoch_file.write_text(str(1000 + ahead_s), "ascii")
    with capture_logs() as logs:
        assert next_epoch(home, 1000.0) == 1000
    assert [entry["event"] for entry in logs] == ["epoch_unreadable"]


def test_an_epoch_of_a_clock_that_was_a_little_ahead_stands(home: Home) -> None:
    home.epoch_file.write_text(str(1000 + EPOCH_AHEAD_S_MAX // 4), "ascii")
    assert next_epoch(home, 1000.0) == 1001 + EPOCH_AHEAD_S_MAX // 4


def test_an_epoch_that_cannot_be_kept_is_not_used(home: Home) -> None:
    home.epoch_file.mkdir()
    with pytest.raises(LocalError, match="Cannot write"):
        next_epoch(home, 1000.0)


# The address book


def test_the_address_book_is_remembered(home: Home) -> None:
    assert load_book(home, MESH) == {}
    save_book(home, MESH, BOOK)
    assert load_book(home, MESH) == BOOK


def test_the_address_book_of_another_mesh_is_not_used(home: Home) -> None:
    save_book(home, MESH, BOOK)
    assert load_book(home, MeshId(b"x" * 16)) == {}


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "[]",
        "[" * 100_000,
        "{}",
        f'{{"mesh": "{show_id(MESH)}"}}',
        f'{{"mesh": "{show_id(MESH)}", "nodes": []}}',
        f'{{"mesh": "{show_id(MESH)}", "nodes": {{"junk": []}}}}',
        f'{{"mesh": "{show_id(MESH)}", "nodes": {{"{show_id(NODE)}": 5}}}}',
        f'{{"mesh": "{show_id(MESH)}", "nodes": {{"{show_id(NODE)}": [5]}}}}',
        f'{{"mesh": "{show_id(MESH)}", "nodes": {{"{show_id(NODE)}": ["nowhere"]}}}}',
    ],
)
def test_a_damaged_address_book_is_only_a_loss(home: Home, damaged: str) -> None:
    home.peers_file.write_text(damaged, "utf-8")
    with capture_logs() as logs:
        assert load_book(home, MESH) == {}
    assert [entry["event"] for entry in logs] == ["address_book_unreadable"]


def test_files_for_people_end_with_a_line_end(home: Home) -> None:
    save_mesh(home, CARD)
    save_book(home, MESH, BOOK)
    assert home.mesh_file.read_text("utf-8").endswith("}\n")
    assert home.peers_file.read_text("utf-8").endswith("}\n")
