"""Which models this node has, told to the mesh, and looked for when the mesh wants others.

Hashing a whole library of models takes hours, so a file is hashed only when it is named by the
user, or when it is exactly as large as one that the mesh wants.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import structlog
import trio

from p2pmesh.config import Settings
from p2pmesh.errors import ConfigError, MeshError
from p2pmesh.models.cards import Family, ModelDigest, family_of, need_bytes
from p2pmesh.models.shard_library import ShardLibrary
from p2pmesh.models.store import ModelFile, Store
from p2pmesh.node.mesh import Mesh
from p2pmesh.placement.inputs import default_context, pipeline_context
from p2pmesh.state.registers import (
    HELD_PAGES_MAX,
    WANTS_MAX,
    HeldModel,
    ModelRequest,
    held_pages,
    held_register,
)

SEARCH_INTERVAL_S = 60.0  # a file copied here by hand is found within a minute
LOOK_INTERVAL_S = 5.0  # a folder with a handful of files
SEARCH_PAUSE_S = 3.0  # a member that wants something else all the time keeps no disk busy

Key = TypeVar("Key")
Value = TypeVar("Value")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """The models and settings that a node starts with.

    Attributes:
        files: Its models: the embedded one and what the user named.
        demo: Which of them is the embedded one.
        wanted: What the node asks the mesh to serve.
    """

    files: Mapping[ModelDigest, ModelFile]
    demo: ModelDigest
    wanted: tuple[ModelRequest, ...]


def open_models(
    store: Store, settings: Settings, hashing: Callable[[str, int, int], None]
) -> Opened:
    """Find and identify the models of the settings; blocks while files are hashed.

    Args:
        store: Where they are looked for.
        settings: Name them, and the context to serve them with.
        hashing: Told a model's name, the bytes read and the bytes in all.

    Raises:
        ConfigError: One is not there, or there are more than a node can ask for.
        ModelError: One cannot be used.
        LocalError: One cannot be read.
    """
    if len(settings.model) > WANTS_MAX:  # others would read only so many of its record
        raise ConfigError(
            f"--model names {len(settings.model)} models; one node can ask for {WANTS_MAX}: name "
            "the others on another node"
        )
    embedded = store.embedded()
    demo = store.digest(embedded)
    files = {demo: embedded}
    wanted: dict[ModelDigest, ModelRequest] = {}
    for text in settings.model:
        file = store.locate(text)
        digest = store.digest(file, partial(hashing, file.stem))
        if settings.context is not None and settings.context > file.card.context:
            raise ConfigError(
                f"--context {settings.context}: {file.stem} was made for {file.card.context} "
                "tokens; ask for that or less"
            )
        files[digest] = file
        wanted[digest] = ModelRequest(
            digest=digest,
            stem=file.stem,
            replicas=1,
            priority=0,
            context=settings.context or default_context(file.card),
            slots=settings.slots,
            split=settings.split or 0,
            moe=settings.moe,
            divergence_max=settings.moe_quality,
        )
    return Opened(files=files, demo=demo, wanted=tuple(wanted.values()))


class ModelInventory:
    """The models of one node; it outlives meshes.

    Args:
        store: Finds and hashes files.
        opened: What is held from the start.
        library: What is known of the shards of its models.
    """

    def __init__(self, store: Store, opened: Opened, library: ShardLibrary) -> None:
        self._store = store
        self._files = dict(opened.files)
        self._demo = opened.demo
        self.library = library

    def __contains__(self, digest: object) -> bool:
        return digest in self._files

    def file(self, digest: ModelDigest) -> ModelFile | None:
        """The file of a model, if this node has it."""
        return self._files.get(digest)

    def held(self) -> list[HeldModel]:
        """Return the models that this node tells a mesh it holds."""
        return [
            HeldModel(
                digest=digest,
                stem=file.stem,
                card=file.card,
                demo=digest == self._demo,
                qualities=self.library.known(digest),
            )
            for digest, file in self._files.items()
        ]

    async def look_at_shards(self) -> bool:
        """Look for what is known of the shards of models; whether that has changed."""
        files = {digest: file for digest, file in self._files.items() if file.card.experts}
        return await trio.to_thread.run_sync(self.library.look, files, abandon_on_cancel=True)

    def check(self, digest: ModelDigest) -> None:
        """Make sure that the file of a model is still that model; blocks shortly.

        Raises:
            MeshError: It changed, or is gone; the model is not served from it.
        """
        self._store.check(self._files[digest], digest)

    async def search(
        self, missing: Mapping[ModelDigest, Collection[int]]
    ) -> AsyncGenerator[ModelDigest, None]:
        """Look for files of models that this node lacks; yields each that it has from now on.

        Args:
            missing: The sizes in bytes that a model may have, as others say, by its digest. Only
                files of these sizes are hashed.
        """
        sizes = {size for each in missing.values() for size in each}
        for file in await self._discovered():
            if file.size_bytes in sizes:
                digest = await self._digest(file)
                if digest is not None and digest in missing:
                    log.info("model_found", path=str(file.parts[0]), digest=digest)
                    self._files[digest] = file
                    yield digest

    async def search_smaller(
        self, too_large: Mapping[Family, int]
    ) -> AsyncGenerator[ModelDigest, None]:
        """Look for smaller quantisations of models; yields each that it has from now on.

        Args:
            too_large: The size in bytes of a model that fits on no node, by its family.
        """
        known = {file.parts for file in self._files.values()}
        for file in await self._discovered():
            if file.parts in known:
                continue
            size_bytes = too_large.get(family) if (family := family_of(file.card)) else None
            if size_bytes is not None and file.size_bytes < size_bytes:
                digest = await self._digest(file)
                if digest is not None and digest not in self._files:
                    log.info("smaller_found", path=str(file.parts[0]), digest=digest)
                    self._files[digest] = file
                    yield digest

    async def _discovered(self) -> Sequence[ModelFile]:
        return await trio.to_thread.run_sync(self._store.discover, abandon_on_cancel=True)

    async def _digest(self, file: ModelFile) -> ModelDigest | None:
        """Return the digest of a file; None when it cannot be read."""
        try:
            return await trio.to_thread.run_sync(
                partial(self._store.digest, file), abandon_on_cancel=True
            )
        except MeshError as exc:
            log.warning("model_skipped", path=str(file.parts[0]), reason=str(exc))
            return None


class InventoryPublisher:
    """Tells one mesh what the inventory has, and looks for what that mesh wants.

    Args:
        mesh: Told, from the start.
        inventory: What this node has.
    """

    def __init__(self, mesh: Mesh, inventory: ModelInventory) -> None:
        self._mesh = mesh
        self._inventory = inventory
        self._pages = 0
        self._due = trio.Event()
        self._publish()

    async def run(self) -> None:
        """Look for what the mesh may want to know or have, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._look_at_shards)
            nursery.start_soon(self._search, self._missing, self._inventory.search)
            nursery.start_soon(self._search, self._too_large, self._inventory.search_smaller)

    def look_now(self) -> None:
        """Look at once for what is known of the shards of models: something came."""
        self._due.set()

    async def _look_at_shards(self) -> None:
        """Tell the mesh what commands have found out about the shards of models."""
        while True:
            self._due = trio.Event()
            if await self._inventory.look_at_shards():
                self._publish()
            with trio.move_on_after(LOOK_INTERVAL_S):
                await self._due.wait()

    async def _search(
        self,
        wanted: Callable[[], Mapping[Key, Value]],
        search: Callable[[Mapping[Key, Value]], AsyncGenerator[ModelDigest, None]],
    ) -> None:
        """Look for files for what is wanted: soon for what is new, and for all every minute."""
        searched: frozenset[Key] = frozenset()
        searched_at = -math.inf
        while True:
            seen = self._mesh.changes.count
            now_wanted = wanted()
            pause_s = SEARCH_PAUSE_S if now_wanted.keys() - searched else SEARCH_INTERVAL_S
            due_at = searched_at + pause_s if now_wanted else math.inf
            if trio.current_time() >= due_at:
                async with aclosing(search(now_wanted)) as found:
                    async for _ in found:
                        self._publish()
                searched, searched_at = frozenset(now_wanted), trio.current_time()
                continue  # what is wanted now may be something else
            with trio.move_on_at(due_at):
                await self._mesh.changes.wait(seen)

    def _too_large(self) -> dict[Family, int]:
        """The sizes of wanted models of experts that fit on no node with their file, by family."""
        found: dict[Family, int] = {}
        for model in self._mesh.view.models.values():
            card = model.card
            family = None if card is None else family_of(card)
            budgets = [one.budget_bytes for one in model.holders if one.caps is not None]
            if card is None or family is None or not model.wishes or not budgets:
                continue
            context = pipeline_context(model.wanted, card)
            if need_bytes(card, context=context) > max(budgets):
                found[family] = max(found.get(family, 0), card.size_bytes)
        return found

    def _missing(self) -> dict[ModelDigest, Collection[int]]:
        """Wanted models that others have, with the sizes that those say, of which one is right."""
        return {
            digest: {node.held[digest].card.size_bytes for node in model.holders}
            for digest, model in self._mesh.view.models.items()
            if model.wishes and model.holders and digest not in self._inventory
        }

    def _publish(self) -> None:
        pages = held_pages(self._inventory.held())
        if len(pages) > HELD_PAGES_MAX:
            log.warning("models_left_out", pages=len(pages), pages_max=HELD_PAGES_MAX)
            pages = pages[:HELD_PAGES_MAX]
        for number, page in enumerate(pages):
            self._mesh.publish(held_register(number), page)
        for number in range(len(pages), self._pages):
            self._mesh.publish(held_register(number), None)
        self._pages = len(pages)
