from __future__ import annotations

from pathlib import Path

import pytest

from p2pmesh.engine.argv import Launch, RemoteStage, server_argv
from simulations.engines import Command, launch_of

STAGES = (
    RemoteStage(endpoint="127.0.0.1:1001", layers=3),
    RemoteStage(endpoint="127.0.0.1:1002", layers=2),
)


@pytest.mark.parametrize("stages", [(), STAGES[:1], STAGES])
@pytest.mark.parametrize("threads", [None, 2])
def test_the_second_engine_has_the_command_line_of_the_first(
    threads: int | None, stages: tuple[RemoteStage, ...]
) -> None:
    launch = Launch(
        model_paths=(Path("a.gguf"),),
        alias="a",
        context=2048,
        slots=4,
        threads=threads,
        stages=stages,
    )
    command = server_argv(Command(("engine", "-x")), launch)
    assert launch_of(command) == (Command(("engine", "-x")), launch)


def test_an_engine_with_unknown_flags_is_not_imitated() -> None:
    launch = Launch(model_paths=(Path("a.gguf"),), alias="a", devices=("CUDA0",))
    with pytest.raises(RuntimeError, match="cannot start a second engine"):
        launch_of(server_argv(Command(("engine",)), launch))
