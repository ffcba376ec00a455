"""Keeps `PROTOCOL.md` true; `python -m tests.wire.test_protocol` writes its made parts anew."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator, Mapping

import pytest

from p2pmesh.config import Address
from p2pmesh.identity.credentials import (
    TTL_S,
    Credential,
    Role,
    found,
    is_signed,
    issue,
    read_credential,
)
from p2pmesh.identity.hello import GOSSIP, ClientHello, LocalIdentity, Needs, ServerHello
from p2pmesh.identity.keys import MeshId, NodeId, SigningKey
from p2pmesh.identity.tokens import Token, parse_token, prove
from p2pmesh.node.admission import (
    ANSWER_BYTES_MAX,
    ANSWER_TIMEOUT_S,
    LAN_BURST,
    LAN_PER_ADDRESS_BURST,
    REQUEST_BYTES_MAX,
    REQUEST_TIMEOUT_S,
)
from p2pmesh.wire.codec import decode
from p2pmesh.wire.evidence import (
    Accusation,
    accused_to_wire,
    make_certificate,
    make_fork,
    parse_certificate,
    parse_fork,
)
from p2pmesh.wire.facts import verify
from p2pmesh.wire.messages import (
    MESSAGE_BYTES_MAX,
    Ack,
    FetchRequest,
    Items,
    Message,
    Own,
    Ping,
    ProbeReport,
    ProbeRequest,
    Push,
    Range,
    Ranges,
    Unknown,
    decode_message,
    encode_message,
)
from p2pmesh.wire.records import Record, RecordCheck, seal
from p2pmesh.wire.registers import ACCUSED
from p2pmesh.wire.statements import (
    GRANT,
    INVITATION,
    POLICY,
    REVOCATION,
    Body,
    Grant,
    Invitation,
    Policy,
    Revocation,
    Statement,
    offer_proof,
    parse_statement,
    state,
)
from tests.repository import ROOT

DOCUMENT = ROOT / "p2pmesh" / "wire" / "PROTOCOL.md"

# Where bounds are named, in the order in which they are shown.
BOUNDED = (
    "identity/keys",
    "identity/credentials",
    "identity/spelling",
    "identity/tokens",
    "identity/hello",
    "wire/codec",
    "wire/registers",
    "wire/records",
    "wire/evidence",
    "wire/statements",
    "wire/messages",
    "state/owner_records",
    "state/outcome",
    "state/forks",
    "state/trust",
    "state/document",
    "gossip/ranges",
)
BOUND = re.compile(r"[A-Z][A-Z_]*(_MAX|_BYTES|_GRACE_S)|LAN_TTL_S|SPLIT|LEAF")
HEX_COLUMNS = 96


# Bounds


def bounds() -> Iterator[tuple[str, int, str, str]]:
    """Name, value, module, and the reason that stands beside it in the code."""
    for place in BOUNDED:
        path = ROOT / "p2pmesh" / f"{place}.py"
        source = path.read_text("utf-8")
        for statement in ast.parse(source).body:
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)]) if BOUND.fullmatch(name):
                    line = source.splitlines()[statement.lineno - 1]
                    module = f"p2pmesh.{place.replace('/', '.')}"
                    value = getattr(__import__(module, fromlist=[name]), name)
                    assert isinstance(value, int), f"{name} is no bound"
                    yield name, value, place, line.partition("  # ")[2]


def bounds_table() -> str:
    rows = [f"| `{name}` | {value} | {place} | {why} |" for name, value, place, why in bounds()]
    return "\n".join(["| name | value | in | why |", "|---|---|---|---|", *rows])


# Vectors


MESH_KEY = SigningKey(b"M" * 32)
MESH = MeshId(MESH_KEY.id)
ANNA, BERT, CARL = (SigningKey(seed * 32) for seed in (b"A", b"B", b"C"))
ID, OTHER_ID = bytes(range(16)), bytes(range(16, 32))
CHECK = RecordCheck()
EPOCH = 1_800_000_000
FOUNDERS = found(MESH_KEY, CARL.public, EPOCH - 3600)
TOKEN = Token(
    mesh=MESH,
    seed=bytes(range(16)),
    addresses=(Address("192.168.1.20", 9338), Address("kitchen.example", 9338)),
)


def given(key: SigningKey) -> Credential:
    """A credential of the founder's."""
    return issue(
        FOUNDERS,
        CARL,
        key.public,
        role=Role.SERVE,
        stage=False,
        basis="grant",
        now=EPOCH,
        ttl_s=TTL_S,
    )


def stated(body: Body) -> Statement:
    return state(CARL, FOUNDERS, body, mesh=MESH, now=EPOCH)


