"""The output of `llama-server --list-devices`, as values.

Pure: text in, devices out. The CPU is never in that list (llama.cpp leaves it out); main memory
comes from the operating system instead. Lines that are not devices are skipped, since drivers
print their own greetings into the same stream.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_MIB = 1024 * 1024

# "  CUDA0: NVIDIA GeForce RTX 4090 (24080 MiB, 23657 MiB free)"; a name may hold parentheses.
_DEVICE = re.compile(
    r"^\s+(?P<id>[^\s:]+): (?P<name>.*) \((?P<total>\d+) MiB, (?P<free>\d+) MiB free\)\s*$"
)
_HEADING = "Available devices:"

# llama.cpp's own short names, as people know them.
_BACKENDS = {"MTL": "Metal", "SYCL": "SYCL", "CANN": "CANN"}

# These share the main memory, so that their bytes are not there twice.
_UNIFIED_BACKENDS = frozenset({"Metal"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """An accelerator that an engine can put weights on.

    Attributes:
        id: llama.cpp's name for it, what `--device` takes: `CUDA0`.
        backend: The library behind it: `CUDA`, `ROCm`, `Metal`, `Vulkan`, …
        description: What its driver calls it.
        total_bytes: All of its memory.
        free_bytes: What was free when the engine was asked.
    """

    id: str
    backend: str
    description: str
    total_bytes: int
    free_bytes: int

    @property
    def unified(self) -> bool:
        """Whether its memory is the machine's main memory."""
        return self.backend in _UNIFIED_BACKENDS


def has_device_list(text: str) -> bool:
    """Whether `text` is an answer to `--list-devices` at all, be it an empty one."""
    return any(line.strip() == _HEADING for line in text.splitlines())


def parse_devices(text: str) -> tuple[Device, ...]:
    """The devices that hold weights, in the engine's order.

    Helpers without memory of their own (BLAS libraries are listed with 0 MiB) are left out.

    Args:
        text: Everything that the engine printed.
    """
    devices: dict[str, Device] = {}
    heard_heading = False
    for line in text.splitlines():
        if line.strip() == _HEADING:
            heard_heading = True
            continue
        match = _DEVICE.match(line) if heard_heading else None
        if match is None or int(match["total"]) == 0:
            continue
        devices[match["id"]] = Device(
            id=match["id"],
            backend=_backend(match["id"]),
            description=match["name"].strip(),
            total_bytes=int(match["total"]) * _MIB,
            free_bytes=min(int(match["free"]), int(match["total"])) * _MIB,
        )
    return tuple(devices.values())


def _backend(device_id: str) -> str:
    stem = device_id.rstrip("0123456789")
    return _BACKENDS.get(stem, stem or device_id)
