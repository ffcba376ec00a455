"""How many bytes of models a node promises to hold, and how it rounds what it publishes.

Pure, integers only. A budget the user named is taken exactly. The automatic one is 75 % of what
each memory could give: what is free there plus what this node's own engines hold already, so that
loading a model does not shrink the budget it was loaded under. The last 2 GiB of main memory are
never promised. What is published moves in steps with a band around them and is held for a while,
so that a browser tab does not make the whole mesh plan again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MIB = 1024 * 1024
GIB = 1024 * MIB

SHARE_PERCENT = 75
RAM_RESERVE_BYTES = 2 * GIB

STEP_BYTES = 256 * MIB
BAND_STEPS = 2
HOLD_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """One memory that weights can lie in.

    Attributes:
        total_bytes: All of it.
        free_bytes: What nobody uses now.
        held_bytes: What this node's own engines use of it.
        main: Whether it is the machine's main memory, which the user's programs need as well.
    """

    total_bytes: int
    free_bytes: int
    held_bytes: int = 0
    main: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """The budget that the mesh was told.

    Attributes:
        budget_bytes: A whole number of steps, or the user's own figure.
        since_s: Monotonic time at which it was published.
    """

    budget_bytes: int
    since_s: float


def budget_bytes(fixed_bytes: int | None, memories: Iterable[Memory]) -> int:
    """Return the bytes that this node may hold now.

    Args:
        fixed_bytes: The user's `--memory`; None works it out.
        memories: Main memory and each device with a memory of its own. A device that shares the
            main memory (Apple) is not one: its bytes would count twice.
    """
    if fixed_bytes is not None:
        return fixed_bytes
    return sum(_share_bytes(memory) for memory in memories)


def stage_bytes(told_bytes: int, *, exact: bool, main: Memory, devices: Iterable[Memory]) -> int:
    """Return what of a budget stages of pipelines may take, which compute on the CPU.

    What devices give does not change while a node runs, so that it moves with the budget only.

    Args:
        told_bytes: The budget, as it is published.
        exact: Whether the user named it: then nobody knows which memory was meant.
        main: The main memory.
        devices: Those with a memory of their own.
    """
    others_bytes = budget_bytes(None, devices)
    if exact and others_bytes:
        return min(told_bytes, max(main.total_bytes - RAM_RESERVE_BYTES, 0))
    return max(told_bytes - others_bytes, 0) if others_bytes else told_bytes


def publish(previous: Published | None, budget: int, *, exact: bool, now_s: float) -> Published:
    """The budget to publish, which is mostly the one that is published already.

    Args:
        previous: What was published last; None at the start.
        budget: What `budget_bytes` says now.
        exact: Whether the user named it: then it is published as it is, at once.
        now_s: Monotonic time.
    """
    value = budget if exact else budget // STEP_BYTES * STEP_BYTES
    if previous is None:
        return Published(budget_bytes=value, since_s=now_s)
    if value == previous.budget_bytes:
        return previous
    if not exact:
        is_close = abs(value - previous.budget_bytes) <= BAND_STEPS * STEP_BYTES
        if is_close or now_s - previous.since_s < HOLD_S:
            return previous
    return Published(budget_bytes=value, since_s=now_s)


def coarse_speed(mib_per_s: int) -> int:
    """Return the nearest number with two significant bits: 28000 -> 24576, 31000 -> 32768.

    Two such numbers lie a third to a half apart, more than two measurements of one machine.
    """
    shift = mib_per_s.bit_length() - 2
    if shift <= 0:
        return mib_per_s
    return ((mib_per_s >> (shift - 1)) + 1 >> 1) << shift


def _share_bytes(memory: Memory) -> int:
    usable = min(memory.free_bytes + memory.held_bytes, memory.total_bytes)
    share = usable * SHARE_PERCENT // 100
    if memory.main:
        share = min(share, usable - RAM_RESERVE_BYTES)
    return max(share, 0)
