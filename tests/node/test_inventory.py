from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import structlog
import trio
from trio.testing import wait_all_tasks_blocked

from p2pmesh.config import Settings
from p2pmesh.errors import ConfigError, ModelError
from p2pmesh.home import Home
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.store import EMBEDDED, ModelFile, Store
from p2pmesh.node import inventory as module
from p2pmesh.node.inventory import InventoryPublisher, ModelInventory, Opened, open_models
from p2pmesh.node.mesh import Mesh
from p2pmesh.state import registers
from p2pmesh.state.registers import HeldModel, ModelRequest
from tests.models.builders import tiny_gguf
from tests.models.layouts import moe_gguf
from tests.node.isolated_node import GIB, ME, Hearsay, library_in, model_file, wanted
from tests.state.builders import card, digest, held

DEADLINE_S = 20.0  # the store works in threads and on a real disk


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home.at(tmp_path / "node")
    home.models.mkdir(parents=True)
    return home


@pytest.fixture
def store(home: Home) -> Store:
    return Store(home, environ={})


def sha256(path: Path) -> ModelDigest:
    return ModelDigest(hashlib.sha256(path.read_bytes()).hexdigest())


DEMO = sha256(EMBEDDED)


def quiet(name: str, done_bytes: int, total_bytes: int) -> None:
    """Nobody watches."""


# What a node starts with


def test_without_a_model_there_is_the_embedded_one_and_nothing_is_wanted(store: Store) -> None:
    opened = open_models(store, Settings(), quiet)
    assert opened.demo == DEMO
    assert {one: file.stem for one, file in opened.files.items()} == {DEMO: "p2pmesh-demo-tiny"}
    assert opened.wanted == ()


def test_what_the_user_names_is_opened_and_wanted(store: Store, home: Home) -> None:
    by_path = tiny_gguf(home.root / "by-path.gguf", context=100_000)
    by_name = tiny_gguf(home.models / "by-name.gguf", seed=2)
    told: list[tuple[str, int, int]] = []

    def hashing(name: str, done_bytes: int, total_bytes: int) -> None:
        told.append((name, done_bytes, total_bytes))

    settings = Settings(model=(str(by_path), "by-name"), slots=3)
    opened = open_models(store, settings, hashing)
    assert opened.files.keys() == {DEMO, sha256(by_path), sha256(by_name)}
    assert opened.files[sha256(by_path)].parts == (by_path,)
    assert opened.wanted == (
        ModelRequest(
            digest=sha256(by_path),
            stem="by-path",
            replicas=1,
            priority=0,
            context=32768,
            slots=3,
        ),
        ModelRequest(
            digest=sha256(by_name), stem="by-name", replicas=1, priority=0, context=4096, slots=3
        ),
    )
    size_bytes = by_path.stat().st_size
    assert ("by-path", 0, size_bytes) in told
    assert ("by-path", size_bytes, size_bytes) in told
    assert {name for name, _, _ in told} == {"by-path", "by-name"}


def test_more_context_than_the_model_was_made_for_is_refused(store: Store, home: Home) -> None:
    path = tiny_gguf(home.root / "small.gguf", context=1024)
    with pytest.raises(ConfigError, match="small was made for 1024 tokens"):
        open_models(store, Settings(model=(str(path),), context=1025), quiet)


def test_the_context_of_the_settings_is_taken(store: Store, home: Home) -> None:
    path = tiny_gguf(home.models / "a.gguf")
    opened = open_models(store, Settings(model=(str(path),), context=512), quiet)
    assert opened.wanted[0].context == 512


def test_a_model_named_twice_is_wanted_once(store: Store, home: Home) -> None:
    path = tiny_gguf(home.models / "a.gguf")
    opened = open_models(store, Settings(model=("a", str(path))), quiet)
    assert len(opened.wanted) == 1


def test_more_models_than_a_record_holds_are_refused_before_any_is_read(store: Store) -> None:
    named = tuple(f"model-{number}" for number in range(registers.WANTS_MAX + 1))
    with pytest.raises(ConfigError, match="--model names 17 models; one node can ask for 16"):
        open_models(store, Settings(model=named), quiet)


def test_the_embedded_model_can_be_wanted_by_its_name(store: Store) -> None:
    opened = open_models(store, Settings(model=("p2pmesh-demo-tiny",)), quiet)
    assert [one.digest for one in opened.wanted] == [DEMO] == list(opened.files)


