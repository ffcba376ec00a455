from __future__ import annotations

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
from p2pmesh.identity.keys import MeshId, NodeId, SigningKey, show_id
from p2pmesh.node.keystore import (
    MeshInfo,
    found_mesh,
    load_book,
    load_mesh,
    next_epoch,
    node_key,
    save_book,
    save_mesh,
)
from p2pmesh.state.document import EPOCH_AHEAD_S_MAX
from p2pmesh.wire.codec import INT_MAX

MESH = MeshId(b"m" * 16)
CARD = MeshInfo(id=MESH, name="quiet-otter")
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
def test_only_the_owner_reads_the_keys(home: Home) -> None:
    node_key(home)
    found_mesh(home)
    assert stat.S_IMODE(home.node_key.stat().st_mode) == 0o600
    assert stat.S_IMODE(home.mesh_key.stat().st_mode) == 0o600


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
    save_mesh(home, MeshInfo(id=MESH, name=written))
    assert load_mesh(home) == MeshInfo(id=MESH, name=name)


def test_a_founded_mesh_has_its_key_here_and_is_remembered(home: Home) -> None:
    card = found_mesh(home)
    assert load_mesh(home) == card
    first, _, second = card.name.partition("-")
    assert first.isalpha()
    assert second.isalpha()
    home.mesh_key.replace(home.node_key)
    assert node_key(home).id == card.id


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "junk",
        "[]",
        "null",
        "{}",
        '{"id": "abc", "name": "x"}',
        '{"id": 5, "name": "x"}',
        f'{{"id": "{show_id(MESH)}"}}',
        "\udcff",
    ],
)
def test_a_damaged_mesh_file_says_what_to_do(home: Home, damaged: str) -> None:
    home.mesh_file.write_text(damaged, "utf-8", errors="surrogateescape")
    with pytest.raises(LocalError, match=r"mesh\.json is damaged; delete it to start afresh"):
        load_mesh(home)


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
