from __future__ import annotations

from pathlib import Path

import pytest

from p2pmesh.console.assets import load_assets, web_root
from p2pmesh.errors import LocalError


def test_the_page_is_found_in_this_checkout() -> None:
    assets = load_assets(web_root())
    assert {"index.html", "style.css", "app.js"} <= set(assets)
    assert assets["app.js"].media_type == "text/javascript; charset=utf-8"


def test_every_file_that_the_page_names_is_there() -> None:
    assets = load_assets(web_root())
    page = assets["index.html"].content.decode()
    named = {
        part.split('"')[0].removeprefix("/")
        for attribute in ('src="', 'href="')
        for part in page.split(attribute)[1:]
    }
    assert {name for name in named if not name.startswith("#")} <= set(assets)


def test_only_the_page_s_own_kinds_of_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<!doctype html>")
    (tmp_path / "secret.txt").write_text("no")
    (tmp_path / "folder.js").with_suffix("").mkdir()
    assert set(load_assets(tmp_path)) == {"index.html"}


def test_the_tag_changes_with_the_content(tmp_path: Path) -> None:
    page = tmp_path / "index.html"
    page.write_text("one")
    first = load_assets(tmp_path)["index.html"].etag
    page.write_text("two")
    assert load_assets(tmp_path)["index.html"].etag != first


def test_a_missing_page_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="install p2pmesh again"):
        load_assets(tmp_path / "nowhere")
    with pytest.raises(LocalError, match="page is missing"):
        load_assets(tmp_path)