@pytest.mark.parametrize(
    ("content", "error"), [(None, ConfigError), (b"GGUF", ModelError), (b"", ModelError)]
)
def test_a_model_that_cannot_be_used_is_an_error(
    store: Store, home: Home, content: bytes | None, error: type[Exception]
) -> None:
    path = home.root / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=r"model\.gguf"):
        open_models(store, Settings(model=(str(path),)), quiet)


# What the mesh is told


def held_by(mesh: Mesh) -> dict[ModelDigest, HeldModel]:
    return dict(mesh.view.nodes[ME].held)


async def test_the_mesh_is_told_what_is_held_from_the_start(
    store: Store, home: Home, tmp_path: Path
) -> None:
    path = tiny_gguf(home.models / "a.gguf")
    opened = open_models(store, Settings(model=("a",)), quiet)
    mesh = Hearsay().mesh
    inventory = ModelInventory(store, opened, library_in(tmp_path))
    InventoryPublisher(mesh, inventory)
    held = held_by(mesh)
    assert {one.stem: one.demo for one in held.values()} == {"p2pmesh-demo-tiny": True, "a": False}
    assert held[sha256(path)].card == opened.files[sha256(path)].card
    assert mesh.view.demos == {DEMO}
    file = inventory.file(sha256(path))
    assert file is not None
    assert file.parts == (path,)
    assert inventory.file(digest(99)) is None


def many(count: int) -> dict[ModelDigest, ModelFile]:
    """So large that a page holds only a few of them."""
    layers = 300
    uneven = card(layers=layers, layer_bytes=tuple(range(layers)))
    return {
        digest(number): model_file(number, layers=layers, layer_bytes=uneven.layer_bytes)
        for number in range(count)
    }


def pages(mesh: Mesh) -> list[int]:
    """Which pages of held models hold something."""
    found = []
    for page in range(registers.HELD_PAGES_MAX + 1):
        record = mesh._core.document.get(ME, registers.held_register(page))
        if record is not None and record.body:
            found.append(page)
    return found


async def test_pages_that_are_not_needed_any_more_are_withdrawn(
    store: Store, tmp_path: Path
) -> None:
    mesh = Hearsay().mesh
    inventory = ModelInventory(
        store, Opened(files=many(60), demo=digest(0), wanted=()), library_in(tmp_path)
    )
    publisher = InventoryPublisher(mesh, inventory)
    before = pages(mesh)
    assert len(before) > 2
    assert before == list(range(len(before)))
    assert held_by(mesh).keys() == many(60).keys()
    inventory._files = many(1)
    publisher._publish()
    assert pages(mesh) == [0]
    assert held_by(mesh).keys() == many(1).keys()


