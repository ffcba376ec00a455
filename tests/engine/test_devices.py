"""Recorded `--list-devices` texts, one for each kind of machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmesh.engine.devices import Device, has_device_list, parse_devices

MIB = 1024 * 1024

CUDA = """\
ggml_cuda_init: GGML_CUDA_FORCE_MMQ:    no
ggml_cuda_init: GGML_CUDA_FORCE_CUBLAS: no
ggml_cuda_init: found 1 CUDA devices (Total VRAM: 24080 MiB):
  Device 0: NVIDIA GeForce RTX 4090, compute capability 8.9, VMM: yes, VRAM: 24080 MiB
Available devices:
  CUDA0: NVIDIA GeForce RTX 4090 (24080 MiB, 23657 MiB free)
"""
TWO_CUDA = """\
ggml_cuda_init: found 2 CUDA devices (Total VRAM: 36206 MiB):
  Device 0: NVIDIA GeForce RTX 3090, compute capability 8.6, VMM: yes, VRAM: 24119 MiB
  Device 1: NVIDIA GeForce RTX 3060, compute capability 8.6, VMM: yes, VRAM: 12087 MiB
Available devices:
  CUDA0: NVIDIA GeForce RTX 3090 (24119 MiB, 23852 MiB free)
  CUDA1: NVIDIA GeForce RTX 3060 (12087 MiB, 3010 MiB free)
"""
ROCM = """\
ggml_cuda_init: found 1 ROCm devices (Total VRAM: 24560 MiB):
  Device 0: AMD Radeon RX 7900 XTX, gfx1100 (0x1100), VMM: no, Wave Size: 32, VRAM: 24560 MiB
Available devices:
  ROCm0: AMD Radeon RX 7900 XTX (24560 MiB, 24386 MiB free)
"""
METAL = """\
ggml_metal_device_init: tensor API disabled for pre-M5 and pre-A19 devices
ggml_metal_device_init: GPU name:   MTL0
ggml_metal_device_init: has unified memory    = true
Available devices:
  MTL0: Apple M2 Pro (21845 MiB, 21845 MiB free)
  BLAS: Accelerate (0 MiB, 0 MiB free)
"""
VULKAN = """\
ggml_vulkan: Found 1 Vulkan devices:
ggml_vulkan: 0 = Intel(R) Arc(tm) A770 Graphics (DG2) (Intel open-source Mesa driver) | uma: 0
Available devices:
  Vulkan0: Intel(R) Arc(tm) A770 Graphics (DG2) (16288 MiB, 14659 MiB free)
"""
NONE = "Available devices:\n  (none)\n"


def device(name: str, backend: str, description: str, total: int, free: int) -> Device:
    return Device(
        id=name,
        backend=backend,
        description=description,
        total_bytes=total * MIB,
        free_bytes=free * MIB,
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CUDA, [device("CUDA0", "CUDA", "NVIDIA GeForce RTX 4090", 24080, 23657)]),
        (
            TWO_CUDA,
            [
                device("CUDA0", "CUDA", "NVIDIA GeForce RTX 3090", 24119, 23852),
                device("CUDA1", "CUDA", "NVIDIA GeForce RTX 3060", 12087, 3010),
            ],
        ),
        (ROCM, [device("ROCm0", "ROCm", "AMD Radeon RX 7900 XTX", 24560, 24386)]),
        (METAL, [device("MTL0", "Metal", "Apple M2 Pro", 21845, 21845)]),
        (
            VULKAN,
            [device("Vulkan0", "Vulkan", "Intel(R) Arc(tm) A770 Graphics (DG2)", 16288, 14659)],
        ),
        (NONE, []),
        (NONE.replace("\n", "\r\n"), []),
        (
            CUDA.replace("\n", "\r\n"),
            [device("CUDA0", "CUDA", "NVIDIA GeForce RTX 4090", 24080, 23657)],
        ),
    ],
    ids=["cuda", "two cuda", "rocm", "metal", "vulkan", "none", "none crlf", "cuda crlf"],
)  # fmt: skip
def test_recorded_texts(text: str, expected: list[Device]) -> None:
    assert parse_devices(text) == tuple(expected)
    assert has_device_list(text)


def test_only_apples_memory_is_shared_with_the_cpu() -> None:
    assert parse_devices(METAL)[0].unified
    assert not parse_devices(CUDA)[0].unified


def test_a_driver_that_reports_more_free_than_there_is_is_not_believed() -> None:
    text = "Available devices:\n  Vulkan0: Some GPU (100 MiB, 400 MiB free)\n"
    assert parse_devices(text)[0].free_bytes == 100 * MIB


def test_what_looks_like_a_device_before_the_heading_is_none() -> None:
    assert parse_devices("  CUDA0: x (1 MiB, 1 MiB free)\n") == ()


@given(st.text())
def test_junk_is_no_device(text: str) -> None:
    assert all(found.total_bytes > 0 for found in parse_devices(text))


@given(st.text())
def test_junk_below_the_heading_neither(text: str) -> None:
    assert all(found.total_bytes > 0 for found in parse_devices("Available devices:\n" + text))
