"""Which mesh to join, when to leave one for another, and when to found one.

Pure. Of two open meshes the older one wins, with the smaller id where they are equally old. The
ages are compared as they were announced, not cut at this node's clock: so every node orders the
same meshes alike, and nodes that follow each other always get nearer to one and the same. A mesh
founded in the future gains nothing by it, since it is the younger.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from p2pmesh.identity.keys import MeshId, NodeId

LISTEN_S = 1.5  # before a node founds a mesh: an announcement comes within milliseconds of a query
YIELD_S = 1.0  # beyond that, for the first word of the one that founds; a founding takes far less
FOLLOW_FOR_S = 600  # how long after founding or joining a node may still move


@dataclass(frozen=True, slots=True)
class HeardMesh:
    """A mesh as it is announced around here.

    Attributes:
        id: Its id.
        name: What people call it.
        founded_at: In unix seconds.
        open: Somebody says that anybody on this network may join.
        version: The highest version of the hello that is spoken there.
    """

    id: MeshId
    name: str
    founded_at: int
    open: bool
    version: int

    @property
    def age_order(self) -> tuple[int, MeshId]:
        """The key by which meshes are ordered, the oldest first."""
        return self.founded_at, self.id


def choose(meshes: Iterable[HeardMesh]) -> HeardMesh | None:
    """The open mesh to join: the oldest; None when there is no open one.

    Args:
        meshes: Those heard, without any that refused this node or could not be reached.
    """
    return min(
        (mesh for mesh in meshes if mesh.open), key=lambda mesh: mesh.age_order, default=None
    )


def should_follow(
    mine: HeardMesh,
    heard: Iterable[HeardMesh],
    *,
    joined_at: float,
    now: float,
    pristine: bool,
) -> HeardMesh | None:
    """The older open mesh that this node leaves its own for; None to stay.

    Each move goes to an older mesh, so it ends after as many moves as there are meshes.

    Args:
        mine: This node's mesh, by what it proved when this node joined.
        heard: The meshes announced here.
        joined_at: When this node founded its mesh or joined it over the local network.
        now: On the same clock.
        pristine: The mesh has issued no token, key or revocation: nobody counts on it yet.
    """
    if not pristine or now - joined_at >= FOLLOW_FOR_S:
        return None
    oldest = choose(mesh for mesh in heard if mesh.id != mine.id)
    return oldest if oldest is not None and oldest.age_order < mine.age_order else None


def founding_delay_s(me: NodeId, newcomers: Collection[NodeId]) -> float:
    """How long this node listens, from its start, before it founds a mesh.

    Of several that start in the same moment the one with the smallest id founds and the others
    hear of it. Made-up newcomers delay a founding by `YIELD_S` and no more.

    Args:
        me: This node.
        newcomers: Who was heard to ask and has no mesh either.
    """
    return LISTEN_S if all(me <= other for other in newcomers) else LISTEN_S + YIELD_S