async def test_what_fits_no_page_is_left_out_and_said(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HELD_PAGES_MAX", 2)
    mesh = Hearsay().mesh
    with structlog.testing.capture_logs() as logs:
        opened = Opened(files=many(60), demo=digest(0), wanted=())
        InventoryPublisher(mesh, ModelInventory(store, opened, library_in(tmp_path)))
    assert pages(mesh) == [0, 1]
    assert [(log["event"], log["pages_max"]) for log in logs] == [("models_left_out", 2)]


async def test_a_ranking_that_came_is_told_at_once(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_INTERVAL_S", math.inf)
    opened = Opened(files={}, demo=DEMO, wanted=())
    inventory = ModelInventory(store, opened, library_in(tmp_path))
    looked = 0

    async def look() -> bool:
        nonlocal looked
        looked += 1
        return False

    monkeypatch.setattr(inventory, "look_at_shards", look)
    async with trio.open_nursery() as nursery:
        publisher = InventoryPublisher(Hearsay().mesh, inventory)
        nursery.start_soon(publisher.run)
        await wait_all_tasks_blocked()
        assert looked == 1
        publisher.look_now()
        await wait_all_tasks_blocked()
        assert looked == 2
        nursery.cancel_scope.cancel()


# What is looked for


class Searching:
    """A node that holds the demo model, and may have what another one describes and wants."""

    def __init__(self, store: Store, patch: pytest.MonkeyPatch) -> None:
        self.hearsay = Hearsay()
        self.store = store
        self.searches = 0
        self.hashed: list[str] = []
        opened = Opened(files={DEMO: store.embedded()}, demo=DEMO, wanted=())
        self.inventory = ModelInventory(store, opened, library_in(Path("/nowhere")))
        self.publisher = InventoryPublisher(self.mesh, self.inventory)
        self.hearsay.join(1)
        discover, hashing = store.discover, store.digest

        def count_searches() -> list[ModelFile]:
            found = discover()
            self.searches += 1
            return found

        def note_hashed(file: ModelFile) -> ModelDigest:
            found = hashing(file)
            self.hashed.append(file.stem)
            return found

        patch.setattr(module, "SEARCH_PAUSE_S", 0.05)
        patch.setattr(store, "discover", count_searches)
        patch.setattr(store, "digest", note_hashed)

    @property
    def mesh(self) -> Mesh:
        return self.hearsay.mesh

    def describe(self, path: Path) -> ModelDigest:
        """Node 1 has this file, under a name of its own, and wants it served."""
        file = self.store.open(path)
        known = HeldModel(digest=sha256(path), stem="theirs", card=file.card)
        self.hearsay.hold(1, known)
        self.hearsay.want(1, wanted(0, digest=known.digest, stem="theirs"))
        return known.digest

    async def until(self, true: Callable[[], bool]) -> None:
        with trio.fail_after(DEADLINE_S):
            while not true():  # noqa: ASYNC110 - what the store does in threads is not announced
                await trio.sleep(0.001)


@pytest.fixture
def searching(store: Store, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Searching]:
    return lambda: Searching(store, monkeypatch)


async def test_a_file_that_another_node_wants_is_found_here_by_its_content(
    searching: Callable[[], Searching], home: Home, tmp_path: Path
) -> None:
    theirs = tiny_gguf(tmp_path / "theirs.gguf")
    ours = tiny_gguf(home.models / "ours.gguf")
    here = searching()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(here.publisher.run)
        found = here.describe(theirs)
        await here.until(lambda: here.inventory.file(found) is not None)
        nursery.cancel_scope.cancel()
    file = here.inventory.file(found)
    assert file is not None
    assert file.parts == (ours,)
    assert held_by(here.mesh)[found].stem == "ours"
    assert not held_by(here.mesh)[found].demo


async def test_another_file_of_that_size_is_read_and_left(
    searching: Callable[[], Searching], home: Home, tmp_path: Path
) -> None:
    theirs = tiny_gguf(tmp_path / "theirs.gguf", seed=1)
    other = tiny_gguf(home.models / "other.gguf", seed=2)
    tiny_gguf(home.models / "larger.gguf", layers=3)
    assert other.stat().st_size == theirs.stat().st_size
    here = searching()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(here.publisher.run)
        missing = here.describe(theirs)
        await here.until(lambda: bool(here.hashed))
        await wait_all_tasks_blocked(0.01)
        nursery.cancel_scope.cancel()
    assert here.hashed == ["other"], "what has another size is not even read"
    assert here.inventory.file(missing) is None
    assert held_by(here.mesh).keys() == {DEMO}


async def test_a_file_that_cannot_be_read_hides_no_other(
    searching: Callable[[], Searching],
    home: Home,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs = tiny_gguf(tmp_path / "theirs.gguf")
    tiny_gguf(home.models / "a-broken.gguf", seed=2)
    tiny_gguf(home.models / "b-good.gguf")
    here = searching()
    hashing = here.store.digest

    def broken(file: ModelFile) -> ModelDigest:
        if file.stem == "a-broken":
            raise ModelError("it changed while it was read")
        return hashing(file)

    monkeypatch.setattr(here.store, "digest", broken)
    with structlog.testing.capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(here.publisher.run)
            found = here.describe(theirs)
            await here.until(lambda: here.inventory.file(found) is not None)
            nursery.cancel_scope.cancel()
    skipped = [log["reason"] for log in logs if log["event"] == "model_skipped"]
    assert skipped == ["it changed while it was read"]


async def test_a_smaller_quantisation_of_a_model_that_fits_nowhere_is_found(
    searching: Callable[[], Searching], home: Home
) -> None:
    small = moe_gguf(home.models / "small.gguf", "qwen3moe")
    moe_gguf(home.models / "other.gguf", "mixtral")
    tiny_gguf(home.models / "dense.gguf")
    here = searching()
    big = replace(here.store.open(small).card, size_bytes=9 * GIB)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(here.publisher.run)
        here.hearsay.join(1, budget_bytes=10 * GIB)
        here.hearsay.hold(1, held(5, card=big))
        here.hearsay.want(1, wanted(5))
        await wait_all_tasks_blocked(0.05)
        assert not here.hashed, "it fits"
        here.hearsay.hold(1, held(5, card=replace(big, size_bytes=11 * GIB)))
        await here.until(lambda: here.inventory.file(sha256(small)) is not None)
        here.hearsay.hold(1, held(5, card=replace(big, size_bytes=12 * GIB)))
        await wait_all_tasks_blocked(0.05)
        nursery.cancel_scope.cancel()
    assert here.hashed == ["small"], "once, and no model of another family"
    assert held_by(here.mesh)[sha256(small)].stem == "small"


async def test_a_smaller_quantisation_that_is_copied_here_later_is_found(
    searching: Callable[[], Searching],
    home: Home,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SEARCH_INTERVAL_S", 0.1)
    small = moe_gguf(tmp_path / "small.gguf", "qwen3moe")
    digest = sha256(small)
    here = searching()
    big = replace(here.store.open(small).card, size_bytes=11 * GIB)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(here.publisher.run)
        here.hearsay.join(1, budget_bytes=10 * GIB)
        here.hearsay.hold(1, held(5, card=big))
        here.hearsay.want(1, wanted(5))
        await here.until(lambda: here.searches > 1)
        small.rename(home.models / "small.gguf")
        await here.until(lambda: here.inventory.file(digest) is not None)
        nursery.cancel_scope.cancel()
    assert held_by(here.mesh)[digest].stem == "small"


async def test_nothing_is_searched_while_nothing_is_missing(
    searching: Callable[[], Searching],
) -> None:
    here = searching()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(here.publisher.run)
        here.hearsay.want(1, wanted(0, digest=DEMO), wanted(7))
        await wait_all_tasks_blocked()
        assert here.searches == 0, "one is here, and nobody has described the other"
        nursery.cancel_scope.cancel()


async def test_other_news_does_not_repeat_a_search_nor_put_it_off(
    searching: Callable[[], Searching],
    home: Home,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SEARCH_INTERVAL_S", 0.1)
    theirs = tiny_gguf(tmp_path / "theirs.gguf")
    here = searching()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(here.publisher.run)
        missing = here.describe(theirs)
        await here.until(lambda: here.searches == 1)
        tiny_gguf(home.models / "copied-by-hand.gguf")
        started = trio.current_time()
        budget_bytes = 0
        while here.inventory.file(missing) is None:  # something changes all the time
            budget_bytes += 1
            here.hearsay.give(budget_bytes)
            await trio.sleep(0.01)
            assert trio.current_time() - started < DEADLINE_S
        nursery.cancel_scope.cancel()
    assert here.searches == 2


async def test_wishes_that_change_all_the_time_keep_no_disk_busy(
    searching: Callable[[], Searching], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tiny_gguf(tmp_path / f"{seed}.gguf", seed=seed) for seed in range(5)]
    here = searching()
    monkeypatch.setattr(module, "SEARCH_PAUSE_S", DEADLINE_S)
    async with trio.open_nursery() as nursery:
        here.describe(files[0])
        nursery.start_soon(here.publisher.run)
        await here.until(lambda: here.searches == 1)
        for file in files[1:]:
            here.describe(file)
            await trio.sleep(0.05)
        nursery.cancel_scope.cancel()
    assert here.searches == 1


async def test_what_is_wanted_during_a_search_is_looked_for_next(
    searching: Callable[[], Searching],
    home: Home,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = tiny_gguf(tmp_path / "first.gguf", seed=1)
    second = tiny_gguf(home.models / "second.gguf", seed=2, layers=3)
    here = searching()
    discover = here.store.discover

    def discover_slowly() -> list[ModelFile]:
        found = discover()
        if here.searches == 1:
            trio.from_thread.run_sync(here.describe, second)
        return found

    monkeypatch.setattr(here.store, "discover", discover_slowly)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(here.publisher.run)
        here.describe(first)
        await here.until(lambda: here.inventory.file(sha256(second)) is not None)
        nursery.cancel_scope.cancel()
    assert here.searches == 2
