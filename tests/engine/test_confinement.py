"""What confined engines may touch, and what is said on systems that can keep less from them."""

from __future__ import annotations

import errno
from pathlib import PurePath

import pytest

from p2pmesh.engine.confinement import Access, Confinement, Program, grade, rules

PROGRAM = Program(
    path="/opt/llama/llama-server", loader="/lib/ld.so", libraries=("/opt/llama/libggml.so",),
    folder="/opt/llama",
)  # fmt: skip


def pairs(access: Access) -> set[tuple[str, str]]:
    words = rules(PROGRAM, access, devices=["/dev/kfd"], files=["/opt/rocm"])
    return set(zip(words[::2], words[1::2], strict=True))


@pytest.mark.parametrize("abi", [4, 5, 6, 7, 20])
def test_with_rules_for_tcp_it_is_full(abi: int) -> None:
    here = grade("linux", "x86_64", abi, known=True, filters=True)
    assert here == Confinement("full")
    assert str(here) == "confined"


@pytest.mark.parametrize("abi", [1, 2, 3])
def test_older_kernels_keep_files_alone(abi: int) -> None:
    here = grade("linux", "aarch64", abi, known=True, filters=True)
    assert str(here) == (
        f"confined in part: this kernel's Landlock (ABI {abi}) has no rules for TCP"
    )
    assert not here.is_full


@pytest.mark.parametrize(
    ("system", "abi", "lacking", "reason"),
    [
        ("darwin", -errno.ENOSYS, "filters", "p2pmesh cannot confine engines on darwin"),
        ("linux", 7, "known", "p2pmesh cannot confine engines on riscv64"),
        ("linux", -errno.ENOSYS, "", "this kernel has no Landlock"),
        ("linux", -errno.EOPNOTSUPP, "", "Landlock is switched off in this kernel"),
        ("linux", -errno.EPERM, "", "Landlock may not be used here, perhaps because of"),
        ("linux", 7, "filters", "this kernel has no seccomp filters"),
    ],
)
def test_elsewhere_it_is_said_why_not(system: str, abi: int, lacking: str, reason: str) -> None:
    known, filters = lacking != "known", lacking != "filters"
    here = grade(system, "riscv64", abi, known=known, filters=filters)
    assert here.level == "none"
    assert here.reason.startswith(reason)
    assert here.reason.endswith("; engines run with all rights of this user")


def test_an_engine_gets_its_own_program_files_and_ports() -> None:
    access = Access(files=(PurePath("/m/a.gguf"),), bind=5, connect=(6, 7))
    given = pairs(access)
    assert given >= {
        ("execute", "/opt/llama/llama-server"),
        ("execute", "/lib/ld.so"),
        ("read", "/opt/llama/libggml.so"),
        ("list", "/opt/llama"),
        ("read", "/m/a.gguf"),
        ("bind", "5"),
        ("connect", "6"),
        ("connect", "7"),
    }
    assert {kind for kind, _ in given} == {"execute", "read", "list", "bind", "connect"}


def test_accelerators_are_for_engines_that_compute_on_them() -> None:
    ours = {("device", "/dev/kfd"), ("read", "/opt/rocm")}
    assert not ours & pairs(Access())
    assert ours <= pairs(Access(accelerators=True))
