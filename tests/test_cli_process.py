"""The edge of the program as processes see it: broken pipes, and what a start loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mesh.nodes import cli, end, environment, start
from tests.models.builders import other_files
from tests.repository import ROOT

TALKING = """
import sys, types, click, trio
from p2pmesh import cli

async def talk():
    while True:
        click.echo("x" * 1000)
        await trio.lowlevel.checkpoint()

async def talk_in_a_nursery():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(talk)

@click.command()
def talker():
    trio.run(TALK)

sys.modules["talking"] = types.SimpleNamespace(talker=talker)
cli.COMMANDS = {**cli.COMMANDS, "talk": ("talking:talker", ())}
sys.stdin.readline()
cli.main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break in another way")
@pytest.mark.parametrize(
    ("talk", "argument"),
    [("talk", "--help"), ("talk", "talk"), ("talk_in_a_nursery", "talk")],
)
def test_a_reader_that_has_seen_enough_is_no_error(talk: str, argument: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", TALKING.replace("TALK", talk), argument],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        _, err = process.communicate(b"\n", timeout=60)
    assert (process.returncode, err) == (0, b"")


QUICK = {
    "--version": 0,
    "status --help": 0,
    "join --help": 0,
    "join": 2,
    "invite": 1,
    "members": 1,
    "admit anna": 1,
    "grant anna admin": 1,
    "revoke anna": 1,
    "leave": 1,
}


@pytest.mark.parametrize(("command", "code"), QUICK.items())
def test_a_quick_command_loads_no_node(tmp_path: Path, command: str, code: int) -> None:
    program = (
        "import sys\n"
        "from p2pmesh.cli import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as exc:\n"
        "    print(exc.code, sorted({'trio', 'quart', 'numpy', 'hypercorn'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *command.split()],
        cwd=ROOT,
        env=environment(P2PMESH_HOME=str(tmp_path)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == f"{code} []"


def _unusable_files(user: Path) -> dict[str, str]:
    """A user's folder with one file of each kind that cannot be served; returns what points there.

    Among them a manifest of Ollama's without its blob, which no search for files would find.
    """
    other_files(user / "llama")
    (user / "llama" / "empty.gguf").touch()
    manifest = user / "ollama/manifests/registry.ollama.ai/library/lost/latest"
    manifest.parent.mkdir(parents=True)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:" + "a" * 64}
    manifest.write_text(json.dumps({"layers": [layer]}))
    names = {"LLAMA_CACHE": "llama", "OLLAMA_MODELS": "ollama", "HOME": ".", "P2PMESH_HOME": "node"}
    return {name: str(user / folder) for name, folder in names.items()}


@pytest.mark.parametrize(
    ("arguments", "code", "answers"),
    [
        ("models", 0, 1),
        ("doctor", 0, 1),
        ("doctor --model=lost", 1, 1),
        ("engine info", 0, 1),
        ("engine info --engine=/nowhere", 2, 0),
        ("engine install --backend=rocm", 1, 0),
        ("status", 1, 0),
        ("chat hello", 1, 0),
        ("up --model=lost", 2, 0),
        ("demo --slots=x", 2, 0),
    ],
)
def test_with_json_standard_output_is_json_alone(
    tmp_path: Path, arguments: str, code: int, answers: int
) -> None:
    done = cli(*arguments.split(), "--json", **{**_unusable_files(tmp_path), "PATH": "/nowhere"})
    assert done.returncode == code, done.stderr
    assert [type(json.loads(line)) for line in done.stdout.splitlines()] == [dict] * answers


def test_a_node_beside_unusable_files_says_json_alone(tmp_path: Path) -> None:
    environ = _unusable_files(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environ.items():
            patch.setenv(name, value)
        node = start(tmp_path / "node")
    end(node)
    assert node.line["nodes"][0]["name"] == "node"


@pytest.mark.parametrize("command", ["models", "doctor"])
def test_people_read_of_an_unusable_file_once(tmp_path: Path, command: str) -> None:
    done = cli(command, **_unusable_files(tmp_path))
    said = done.stdout + done.stderr
    assert said.count(f"{tmp_path / 'llama' / 'empty.gguf'} cannot be used: ") == 1
    assert said.count("lost:latest cannot be used: ") == 1
    assert "model_skipped" not in said
