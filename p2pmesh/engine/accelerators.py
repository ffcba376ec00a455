"""Which accelerators this machine has, and whether an engine can be built for them.

Looks at the system, never at an engine: the difference between the two is what a user has to be
told. Cheap enough for every start: a few file lookups, no process.
"""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from p2pmesh.engine.devices import Device

Backend = Literal["cuda", "rocm", "vulkan", "metal", "cpu"]

# The variable by which cmake is told of a compiler, the compiler, and what brings it.
_COMPILERS: Mapping[Backend, tuple[str, str, str]] = {
    "cuda": ("CUDACXX", "nvcc", "the CUDA toolkit"),
    "rocm": ("HIPCXX", "hipcc", "the ROCm toolkit"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """One kind of accelerator that the operating system knows.

    Attributes:
        name: For a person: `NVIDIA GPU`.
        backend: What an engine for it is to be built with; `cpu` while nothing can be built.
        missing: What has to be installed before such an engine can be built; "" when nothing.
    """

    name: str
    backend: Backend
    missing: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The paths and commands to look at; the defaults are this machine's."""

    environ: Mapping[str, str]
    root: Path = Path("/")
    system: str = sys.platform
    processor: str = platform.machine()

    def which(self, program: str) -> bool:
        """Whether `program` is on the path or where its toolkit usually puts it."""
        usual = (self.root / "opt/rocm/bin", self.root / "usr/local/cuda/bin")
        path = self.environ.get("PATH", "")
        if shutil.which(program, path=path) is not None:
            return True
        return any((directory / program).is_file() for directory in usual)

    def has_vulkan_toolkit(self) -> bool:
        """Whether Vulkan's shader compiler and headers are here."""
        sdk = Path(self.environ.get("VULKAN_SDK", self.root / "usr"))
        return self.which("glslc") and (sdk / "include/vulkan/vulkan.h").is_file()


def find_accelerators(machine: Machine) -> tuple[Accelerator, ...]:
    """The accelerators of the machine, the most capable kind first."""
    if machine.system == "darwin":
        # Only Apple's own processors: llama.cpp does not support Metal on Intel Macs well.
        return (Accelerator(name="Apple GPU", backend="metal"),) * (machine.processor == "arm64")
    found = []
    if (machine.root / "proc/driver/nvidia/version").exists() or machine.which("nvidia-smi"):
        found.append(_buildable(machine, "NVIDIA GPU", "cuda"))
    if (machine.root / "dev/kfd").exists():
        found.append(_buildable(machine, "AMD GPU", "rocm"))
    return tuple(found)


def choose_backend(machine: Machine) -> Backend:
    """Choose the best backend for this machine's engine, of those that can be built here."""
    for accelerator in find_accelerators(machine):
        if accelerator.backend != "cpu":
            return accelerator.backend
    has_render_node = any((machine.root / "dev/dri").glob("renderD*"))
    return "vulkan" if has_render_node and machine.has_vulkan_toolkit() else "cpu"


def missing_toolkit(backend: Backend, machine: Machine) -> str:
    """Return what has to be installed before an engine with `backend` can be built; "" if nothing.

    Compilers that only `CUDACXX` or the like name count: whoever set it knows what they do.
    """
    if backend == "vulkan" and not machine.has_vulkan_toolkit():
        return "the Vulkan SDK: glslc or vulkan/vulkan.h is missing"
    if backend == "metal" and machine.system != "darwin":
        return "macOS: Metal exists nowhere else"
    if backend not in _COMPILERS:
        return ""
    variable, compiler, toolkit = _COMPILERS[backend]
    if machine.environ.get(variable) or machine.which(compiler):
        return ""
    return f"{toolkit}: {compiler} is missing"


def unused_warnings(machine: Machine, devices: Sequence[Device]) -> tuple[str, ...]:
    """One sentence for each accelerator that an engine with these devices leaves idle."""
    if devices:
        return ()
    return tuple(
        f"{found.name} found but unused: p2pmesh engine install"
        + (f" (first install {found.missing})" if found.missing else "")
        for found in find_accelerators(machine)
    )


def _buildable(machine: Machine, name: str, backend: Backend) -> Accelerator:
    """With its own toolkit, else with Vulkan, which every driver brings, else not at all."""
    missing = missing_toolkit(backend, machine)
    if not missing:
        return Accelerator(name=name, backend=backend)
    if machine.has_vulkan_toolkit():
        return Accelerator(name=name, backend="vulkan")
    return Accelerator(name=name, backend="cpu", missing=missing)
