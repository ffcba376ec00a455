"""The registers of an owner: their names, how long they live, and how often they are renewed.

Pure. Adding a register is a row of `REGISTERS` and a reader in `state/registers.py`. A register of
a name that is not in the table is a newer node's: it lives on its owner's lease like most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

MEMBER, ACCUSED, CAPS = "member", "accused", "caps"
SERVING, MODELS, WANTS = "serving", "models", "wants"

TTL_S_MAX = 30 * 86400  # whatever nobody renews is forgotten some day
RENEWED_TTL_S_MAX = 3600  # who has gone is not taken for a member longer, nor are its wishes met
REFRESHES_PER_S = 5  # of all members together: the price of leases is the same at any size


class Life(Enum):
    """The condition under which a record of a register stands."""

    LEASE = "lease"  # it is the lease itself, and a higher epoch of it voids all that live on it
    LEASED = "leased"  # the lease of its owner, of the same epoch, and no longer than its own ttl
    OWN = "own"  # its own ttl alone, across its owner's epochs


@dataclass(frozen=True, slots=True, kw_only=True)
class Register:
    """One kind of value of an owner. A record lasts ttl_factor x refresh + ttl_extra_s.

    Attributes:
        name: In records; with pages, what stands before the number.
        life: What its records live on.
        refresh_s: How often its owner renews it, while the mesh is small.
        ttl_s_max: A record that lasts longer is void from the start.
        urgent: Written before all others: those live on it, or a node is taken for dead without.
    """

    name: str
    life: Life
    refresh_s: float
    ttl_factor: int
    ttl_extra_s: int = 0
    ttl_s_max: int = TTL_S_MAX
    urgent: bool = False

    def refreshed_every_s(self, members: int) -> float:
        """How often the owner renews it in a mesh of so many members."""
        longest_s = (self.ttl_s_max - self.ttl_extra_s) / self.ttl_factor
        return min(max(self.refresh_s, members / REFRESHES_PER_S), longest_s)

    def ttl_s(self, members: int) -> int:
        """How long a record written now lasts, in seconds."""
        return int(self.ttl_factor * self.refreshed_every_s(members)) + self.ttl_extra_s


def _leased(name: str, *, urgent: bool = False) -> Register:
    """Return a row for what is said once and lasts as long as the lease does."""
    return Register(
        name=name, life=Life.LEASED, refresh_s=TTL_S_MAX // 2, ttl_factor=2, urgent=urgent
    )


REGISTERS: Mapping[str, Register] = {
    row.name: row
    for row in (
        Register(
            name=MEMBER,
            life=Life.LEASE,
            refresh_s=60,
            ttl_factor=4,
            ttl_s_max=RENEWED_TTL_S_MAX,
            urgent=True,
        ),
        _leased(ACCUSED, urgent=True),
        _leased(CAPS),
        _leased(SERVING),
        _leased(MODELS),
        # They count while their owner renews them, and for a while after: a laptop that is closed
        # for a moment finds its model still served, and one that is gone holds no memory for days.
        Register(
            name=WANTS,
            life=Life.OWN,
            refresh_s=300,
            ttl_factor=1,
            ttl_extra_s=600,
            ttl_s_max=RENEWED_TTL_S_MAX,
        ),
    )
}


_UNKNOWN = _leased("")


def register_of(name: str) -> Register:
    """The row of a register, by its name in a record, with or without a page."""
    base = name.partition("/")[0]
    return REGISTERS.get(base, _UNKNOWN)
