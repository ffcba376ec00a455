from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.config import Address
from p2pmesh.errors import ConfigError
from p2pmesh.identity.keys import MeshId, SigningKey
from p2pmesh.identity.recovery import recovery_code
from p2pmesh.identity.spelling import read_spelling, spell
from p2pmesh.identity.tokens import (
    PREFIX,
    TOKEN_CHARS_MAX,
    Token,
    is_proof,
    is_token,
    parse_token,
    prove,
)
from tests.identity.builders import MESH

SEED = bytes(range(16))
HERE = Address("192.168.1.20", 9338)
TOKEN = Token(mesh=MESH, seed=SEED, addresses=(HERE,))
ANNA, BERT = (SigningKey(letter * 32) for letter in (b"a", b"b"))


def token(*addresses: Address) -> Token:
    return Token(mesh=MESH, seed=SEED, addresses=addresses)


def body_of(text: str) -> bytes:
    return read_spelling(text.removeprefix(PREFIX))


def written(body: bytes) -> str:
    """A token of any bytes, with the right checksum."""
    return PREFIX + spell(body)


@pytest.mark.parametrize(
    ("addresses", "chars"),
    [
        ((HERE,), 81),
        ((HERE, Address("10.0.0.3", 9338)), 93),
        ((Address("fd00::1", 9338), HERE), 112),
        ((Address("kitchen.home.example.org", 1),), 115),
    ],
)
def test_a_token_is_short_and_reads_back(addresses: tuple[Address, ...], chars: int) -> None:
    made = token(*addresses)
    assert parse_token(str(made)) == made
    assert len(str(made)) == chars


def test_no_more_than_two_addresses_are_handed_on() -> None:
    some = [Address(f"10.0.0.{number}", 9338) for number in range(4)]
    assert parse_token(str(token(*some))) == token(*some[:2])


@pytest.mark.parametrize(
    "spelt",
    [
        str(TOKEN).upper(),
        f"  {TOKEN}\n",
        str(TOKEN)[:40] + "\n" + str(TOKEN)[40:],
        str(TOKEN)[:40] + " " + str(TOKEN)[40:],
    ],
)
def test_a_token_may_be_broken_and_spelt_as_mail_does(spelt: str) -> None:
    assert is_token(spelt)
    assert parse_token(spelt) == TOKEN


@pytest.mark.parametrize("text", ["", "kitchen:9338", "192.168.1.1"])
def test_an_address_is_no_token(text: str) -> None:
    assert not is_token(text)
    with pytest.raises(ConfigError, match="should begin with p2pmesh1-"):
        parse_token(text)


def test_a_token_of_another_version_is_told_apart() -> None:
    assert is_token("p2pmesh2-abc")
    with pytest.raises(ConfigError, match="another version"):
        parse_token("p2pmesh2-abc")


def test_a_recovery_code_is_told_apart() -> None:
    with pytest.raises(ConfigError, match="this is a recovery code, no invitation"):
        parse_token(recovery_code(b"s" * 32))


@pytest.mark.parametrize("length", range(len(PREFIX), len(str(TOKEN))))
def test_a_token_cut_short_is_noticed(length: int) -> None:
    with pytest.raises(ConfigError, match="copy the whole of it again"):
        parse_token(str(TOKEN)[:length])


@pytest.mark.parametrize("place", range(len(PREFIX), len(str(TOKEN))))
def test_a_wrong_letter_is_noticed(place: int) -> None:
    for letter in "a7":
        if str(TOKEN)[place] != letter:
            with pytest.raises(ConfigError):
                parse_token(str(TOKEN)[:place] + letter + str(TOKEN)[place + 1 :])


BODY = body_of(str(TOKEN))
FORMS = {
    "version": b"\x02" + BODY[1:],
    "no address": BODY[:33] + b"\x00",
    "three addresses": BODY[:33] + b"\x03" + BODY[34:] * 3,
    "too few": BODY[:33] + b"\x02" + BODY[34:],
    "bytes left": BODY + b"x",
    "unknown kind": BODY[:34] + b"\x09" + BODY[35:],
    "cut address": BODY[:-1],
    "name with a control character": BODY[:34] + b"\x01\x03a\x1bb\x00\x50",
    "name that is no ascii": BODY[:34] + b"\x01\x01\xff\x00\x50",
    "name of nothing": BODY[:34] + b"\x01\x00\x00\x50",
    "port of nothing": BODY[:-2] + b"\x00\x00",
    "empty": b"",
}


@pytest.mark.parametrize("body", FORMS.values(), ids=FORMS)
def test_bytes_of_another_form_are_no_token(body: bytes) -> None:
    assert parse_token(written(BODY)) == TOKEN
    with pytest.raises(ConfigError):
        parse_token(written(body))


def test_what_is_too_long_is_not_even_read() -> None:
    with pytest.raises(ConfigError, match="too long"):
        parse_token(PREFIX + "a" * TOKEN_CHARS_MAX)


@given(st.text(max_size=200), st.binary(max_size=120))
def test_junk_is_a_persons_mistake_and_nothing_else(text: str, body: bytes) -> None:
    for junk in (text, PREFIX + text, PREFIX + base64.b32encode(body).decode(), written(body)):
        with pytest.raises(ConfigError):
            parse_token(junk)


hosts = st.one_of(
    st.ip_addresses().map(str).filter(lambda text: "%" not in text),
    st.from_regex(r"[a-z]([a-z0-9-]{0,20}[a-z0-9])?(\.[a-z]{2,9}){0,3}", fullmatch=True),
)
addresses = st.builds(Address, hosts, st.integers(1, 65535))


@given(st.binary(min_size=16, max_size=16), st.lists(addresses, min_size=1, max_size=2))
def test_whatever_is_handed_on_reads_back(seed: bytes, some: list[Address]) -> None:
    made = Token(mesh=MESH, seed=seed, addresses=tuple(some))
    assert parse_token(str(made)) == made
    assert parse_token(str(made)).key.public == made.key.public


# --- proofs -------------------------------------------------------------------------------------

BINDING = b"b" * 32


def test_who_has_the_token_proves_it_on_one_connection_for_one_node() -> None:
    proof = prove(TOKEN, node=ANNA.public, binding=BINDING)
    key = TOKEN.key.public

    def holds(
        key: bytes = key, mesh: MeshId = MESH, node: bytes = ANNA.public, binding: bytes = BINDING
    ) -> bool:
        return is_proof(key, proof, mesh=mesh, node=node, binding=binding)

    assert holds()
    assert not holds(node=BERT.public)
    assert not holds(binding=b"c" * 32)
    assert not holds(mesh=MeshId(b"n" * 16))
    assert not holds(key=ANNA.public)


def test_the_seed_is_not_the_key() -> None:
    assert TOKEN.key.public != SigningKey(SEED + SEED).public
    other = Token(mesh=MESH, seed=bytes(16), addresses=(HERE,))
    assert other.key.public != TOKEN.key.public
