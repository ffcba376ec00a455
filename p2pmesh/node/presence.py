"""What this node tells its mesh of itself: its name and addresses, and how much memory it gives.

Both change while it runs. A laptop moves from one network to another, or its VPN connects; other
programs take memory and give it back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import psutil
import structlog
import trio

from p2pmesh import __version__
from p2pmesh.config import Address
from p2pmesh.engine.find import Engine
from p2pmesh.engine.rpc_builds import known_build
from p2pmesh.errors import EngineError
from p2pmesh.node.distances import MeasuredDistances
from p2pmesh.node.engines import EngineManager
from p2pmesh.node.interfaces import advertised
from p2pmesh.node.mesh import Mesh
from p2pmesh.placement.resources import Memory, Published, budget_bytes, publish, stage_bytes
from p2pmesh.state.registers import Caps, Member
from p2pmesh.wire.registers import CAPS, MEMBER

# Between two looks at the memory and the addresses. Such a look takes 0.1 ms on a machine with four
# network interfaces (measured), so it is taken on the event loop.
LOOK_INTERVAL_S = 5.0
FIRST_LOOK_INTERVAL_S = 0.25  # until the round trips to others are known: pipelines wait for that

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """What a node has to tell any mesh, as long as it runs.

    Attributes:
        listening: Where other nodes reach it, as bound.
        memory_bytes: What the user gives to models; None for most of what is free.
        memory_mib_per_s: Returns how fast this machine reads memory, coarsely; 0 while unknown.
    """

    name: str
    listening: Address
    memory_bytes: int | None
    engine: Engine
    engines: EngineManager
    memory_mib_per_s: Callable[[], int] = lambda: 0


class Presence:
    """Keeps the records `member` and `caps` of this node true in one mesh.

    Args:
        mesh: Told.
        own: What it is told.
    """

    def __init__(self, mesh: Mesh, own: Own) -> None:
        self._mesh = mesh
        self._own = own
        self._addresses = advertised(own.listening)
        self._told: Published | None = None
        self._rpc = _rpc_build(own.engine)
        self._distances = MeasuredDistances(mesh)
        self._publish_member(left=False)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look again and again until cancelled; started once the mesh was told for the first time.

        What was said last stands while the system cannot be asked.
        """
        self._tell_caps()
        task_status.started()
        while True:
            is_measured = self._distances.are_measured
            await trio.sleep(LOOK_INTERVAL_S if is_measured else FIRST_LOOK_INTERVAL_S)
            try:
                self._tell_caps()
                self._tell_addresses()
            except (psutil.Error, OSError) as exc:  # no descriptor is left to read /proc with
                log.warning("machine_not_measured", reason=str(exc))

    def say_goodbye(self) -> None:
        """Tell the mesh that this node leaves it; nothing more may be told after that."""
        self._publish_member(left=True)

    def _tell_addresses(self) -> None:
        addresses = advertised(self._own.listening)
        if addresses != self._addresses:
            log.info("addresses_changed", addresses=[str(one) for one in addresses])
            self._addresses = addresses
            self._publish_member(left=False)

    def _publish_member(self, *, left: bool) -> None:
        member = Member(
            name=self._own.name, addresses=self._addresses, version=__version__, left=left
        )
        self._mesh.publish(MEMBER, member.to_wire())

    def _tell_caps(self) -> None:
        self._distances.look(trio.current_time())
        engine, named = self._own.engine, self._own.memory_bytes
        main, devices = _main_memory(self._own.engines.used_bytes()), _device_memories(engine)
        budget = budget_bytes(named, [main, *devices])
        exact, now_s = named is not None, trio.current_time()
        self._told = publish(self._told, budget, exact=exact, now_s=now_s)
        told_bytes = self._told.budget_bytes
        caps = Caps(
            budget_bytes=told_bytes,
            stage_bytes=stage_bytes(told_bytes, exact=exact, main=main, devices=devices),
            engine=f"{engine.kind} {engine.version}",
            rpc=self._rpc,
            confined=engine.confines_stages,
            memory_mib_per_s=self._own.memory_mib_per_s(),
            measured=self._distances.are_measured,
            far=self._distances.far,
        )
        self._mesh.publish(CAPS, caps.to_wire())


def _rpc_build(engine: Engine) -> str:
    """Return the build of the engine's RPC, where pipelines can be made with it; "" elsewhere."""
    try:
        return known_build(engine.version, engine.rpc).name
    except EngineError as exc:
        log.info("no_pipelines", reason=str(exc))
        return ""


def _main_memory(held_bytes: int) -> Memory:
    memory = psutil.virtual_memory()
    return Memory(
        total_bytes=memory.total, free_bytes=memory.available, held_bytes=held_bytes, main=True
    )


def _device_memories(engine: Engine) -> list[Memory]:
    # As found at the start, before this node's own engines took any of it.
    return [
        Memory(total_bytes=device.total_bytes, free_bytes=device.free_bytes)
        for device in engine.devices
        if not device.unified
    ]