BODIES: Mapping[str, Body] = {
    POLICY: Policy(number=2, open=False, name="home", founded_at=EPOCH - 3600),
    INVITATION: Invitation(
        key=TOKEN.key.public,
        role=Role.SERVE,
        stage=True,
        until=EPOCH + 3600,
        uses=1,
        proof=offer_proof(TOKEN.key, mesh=MESH, owner=NodeId(CARL.id)),
    ),
    REVOCATION: Revocation(target=ANNA.id, keeps=frozenset([bytes(16)])),
    GRANT: Grant(credential=given(ANNA)),
}
STATEMENTS = {kind: stated(body) for kind, body in BODIES.items()}
FIRST = state(
    MESH_KEY,
    None,
    Policy(number=1, open=True, name="home", founded_at=EPOCH - 3600),
    mesh=MESH,
    now=EPOCH - 3600,
)


def record(key: SigningKey, register: str, body: Mapping[str, object]) -> Record:
    return seal(
        key,
        mesh=MESH,
        register=register,
        epoch=EPOCH,
        seq=2,
        instance=7,
        issued_at=EPOCH + 60,
        ttl_s=240,
        body=dict(body),
    )


RECORD = record(ANNA, "caps", {"name": "kitchen", "memory": 1 << 33})
TWIN = record(ANNA, "caps", {"name": "cellar", "memory": 1 << 33})
FORK = make_fork(RECORD, TWIN)
DOWN = Accusation(NodeId(ANNA.id), EPOCH, 2)
CERTIFICATE = make_certificate(
    DOWN, [record(key, ACCUSED, accused_to_wire([DOWN])) for key in (BERT, CARL)]
)
SIGN = {
    "token": 7,
    "at_ms": 1000 * EPOCH + 5,
    "cutoff": EPOCH - 5,
    "fingerprint": ID,
    "plan": OTHER_ID,
    "keep": True,
    "recent": (ID,),
}

MESSAGES: Mapping[str, Message] = {
    "facts": Push(statements=(FIRST.raw,), records=(RECORD.raw,), asked=True),
    "probe": Ping(**SIGN),  # type: ignore[arg-type]  # a mapping of several types
    "answer": Ack(**SIGN),  # type: ignore[arg-type]
    "ask": ProbeRequest(subject=NodeId(ANNA.id), token=300),
    "told": ProbeReport(subject=NodeId(ANNA.id), token=300, alive=False),
    "ranges": Ranges(
        ranges=(
            Range(lower=b"", upper=b"\x80", count=20, fingerprint=ID),
            Range(lower=b"\x80", upper=b"", count=0, fingerprint=bytes(16)),
        )
    ),
    "items": Items(lower=b"", upper=b"\x80", ids=(ID, OTHER_ID), answer=True),
    "want": FetchRequest(ids=(ID, OTHER_ID)),
    "own": Own(),
}


def _identity(key: SigningKey, instance: int) -> LocalIdentity:
    shown = given(key).raw
    return LocalIdentity(key=key, instance=instance, mesh=MESH, mesh_name="home", credential=shown)


def hello() -> dict[str, bytes]:
    """The four messages between Anna, who calls, and Bert."""
    certificate = b"certificate"
    caller = ClientHello(
        _identity(ANNA, 1),
        purpose="gossip",
        expected=NodeId(BERT.id),
        certificate=certificate,
        nonce=b"a" * 32,
        now=EPOCH,
    )
    host = ServerHello(
        _identity(BERT, 2),
        purposes={GOSSIP: Needs(Role.SERVE)},
        certificate=certificate,
        nonce=b"b" * 32,
        now=EPOCH + 1,
    )
    start = caller.start()
    challenge = host.challenge(start)
    proof = caller.proof(challenge)
    verdict, _ = host.verdict(proof)
    caller.finish(verdict)
    return {"start": start, "challenge": challenge, "proof": proof, "verdict": verdict}


def vectors() -> Iterator[tuple[str, bytes]]:
    """Everything that is shown as bytes, with its title."""
    for letter, key in zip("ABC", (ANNA, BERT, CARL), strict=True):
        yield f"Public key of the seed of 32 `{letter}`", key.public
        yield f"Id of `{letter}`", key.id
    yield "Id of the mesh, whose key is of the seed of 32 `M`", MESH
    yield "Credential of `C`, the founder", FOUNDERS.raw
    yield "Credential of `A`, which `C` granted the role `serve`", given(ANNA).raw
    yield "Id of its last delegation", given(ANNA).last.id
    yield "Token with the seed 0, 1, … 15, as ASCII", str(TOKEN).encode("ascii")
    yield "Public key of its invitation", TOKEN.key.public
    proof = prove(TOKEN, node=ANNA.public, binding=b"b" * 32)
    yield "Signature with it for `A` on a connection whose binding is 32 `b`", proof
    yield "Statement by the mesh: the first policy", FIRST.raw
    for kind, statement in STATEMENTS.items():
        yield f"Statement by `C`: {kind}", statement.raw
        yield "Its id", statement.id
    for step, said in hello().items():
        yield f"Hello of `A` to `B`, whose certificate is the text `certificate`: {step}", said
    yield 'Record of `A`: `caps` is `{"memory": 2^33, "name": "kitchen"}`', RECORD.raw
    yield "Its digest", RECORD.digest
    yield "Certificate: `B` and `C` accuse `A`", CERTIFICATE.raw
    yield "Its id", CERTIFICATE.id
    yield "Fork: that record of `A` and one that says `cellar`", FORK.raw
    yield "Its id", FORK.id
    for kind, message in MESSAGES.items():
        yield f"Message `{kind}`", encode_message(message)


