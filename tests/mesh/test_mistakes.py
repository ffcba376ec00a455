"""What users get wrong: each mistake is one sentence, the right exit code, and nothing left over.

Exit code 2: it was asked for wrongly. Exit code 1: it was right and could not be done.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import pytest

from p2pmesh.models.store import EMBEDDED
from tests.mesh.nodes import ANY_PORTS, assert_sentence, cli


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistake:
    """A command line and what has to come of it.

    Attributes:
        arguments: `{home}`, `{here}` are filled in; `here` has the files of `_lay_out`.
        code: The exit code.
        says: Words that the sentence holds.
    """

    arguments: tuple[str, ...]
    code: int
    says: tuple[str, ...]
    environ: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, bytes | None] = field(default_factory=dict)


def up(*arguments: str, code: int, says: tuple[str, ...]) -> Mistake:
    return Mistake(arguments=("up", *ANY_PORTS, *arguments), code=code, says=says)


def home(name: str, content: bytes | None, *says: str, code: int = 1) -> Mistake:
    """A start in a home with this file, or folder where there is no content."""
    files = {f"home/{name}": content}
    return replace(up(code=code, says=says), files=files)


def config(text: bytes, *says: str) -> Mistake:
    return home("config.toml", text, "config.toml", *says, code=2)


MISTAKES: Mapping[str, Mistake] = {
    # The command line itself.
    "an unknown command": Mistake(arguments=("upp",), code=2, says=("upp", "p2pmesh --help")),
    "an unknown option": up("--modell=x", code=2, says=("--modell", "--model")),
    "an argument too many": up("extra", code=2, says=("extra", "p2pmesh up --help")),
    "an option without its value": Mistake(arguments=("up", "--api"), code=2, says=("--api",)),
    # Values.
    "an empty home": up("--home=", code=2, says=("--home", "empty")),
    "an empty name": up("--name=", code=2, says=("--name", "64")),
    "a name too long": up("--name=" + "x" * 65, code=2, says=("--name", "64")),
    "a name of two lines": up("--name=a\nb", code=2, says=("--name", "printable")),
    "an empty address": up("--api=", code=2, says=("--api", "HOST:PORT")),
    "a port that does not exist": up("--api=127.0.0.1:65536", code=2, says=("--api", "65535")),
    "a port below zero": up("--console=127.0.0.1:-1", code=2, says=("--console", "HOST:PORT")),
    "a join without sense": up("--join=:::", code=2, says=("--join", "HOST:PORT")),
    "a size without sense": up("--memory=lots", code=2, says=("--memory", "8GiB")),
    "a size below zero": up("--memory=-3GB", code=2, says=("--memory", "8GiB")),
    "no slots": up("--slots=0", code=2, says=("--slots", "whole number")),
    "a context without sense": up("--context=much", code=2, says=("--context", "whole number")),
    # Variables and the file.
    "a variable without sense": replace(
        up(code=2, says=("P2PMESH_MEMORY", "8GiB")), environ={"P2PMESH_MEMORY": "much"}
    ),
    "a file that is not TOML": config(b"x = = 1", "line 1"),
    "a file that is not text": config(b"\xff\xfe", "UTF-8"),
    "a setting that does not exist": config(b'memroy = "1GB"', "memroy", "memory"),
    "a setting of the wrong type": config(b"memory = 1.5", "memory"),
    # Paths.
    "a home that is a file": up("--home={here}/file", code=2, says=("{here}/file", "--home")),
    "a home below a file": up("--home={here}/file/x", code=2, says=("{here}/file", "--home")),
    "a home that cannot be made": up("--home=/proc/x", code=1, says=("/proc/x", "--home")),
    "no such model": up("--model={here}/no.gguf", code=2, says=("no.gguf", "p2pmesh models")),
    "a folder for a model": up("--model={here}", code=2, says=("{here}", "folder")),
    "a device for a model": up("--model=/dev/null", code=2, says=("/dev/null", "GGUF")),
    "an empty model": up("--model={here}/empty.gguf", code=1, says=("empty.gguf", "again")),
    "a model of random bytes": up("--model={here}/junk.gguf", code=1, says=("junk.gguf", "GGUF")),
    "half a model": up("--model={here}/half.gguf", code=1, says=("half.gguf", "again")),
    "a part of a model": up(
        "--model={here}/m-00001-of-00002.gguf", code=1, says=("m-00002-of-00002.gguf", "missing")
    ),
    "no such engine": up("--engine={here}/no", code=2, says=("--engine", "{here}/no")),
    "an engine that is text": up("--engine={here}/file", code=2, says=("--engine", "executable")),
    "another program as the engine": up(
        f"--engine={sys.executable}", code=2, says=("--engine", "llama-server")
    ),
    # The machine.
    "an address of another machine": up(
        "--api=203.0.113.7:0", code=1, says=("203.0.113.7", "--api")
    ),
    "a host that does not exist": up("--api=no.invalid:0", code=1, says=("no.invalid", "--api")),
    "a join that nobody answers": up(
        "--join=127.0.0.1:1", code=1, says=("127.0.0.1:1", "p2pmesh up")
    ),
    # A home that was damaged.
    "a damaged key": home("node.key", b"junk", "node.key", "delete it"),
    "a key that is a folder": home("node.key", None, "node.key"),
    "a damaged mesh": home("mesh.json", b"{", "mesh.json", "p2pmesh leave"),
    "an epoch that is a folder": home("epoch", None, "epoch", "--home"),
    "a lock that is a folder": home("lock", None, "lock", "--home"),
    "logs that are a file": home("logs", b"", "logs", "--home"),
    "a log that is a folder": home("logs/node.log", None, "node.log", "--home"),
    "a run file that is a folder": home("run.json", None, "run.json", "--home"),
    # Members.
    "a duration without sense": Mistake(
        arguments=("invite", "--for=soon"), code=2, says=("--for", "24h")
    ),
    "a role that is none": Mistake(
        arguments=("invite", "--role=king"), code=2, says=("--role", "serve")
    ),
    "a token that is cut short": Mistake(
        arguments=("join", "p2pmesh1-abc", "--home={home}", *ANY_PORTS),
        code=2,
        says=("incomplete or misspelt",),
    ),
    "a join without a token": Mistake(
        arguments=("join", "--home={home}"), code=2, says=("p2pmesh join TOKEN",)
    ),
    "leaving no mesh": Mistake(
        arguments=("leave", "--home={home}"), code=1, says=("This node is in no mesh",)
    ),
    # Commands that need a node.
    "an invitation without a node": Mistake(
        arguments=("invite", "--home={home}"),
        code=1,
        says=("No node is running here: p2pmesh up",),
    ),
    "a status without a node": Mistake(
        arguments=("status", "--home={home}"), code=1, says=("No node is running here: p2pmesh up",)
    ),
    "a chat without a node": Mistake(
        arguments=("chat", "--home={home}", "hello"),
        code=1,
        says=("No node is running here: p2pmesh up",),
    ),
    "a status of a damaged run file": Mistake(
        arguments=("status", "--home={home}"),
        code=1,
        says=("run.json", "delete it"),
        files={"home/run.json": b'{"pid": 1}'},
    ),
}

# Half a second each: the quick tier has another of the same kind.
RARE = {
    "an argument too many",
    "an empty name",
    "a name of two lines",
    "a port below zero",
    "a size below zero",
    "no slots",
    "a context without sense",
    "a role that is none",
    "an invitation without a node",
    "a file that is not text",
    "a setting of the wrong type",
    "a home below a file",
    "a device for a model",
    "an empty model",
    "an engine that is text",
    "a host that does not exist",
    "a join that nobody answers",  # five seconds, as the other may be starting
    "a key that is a folder",
    "an epoch that is a folder",
    "a lock that is a folder",
    "logs that are a file",
    "a run file that is a folder",
}
assert MISTAKES.keys() >= RARE


def _lay_out(here: Path, files: Mapping[str, bytes | None]) -> None:
    (here / "file").write_text("text")
    (here / "empty.gguf").touch()
    (here / "junk.gguf").write_bytes(bytes(range(256)) * 40)
    (here / "half.gguf").write_bytes(EMBEDDED.read_bytes()[:5_000_000])
    (here / "m-00001-of-00002.gguf").symlink_to(EMBEDDED)
    for name, content in files.items():
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content)


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(mistake, id=name, marks=[pytest.mark.full] if name in RARE else [])
        for name, mistake in MISTAKES.items()
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, mistake: Mistake) -> None:
    _lay_out(tmp_path, mistake.files)
    home = tmp_path / "home"
    arguments, says = (
        [text.format(home=home, here=tmp_path) for text in texts]
        for texts in (mistake.arguments, mistake.says)
    )
    done = cli(*arguments, **{"P2PMESH_HOME": str(home), **mistake.environ})
    assert_sentence(done, mistake.code, *says)
    assert not (home / "run.json").is_file() or "home/run.json" in mistake.files
    assert not _left_over(str(tmp_path))


def _left_over(folder: str) -> list[psutil.Process]:
    """Processes that have to do with a test's folder."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(folder in word for word in process.info["cmdline"] or ())
    ]


def test_debug_shows_where_it_happened(tmp_path: Path) -> None:
    done = cli("up", f"--home={tmp_path}", "--memory=lots", "--debug")
    assert done.returncode == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("p2pmesh: --memory: 'lots'")
