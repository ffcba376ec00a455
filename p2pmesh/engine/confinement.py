"""What a confined engine may touch, and how far this system can keep it from the rest.

Pure: values in, rules and sentences out. `confine.py` enforces them, `confined.py` asks the system.

An engine works for others: whoever sends graphs to a stage may run code in it, and a forged model
file may do the same to llama-server. So each gets its own program, the system's libraries, its
model's files, and its own port. What stays open to it, since the kernel offers no rule for it:
the names, sizes and modes of files (not their bytes), connections to a pipeline's port numbers
at any address (Landlock names ports, not addresses), listening on a port that the system chooses,
and as much memory and time as the machine has.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

Level = Literal["full", "files", "none"]

ABI_TCP = 4  # the first version of Landlock that has rules for TCP

# Programs and their libraries, read alone; stores are where systems without /usr/lib have them.
LIBRARIES = (
    "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/local/lib64",
    "/nix/store", "/gnu/store", "/home/linuxbrew/.linuxbrew",
    "/etc/ld.so.cache", "/etc/ld.so.preload",
)  # fmt: skip

# Processors, memory, and the engine's own process.
MACHINE = ("/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system")


@dataclass(frozen=True, slots=True)
class Accelerator:
    """What the driver of one kind of accelerator opens.

    Attributes:
        devices: Patterns of its device nodes.
        files: What it reads besides libraries.
    """

    devices: tuple[str, ...]
    files: tuple[str, ...]


# From the drivers' documentation and sources; p2pmesh's own tests run without any of them.
ACCELERATORS = {
    "NVIDIA": Accelerator(
        ("/dev/nvidia[0-9]*", "/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools",
         "/dev/nvidia-caps/*", "/dev/dxg"),
        ("/proc/driver/nvidia", "/proc/modules", "/sys/module/nvidia", "/sys/module/nvidia_uvm",
         "/usr/local/cuda", "/etc/nvidia", "/usr/share/nvidia"),
    ),
    "AMD": Accelerator(
        ("/dev/kfd", "/dev/dri/renderD*"),
        ("/sys/class/kfd", "/sys/devices/virtual/kfd", "/sys/module/amdgpu", "/opt/rocm",
         "/opt/amdgpu", "/usr/share/libdrm"),
    ),
    "Intel": Accelerator(
        ("/dev/dri/renderD*",),
        ("/opt/intel", "/sys/module/i915", "/sys/module/xe"),
    ),
    "Vulkan": Accelerator(
        ("/dev/dri/renderD*",),
        ("/etc/vulkan", "/usr/share/vulkan", "/usr/share/glvnd", "/usr/share/drirc.d"),
    ),
    "all": Accelerator(
        ("/dev/null", "/dev/zero"),
        ("/sys/class/drm", "/sys/bus/pci", "/sys/devices/pci*", "/sys/dev/char", "/dev/dri"),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Confinement:
    """How far an engine is confined.

    Attributes:
        level: `full` keeps it from files, networks and other processes. `files` is the same, but
            the engine may use any TCP port that it may use at all. `none` leaves it all rights
            of the user.
        reason: Why it is not `full`, for a person; empty when it is.
    """

    level: Level
    reason: str = ""

    def __str__(self) -> str:
        """Return it for a person."""
        words = {"full": "confined", "files": "confined in part", "none": "not confined"}
        return f"{words[self.level]}: {self.reason}" if self.reason else words[self.level]

    @property
    def is_full(self) -> bool:
        """Whether an engine may work for members that this node does not trust with itself."""
        return self.level == "full"


UNKNOWN = Confinement("none", "it was not looked at yet")


def described(engine: Confinement, stages: Confinement | None) -> str:
    """Return for a person how far an engine and its stages are confined.

    Args:
        engine: Of what serves models.
        stages: Of what computes stages; None without it.
    """
    if stages is None or stages == engine:
        return str(engine)
    return f"{engine}; stages are {stages}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What one engine needs beside what every engine may touch.

    Attributes:
        files: What it reads.
        bind: The port that it listens on; 0 is any that the system chooses.
        connect: The ports that it may connect to, at any address.
        accelerators: Whether it computes on more than the CPU.
    """

    files: tuple[PurePath, ...] = ()
    bind: int = 0
    connect: tuple[int, ...] = ()
    accelerators: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """An engine's program as it lies on the disk.

    Attributes:
        path: The program.
        loader: What the kernel starts to load its libraries; empty when it needs none.
        libraries: Those that do not belong to the system.
        folder: Where it looks for its backends.
    """

    path: str
    loader: str
    libraries: tuple[str, ...]
    folder: str


def grade(system: str, machine: str, abi: int, *, known: bool, filters: bool) -> Confinement:
    """Return how far engines can be confined here.

    Args:
        system: As `sys.platform` names it.
        machine: The architecture, as `os.uname` names it.
        abi: What `confine.landlock_abi` says.
        known: Whether `confine` knows this machine's system calls.
        filters: Whether there are seccomp filters.
    """
    if system != "linux":
        return Confinement("none", f"p2pmesh cannot confine engines on {system}; {_ALL_RIGHTS}")
    if not known:
        return Confinement("none", f"p2pmesh cannot confine engines on {machine}; {_ALL_RIGHTS}")
    if abi <= 0:
        return Confinement("none", f"{_WITHOUT.get(-abi, _FORBIDDEN)}; {_ALL_RIGHTS}")
    if not filters:
        return Confinement("none", f"this kernel has no seccomp filters; {_ALL_RIGHTS}")
    if abi < ABI_TCP:
        return Confinement("files", f"this kernel's Landlock (ABI {abi}) has no rules for TCP")
    return Confinement("full")


_ALL_RIGHTS = "engines run with all rights of this user"
_FORBIDDEN = "Landlock may not be used here, perhaps because of a container's rules"
_WITHOUT = {
    errno.ENOSYS: "this kernel has no Landlock",
    errno.EOPNOTSUPP: "Landlock is switched off in this kernel",
}


def rules(
    program: Program, access: Access, devices: Sequence[str], files: Sequence[str]
) -> list[str]:
    """Return the words that tell `confine.py` what an engine may touch.

    Args:
        program: What is started.
        access: What it needs.
        devices: Device nodes of accelerators that are here.
        files: What their drivers read.
    """
    read = [*LIBRARIES, *MACHINE, *program.libraries, *map(str, access.files)]
    execute = [program.path, *filter(None, [program.loader])]
    if access.accelerators:
        read += files
    pairs = [
        *(("read", path) for path in read),
        ("list", program.folder),
        *(("execute", path) for path in execute),
        *(("device", path) for path in devices if access.accelerators),
        ("bind", str(access.bind)),
        *(("connect", str(port)) for port in access.connect),
    ]
    return [word for pair in pairs for word in pair]