def vectors_text() -> str:
    blocks = []
    for title, data in vectors():
        lines = "\n".join(textwrap.wrap(data.hex(), HEX_COLUMNS))
        blocks.append(f"**{title}**\n```\n{lines}\n```")
    return "\n\n".join(blocks)


# The document


MADE = {"bounds": bounds_table, "vectors": vectors_text}


def rewritten(document: str) -> str:
    """The document with its made parts as the code has them now."""
    for name, make in MADE.items():
        begin, end = f"<!-- {name}: made from the code -->\n", f"<!-- end of {name} -->"
        before, _, rest = document.partition(begin)
        _, _, after = rest.partition(end)
        document = f"{before}{begin}{make()}\n{end}{after}"
    return document


def document() -> str:
    return DOCUMENT.read_text("utf-8")


def fields_of(kind: str) -> dict[str, str]:
    """The fields that the document names for a kind of message, each with its type."""
    section = document().partition(f"\n### `{kind}`\n")[2].partition("\n#")[0]
    return dict(re.findall(r"^\| `(\w+)` \| ([a-z ]+) \|", section, re.MULTILINE))


def test_bounds_and_vectors_are_those_of_the_code() -> None:
    assert document() == rewritten(document()), "run: python -m tests.wire.test_protocol"


def test_every_bound_that_the_text_names_is_in_the_table() -> None:
    named = {name for name in re.findall(r"`([A-Z_]+)`", document()) if len(name) > 1}
    assert named <= {name for name, *_ in bounds()}


def test_rules_are_numbered_without_gaps_in_the_order_of_the_sections() -> None:
    sections = re.split(r"^## (\d+)\. ", document(), flags=re.MULTILINE)[1:]
    numbers = dict(zip(sections[::2], sections[1::2], strict=True))
    for number in (*map(str, range(1, 9)), "11", "12", "13"):
        rules = re.findall(r"^- \*\*(\d+\.\d+)\*\* ", numbers[number], re.MULTILINE)
        assert rules == [f"{number}.{place + 1}" for place in range(len(rules))]
        assert rules, f"section {number} has no rules"


def test_every_kind_of_message_is_written_down() -> None:
    kinds = {type(message) for message in MESSAGES.values()} | {Unknown}
    assert kinds == set(Message.__args__)
    assert re.findall(r"^### `(\w+)`$", document(), re.MULTILINE) == list(MESSAGES)


TYPES = {int: "integer", bool: "boolean", bytes: "bytes", list: "list"}


@pytest.mark.parametrize("kind", MESSAGES)
def test_fields_of_messages_are_those_of_the_code(kind: str) -> None:
    said = decode(encode_message(MESSAGES[kind]), bytes_max=MESSAGE_BYTES_MAX)
    assert said.pop("t") == kind
    assert {name: text.split()[0] for name, text in fields_of(kind).items()} == {
        name: TYPES[type(value)] for name, value in said.items()
    }


def test_the_vectors_read_back() -> None:
    shown = dict(vectors())
    credential = read_credential(shown["Credential of `A`, which `C` granted the role `serve`"])
    assert credential == given(ANNA)
    assert is_signed(credential)
    assert parse_token(shown["Token with the seed 0, 1, … 15, as ASCII"].decode()) == TOKEN
    assert shown["Public key of its invitation"] == TOKEN.key.public
    for kind, body in BODIES.items():
        statement = parse_statement(shown[f"Statement by `C`: {kind}"])
        assert statement.body == body
        assert verify(statement, CHECK)
    for kind, message in MESSAGES.items():
        assert decode_message(shown[f"Message `{kind}`"]) == message
    assert CHECK.verify(CHECK.parse(RECORD.raw))
    assert verify(parse_certificate(CERTIFICATE.raw, CHECK), CHECK)
    assert verify(parse_fork(FORK.raw, CHECK), CHECK)
    assert RECORD.raw[134:150] == ANNA.id


def test_requests_to_join_are_as_large_as_the_text_says() -> None:
    said = document().partition("\n## 13. ")[2]
    assert f"at most {REQUEST_BYTES_MAX} bytes for a request, {ANSWER_BYTES_MAX} for an" in said
    assert f"within {REQUEST_TIMEOUT_S:.0f} s, an answer within {ANSWER_TIMEOUT_S:.0f} s" in said
    assert f"at most {LAN_BURST} an hour, and {LAN_PER_ADDRESS_BURST} from one address" in said


def test_a_changed_document_is_noticed() -> None:
    assert rewritten(document().replace(RECORD.digest.hex(), "00")) == document()


if __name__ == "__main__":
    DOCUMENT.write_text(rewritten(document()), "utf-8")
