"""The edge of the program as processes see it: broken pipes, and what a start loads."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.mesh.nodes import environment
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


def test_a_quick_command_loads_no_node() -> None:
    program = (
        "import sys\n"
        "from p2pmesh.cli import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as exc:\n"
        "    print(exc.code, sorted({'trio', 'quart', 'numpy', 'hypercorn'} & set(sys.modules)))\n"
    )
    for arguments in (["--version"], ["status", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert done.stdout.splitlines()[-1] == "0 []"
