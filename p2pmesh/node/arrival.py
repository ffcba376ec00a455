"""Which mesh a node takes part in when it starts, by what the user said and what is around."""

from __future__ import annotations

from collections.abc import Callable

from p2pmesh.config import Settings
from p2pmesh.discovery.choice import HeardMesh
from p2pmesh.errors import ConfigError, LocalError
from p2pmesh.identity.tokens import parse_token
from p2pmesh.node.joining import Entry, Joiner
from p2pmesh.node.keystore import MeshInfo
from p2pmesh.node.local_network import LocalNetwork


def check_settings(settings: Settings) -> None:
    """Refuse what cannot be meant, before anything is started.

    Raises:
        ConfigError: An invitation is misspelt, or two settings contradict each other.
    """
    for way in settings.join:
        if isinstance(way, str):
            parse_token(way)
    if settings.open and settings.private:
        raise ConfigError("--open and --private exclude each other")
    if settings.join and settings.recovery_code:
        raise ConfigError(
            "--recovery-code founds a mesh; --join leads into one that others founded: give one"
        )
    if settings.join and settings.mesh:
        raise ConfigError("--mesh names a mesh of this network; --join names another: give one")


async def choose_entry(
    settings: Settings,
    joiner: Joiner,
    network: LocalNetwork,
    found: Callable[[], MeshInfo],
    note: Callable[[str], None],
) -> Entry:
    """Get into the mesh that was named, else the last one, else an open one here, else a new one.

    Args:
        settings: What the user said.
        joiner: Gets this node into meshes.
        network: What is heard around this node.
        found: Founds a mesh.
        note: Told in a sentence what the user did not ask for and should know.

    Raises:
        LocalError: The mesh that was named cannot be had, or the membership is over.
    """
    if settings.join:
        ways = [parse_token(one) if isinstance(one, str) else one for one in settings.join]
        return await joiner.by_name(ways, note)
    earlier = joiner.earlier()
    is_meant = earlier is not None and settings.mesh in (None, earlier.name)
    if earlier is not None and settings.recovery_code:
        note(f"No recovery code: one is told only when a mesh is founded, as {earlier.name} was")
    if earlier is not None and is_meant and joiner.is_usable(earlier):
        return Entry(card=earlier)
    if earlier is None and (settings.private or settings.recovery_code):
        # Whoever has the code of this mesh counts on it: it gives way to no other.
        return Entry(card=found(), is_new=not settings.recovery_code)

    def is_wanted(heard: HeardMesh) -> bool:
        if earlier is not None and is_meant:
            return heard.id == earlier.id  # anybody may give another mesh that name
        return settings.mesh in (None, heard.name)

    if (entry := await network.find(joiner, is_wanted)) is not None:
        return entry
    if earlier is not None and is_meant:
        raise LocalError(
            f"The membership of this node in {earlier.name} is over; ask a member for an "
            "invitation, then: p2pmesh join TOKEN. To go without: p2pmesh leave"
        )
    if earlier is not None:
        raise LocalError(
            f"No open mesh {settings.mesh!r} is heard on this network; without --mesh this node "
            f"goes on in {earlier.name}"
        )
    return Entry(card=found(), is_new=True)
