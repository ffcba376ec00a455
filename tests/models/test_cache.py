"""The cache of cards and digests: true while the file is the same, and never in the way."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from p2pmesh.models import cache as module
from p2pmesh.models.cache import FORMAT, CachedModel, ModelCache
from p2pmesh.models.cards import ModelDigest, card_of, to_wire
from tests.models.builders import header_of

CARD = card_of([header_of()])
DIGEST = ModelDigest("ab" * 32)
STAMP = ((100, 5), (200, 6))
MODEL = Path("/models/a.gguf")


def test_what_is_put_is_found_by_another_process(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "models.json"
    index = ModelCache(path)
    index.put(MODEL, CachedModel(stamp=STAMP, card=CARD))
    index.put(MODEL, CachedModel(stamp=STAMP, digest=DIGEST))
    index.save()
    assert ModelCache(path).get(MODEL, STAMP) == CachedModel(stamp=STAMP, card=CARD, digest=DIGEST)


@pytest.mark.parametrize("stamp", [((100, 5), (200, 7)), ((101, 5), (200, 6)), ((100, 5),), ()])
def test_another_state_of_the_file_is_unknown(tmp_path: Path, stamp: module.Stamp) -> None:
    index = ModelCache(tmp_path / "models.json")
    index.put(MODEL, CachedModel(stamp=STAMP, card=CARD, digest=DIGEST))
    assert index.get(MODEL, stamp) == CachedModel(stamp=stamp)
    index.put(MODEL, CachedModel(stamp=stamp, card=CARD))
    assert index.get(MODEL, stamp).digest is None


def test_nothing_is_written_when_nothing_was_learned(tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    index = ModelCache(path)
    index.save()
    assert not path.exists()
    index.put(MODEL, CachedModel(stamp=STAMP, card=CARD))
    index.save()
    path.unlink()
    index.put(MODEL, CachedModel(stamp=STAMP, card=CARD))
    index.save()
    assert not path.exists()


def test_two_nodes_do_not_undo_each_other(tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    first, second = ModelCache(path), ModelCache(path)
    first.get(MODEL, STAMP)
    second.get(MODEL, STAMP)
    first.put(Path("/one"), CachedModel(stamp=STAMP, digest=DIGEST))
    second.put(Path("/two"), CachedModel(stamp=STAMP, digest=DIGEST))
    first.save()
    second.save()
    third = ModelCache(path)
    assert third.get(Path("/one"), STAMP).digest == DIGEST
    assert third.get(Path("/two"), STAMP).digest == DIGEST


def entry(**changes: object) -> bytes:
    good = {"stamp": STAMP, "card": to_wire(CARD), "digest": DIGEST}
    return json.dumps({"format": FORMAT, "files": {str(MODEL): {**good, **changes}}}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[" * 100_000,
        b"\xff",
        b'{"format": %d}' % FORMAT,
        b'{"format": %d, "files": []}' % FORMAT,
        b'{"format": %d, "files": {"a": 1}}' % FORMAT,
        entry(stamp=5),
        entry(stamp=[[1]]),
        entry(stamp=[["x", 1]]),
        entry(digest=5),
        entry(digest="zz" * 32),
        entry(digest="ab"),
        entry(card={"name": "x"}),
    ],
)
def test_a_damaged_file_is_ignored_and_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "models.json"
    path.write_bytes(content)
    index = ModelCache(path)
    with capture_logs() as logs:
        assert index.get(MODEL, STAMP) == CachedModel(stamp=STAMP)
        index.put(MODEL, CachedModel(stamp=STAMP, digest=DIGEST))
        index.save()
    assert {log["event"] for log in logs} == {"model_cache_ignored"}
    assert ModelCache(path).get(MODEL, STAMP).digest == DIGEST


def test_another_format_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    path.write_bytes(b'{"format": 0, "files": {"a": 1}}')
    with capture_logs() as logs:
        assert ModelCache(path).get(MODEL, STAMP) == CachedModel(stamp=STAMP)
    assert logs == []


def test_a_place_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    index = ModelCache(tmp_path / "file" / "models.json")
    with capture_logs() as logs:
        index.put(MODEL, CachedModel(stamp=STAMP, digest=DIGEST))
        index.save()
    assert "model_cache_unwritable" in {log["event"] for log in logs}
    assert index.get(MODEL, STAMP).digest == DIGEST


def test_the_newest_entries_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ENTRIES_MAX", 2)
    path = tmp_path / "models.json"
    index = ModelCache(path)
    for name in ("1", "2", "3"):
        index.put(Path(name), CachedModel(stamp=STAMP, digest=DIGEST))
    index.save()
    assert [ModelCache(path).get(Path(name), STAMP).digest for name in "123"] == [
        None,
        DIGEST,
        DIGEST,
    ]


def test_threads_may_share_it(tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    index = ModelCache(path)

    def work(number: int) -> None:
        index.put(Path(f"/{number}"), CachedModel(stamp=STAMP, digest=DIGEST))
        index.save()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    again = ModelCache(path)
    assert all(again.get(Path(f"/{number}"), STAMP).digest for number in range(8))
