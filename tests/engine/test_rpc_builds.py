"""Known builds of llama.cpp, and what their numbers mean."""

from __future__ import annotations

import re
import tarfile

import pytest

from p2pmesh.engine.rpc_builds import (
    ANSWER_BYTES,
    REFUSED_OPS_B11434,
    Command,
    known_build,
    request_bytes,
    tensors_at,
)
from p2pmesh.engine.sources import SOURCE_FILE
from p2pmesh.errors import EngineError
from tests.engine.rpc_frames import BUILD, MAP_CUSTOM1, MUL_MAT, payload_of
from tests.engine.samples import BUILT


def test_the_managed_build_is_known() -> None:
    assert known_build("b11434", "7.0.0").protocol == (7, 0, 0)


@pytest.mark.parametrize(
    ("version", "protocol", "reason"),
    [
        ("b11435", "7.0.0", "not b11435 with RPC 7.0.0: p2pmesh engine install"),
        ("b11434", "7.0.1", "not b11434 with RPC 7.0.1"),
        ("0.3.1", None, "0.3.1 has no RPC server: p2pmesh engine install"),
    ],
)
def test_another_build_is_refused_with_a_reason(
    version: str, protocol: str | None, reason: str
) -> None:
    with pytest.raises(EngineError, match=reason):
        known_build(version, protocol)


def test_the_numbers_are_those_of_the_source() -> None:
    source = BUILT.engine / "work" / SOURCE_FILE
    if not source.exists():
        pytest.skip("no engine was built: P2PMESH_TESTS=full builds one")
    with tarfile.open(source) as archive:  # in order, as it is compressed: the first ones are soon
        member = next(each for each in archive if each.name.endswith("/ggml/include/ggml.h"))
        file = archive.extractfile(member)
        assert file is not None
        header = file.read().decode()
    body = header[header.index("enum ggml_op {") :]
    ops = re.findall(r"GGML_OP_(\w+)", body[: body.index("}")])
    assert {name: ops.index(name) for name in REFUSED_OPS_B11434} == REFUSED_OPS_B11434
    assert BUILD.ops == set(range(ops.index("COUNT"))) - set(REFUSED_OPS_B11434.values())
    assert (ops.index("MUL_MAT"), ops.index("MAP_CUSTOM1")) == (MUL_MAT, MAP_CUSTOM1)
    body = header[header.index("enum ggml_type {") :]
    types = re.findall(r"^\s*GGML_TYPE_\w+ *= (\d+)", body[: body.index("}")], re.MULTILINE)
    assert BUILD.types == {int(number) for number in types[:-1]}


def test_every_command_has_its_size() -> None:
    exact = request_bytes(BUILD)
    without = {Command.SET_TENSOR, Command.OFFER, Command.GRAPH_COMPUTE}
    assert exact.keys() == set(Command) - without
    assert exact[Command.GET_ALLOC_SIZE] == 3260
    assert all(len(payload_of(command)) == size for command, size in exact.items())
    silent = {
        Command.FREE_BUFFER,
        Command.BUFFER_CLEAR,
        Command.SET_TENSOR,
        Command.GRAPH_COMPUTE,
        Command.INIT_TENSOR,
        Command.GRAPH_RECOMPUTE,
        Command.MEMSET_TENSOR,
    }
    assert ANSWER_BYTES.keys() == set(Command) - silent - {Command.GET_TENSOR, Command.OFFER}


def test_described_tensors_are_within_their_requests() -> None:
    exact = request_bytes(BUILD)
    for command, places in tensors_at(BUILD).items():
        assert max(places) + BUILD.tensor_bytes <= exact[command]
