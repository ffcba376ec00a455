"""A node as the console sees it, without a node: a mesh of three whose state tests change."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import trio

from p2pmesh.errors import ConfigError, LocalError, MeshError

TOKEN = "correct-horse-battery-staple"
GIB = 2**30

SELF_ID = "mk3v7q2ac5dxn4hzyw6tb8j9re"
YEAR_2100 = 4_102_444_800
FOUNDER = {
    "role": "admin",
    "stage": True,
    "basis": "founder",
    "by": "",
    "via": "",
    "expires_at": YEAR_2100,
}
GUEST = {
    "role": "serve",
    "stage": False,
    "basis": "lan",
    "by": "kitchen-pc",
    "via": "",
    "expires_at": 1_800_000_000,
}
INVITATION = {
    "id": "c" * 26,
    "role": "serve",
    "stage": True,
    "until": 1_800_000_000,
    "uses": 2,
    "used": 1,
    "by": "kitchen-pc",
}
TOKEN_TEXT = "p2pmesh1-aertktchptkjzw5mtzmfs25kuky6gbikrrtd2jtvvhqelt7ecfbw4aiep4aaaanlknyrklpw"
MADE = {
    "token": TOKEN_TEXT,
    "id": "c" * 26,
    "role": "serve",
    "stage": True,
    "until": 1_800_000_000,
    "uses": 1,
    "addresses": ["192.168.1.20:9338"],
}
REFUSALS = {  # how orders about these are answered
    "nonsense": ConfigError("there is nothing of that name"),
    "misspelt": ConfigError("this recovery code is incomplete"),
    "impossible": LocalError("this node may not do that"),
}
AWAY = {"id": "g" * 26, "name": "berts-tablet", **GUEST}
NEWCOMER = {"id": "d" * 26, "name": "carls-laptop", "host": "192.168.1.33"}
TINY = {
    "id": "p2pmesh-demo-tiny",
    "digest": "5f" * 32,
    "name": "p2pmesh demo tiny",
    "size_bytes": 13_496_128,
    "architecture": "qwen3moe",
    "takes": ["text"],
    "gives": ["chat"],
    "state": "ready",
    "replicas": [
        {
            "node": SELF_ID,
            "name": "kitchen-pc",
            "layers": None,
            "experts": None,
            "state": "ready",
            "detail": "",
        },
        {
            "node": "a" * 26,
            "name": "annas-laptop",
            "layers": None,
            "experts": None,
            "state": "ready",
            "detail": "",
        },
    ],
    "copies": 1,
    "wanted_by": [SELF_ID],
    "reason": "fits whole on 3 of 3 nodes; two copies wanted",
}
QWEN = {
    "id": "Qwen3-30B-A3B-Q4_K_M",
    "digest": "1c" * 32,
    "name": "Qwen3 30B A3B",
    "size_bytes": 18_556_686_912,
    "architecture": "qwen3moe",
    "takes": ["text"],
    "gives": ["chat"],
    "state": "loading",
    "replicas": [
        {
            "node": "a" * 26,
            "name": "annas-laptop",
            "layers": [1, 24],
            "experts": None,
            "state": "loading",
            "detail": "reading weights",
        }
    ],
    "copies": 1,
    "wanted_by": ["a" * 26],
    "reason": "annas-laptop has the most free memory of the nodes that hold the file",
}
LLAMA = {
    "id": "Llama-3.3-70B-Instruct-Q4_K_M",
    "digest": "9e" * 32,
    "name": "Llama 3.3 70B Instruct",
    "size_bytes": 42_520_395_008,
    "architecture": "llama",
    "takes": ["text"],
    "gives": ["chat"],
    "state": "not served",
    "replicas": [],
    "copies": 1,
    "wanted_by": [SELF_ID],
    "reason": "needs 43.1 GiB; the largest node has 24.0 GiB",
}


def three_nodes() -> dict[str, Any]:
    """The status of a mesh of three nodes, one of them in doubt, three models in three states."""
    status: dict[str, Any] = {
        "node": {
            "id": SELF_ID,
            "name": "kitchen-pc",
            "version": "0.1.0",
            "pid": 4242,
            "api": "127.0.0.1:9337",
            "console": "127.0.0.1:3131",
            "peer": "192.168.1.20:9338",
            "home": "/home/kim/.local/share/p2pmesh",
            "uptime_s": 4210.5,
            "memory": {"budget_bytes": 12 * GIB, "used_bytes": 1 * GIB},
            "engine": {
                "kind": "embedded",
                "source": "wheel",
                "version": "b11434",
                "rpc": None,
                "confinement": {
                    "level": "none",
                    "reason": "the embedded engine is a Python program",
                },
                "rpc_confinement": None,
                "devices": [
                    {
                        "id": "CPU",
                        "description": "AMD Ryzen 7 5700U",
                        "total_bytes": 16 * GIB,
                        "free_bytes": 12 * GIB,
                    }
                ],
            },
            "warnings": ["GPU found but unused: p2pmesh engine install"],
        },
        "mesh": {
            "id": "q7zp4v2mk3dxn5hcyw6tb8j9ra",
            "name": "amber-otter",
            "nodes": 3,
            "founded_at": 1_790_000_000,
            "open": True,
            "admits": True,
            "announced": True,
            "others": [],
            "only_admin": "",
            "notices": [],
            "plan": "8f3a91c2d4e5b607",
            "agreed": True,
        },
        "away": [],
        "invitations": [],
        "newcomers": [],
        "nodes": [
            _node(
                "kitchen-pc",
                SELF_ID,
                "live",
                gib=12,
                models=[("p2pmesh-demo-tiny", "ready")],
                rtt_ms=None,
            ),
            _node(
                "annas-laptop",
                "a" * 26,
                "live",
                gib=24,
                models=[("p2pmesh-demo-tiny", "ready"), ("Qwen3-30B-A3B-Q4_K_M", "loading")],
                rtt_ms=1.84,
            ),
            _node("living-room-mac", "b" * 26, "suspect", gib=8, models=[], rtt_ms=38.2),
        ],
        "models": [TINY, QWEN, LLAMA],
    }
    return copy.deepcopy(status)


def _node(
    name: str,
    node_id: str,
    state: str,
    *,
    gib: int,
    models: list[tuple[str, str]],
    rtt_ms: float | None,
) -> dict[str, Any]:
    return {
        "id": node_id,
        "name": name,
        "self": node_id == SELF_ID,
        "state": state,
        **(FOUNDER if node_id == SELF_ID else GUEST),
        "address": "192.168.1.20:9338",
        "version": "0.1.0",
        "memory_bytes": gib * GIB,
        "engine": "embedded",
        "models": [
            {
                "id": one,
                "digest": "5f" * 32,
                "layers": [1, 24] if one == QWEN["id"] else None,
                "experts": None,
                "state": how,
            }
            for one, how in models
        ],
        "rtt_ms": rtt_ms,
    }


class FakeNode:
    """A `ConsoleSource` whose status a test sets."""

    token = TOKEN

    def __init__(self, status: dict[str, Any] | None = None) -> None:
        self.status = three_nodes() if status is None else status
        self.version = 0
        self.stopped = trio.Event()
        self.snapshots = 0
        self.orders: list[tuple[str, dict[str, Any]]] = []
        self.refusal: MeshError | None = None  # how it answers orders
        self._changed = trio.Event()

    def set_status(self, status: dict[str, Any]) -> None:
        """Show another status from now on."""
        self.status = status
        self.touch()

    def touch(self) -> None:
        """Say that something changed."""
        self.version += 1
        self._changed.set()
        self._changed = trio.Event()

    def snapshot(self) -> dict[str, Any]:
        self.snapshots += 1
        return self.status

    async def wait_changed(self, seen: int) -> int:
        while self.version <= seen:
            await self._changed.wait()
        return self.version

    def stop(self) -> None:
        self.stopped.set()

    async def order(self, name: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
        await trio.lowlevel.checkpoint()
        self.orders.append((name, dict(values)))
        if self.refusal is not None:
            raise self.refusal
        if refusal := REFUSALS.get(str(values.get("target") or values.get("code"))):
            raise refusal
        said = [f"{name} {key}={value}" for key, value in values.items()] or [f"{name} was done."]
        return {"sentences": said, **(MADE if name == "invite" else {})}
