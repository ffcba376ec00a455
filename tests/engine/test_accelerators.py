"""Machines laid out in a temporary folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pmesh.engine.accelerators import (
    Accelerator,
    Backend,
    Machine,
    choose_backend,
    find_accelerators,
    missing_toolkit,
    unused_warnings,
)
from p2pmesh.engine.devices import Device

NVIDIA_FILE = "proc/driver/nvidia/version"
UNUSED_NVIDIA = "NVIDIA GPU found but unused: p2pmesh engine install"
UNUSED_AMD = "AMD GPU found but unused: p2pmesh engine install"
GPU = Device(id="CUDA0", backend="CUDA", description="x", total_bytes=1, free_bytes=1)


def machine(root: Path, *files: str, system: str = "linux", processor: str = "x86_64") -> Machine:
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o755)
    environ = {"PATH": str(root / "bin")}
    return Machine(environ=environ, root=root, system=system, processor=processor)


def test_a_machine_without_accelerator(tmp_path: Path) -> None:
    plain = machine(tmp_path, "bin/nvcc", "bin/glslc", "usr/include/vulkan/vulkan.h")
    assert find_accelerators(plain) == ()
    assert choose_backend(plain) == "cpu"
    assert unused_warnings(plain, ()) == ()


@pytest.mark.parametrize(
    ("files", "backend", "warning"),
    [
        (
            [NVIDIA_FILE, "bin/nvcc"],
            "cuda",
            UNUSED_NVIDIA,
        ),
        (
            ["bin/nvidia-smi", "usr/local/cuda/bin/nvcc"],
            "cuda",
            UNUSED_NVIDIA,
        ),
        (
            [NVIDIA_FILE],
            "cpu",
            UNUSED_NVIDIA + " (first install the CUDA toolkit: nvcc is missing)",
        ),
        (
            [NVIDIA_FILE, "bin/glslc", "usr/include/vulkan/vulkan.h"],
            "vulkan",
            UNUSED_NVIDIA,
        ),
        (
            ["dev/kfd", "opt/rocm/bin/hipcc"],
            "rocm",
            UNUSED_AMD,
        ),
        (
            ["dev/kfd", "bin/glslc"],
            "cpu",
            UNUSED_AMD + " (first install the ROCm toolkit: hipcc is missing)",
        ),
    ],
)
def test_accelerators(tmp_path: Path, files: list[str], backend: str, warning: str) -> None:
    found = machine(tmp_path, *files)
    assert choose_backend(found) == backend
    assert unused_warnings(found, ()) == (warning,)
    assert unused_warnings(found, (GPU,)) == ()


def test_a_gpu_of_another_make_is_used_through_vulkan(tmp_path: Path) -> None:
    files = ["dev/dri/renderD128", "bin/glslc", "usr/include/vulkan/vulkan.h"]
    assert choose_backend(machine(tmp_path, *files)) == "vulkan"


def test_apple(tmp_path: Path) -> None:
    apple = machine(tmp_path, system="darwin", processor="arm64")
    assert find_accelerators(apple) == (Accelerator(name="Apple GPU", backend="metal"),)
    assert choose_backend(apple) == "metal"
    assert choose_backend(machine(tmp_path, system="darwin")) == "cpu"


@pytest.mark.parametrize(
    ("backend", "files", "missing"),
    [
        ("cpu", [], ""),
        ("cuda", [], "the CUDA toolkit: nvcc is missing"),
        ("cuda", ["usr/local/cuda/bin/nvcc"], ""),
        ("rocm", ["bin/nvcc"], "the ROCm toolkit: hipcc is missing"),
        ("rocm", ["bin/hipcc"], ""),
        ("vulkan", ["bin/glslc"], "the Vulkan SDK: glslc or vulkan/vulkan.h is missing"),
        ("vulkan", ["bin/glslc", "usr/include/vulkan/vulkan.h"], ""),
        ("metal", [], "macOS: Metal exists nowhere else"),
    ],
)
def test_what_a_backend_lacks(
    tmp_path: Path, backend: Backend, files: list[str], missing: str
) -> None:
    assert missing_toolkit(backend, machine(tmp_path, *files)) == missing


def test_a_compiler_that_a_variable_names_counts(tmp_path: Path) -> None:
    named = Machine(environ={"CUDACXX": "/opt/cuda-13/bin/nvcc"}, root=tmp_path, system="linux")
    assert missing_toolkit("cuda", named) == ""
    assert missing_toolkit("metal", Machine(environ={}, root=tmp_path, system="darwin")) == ""
