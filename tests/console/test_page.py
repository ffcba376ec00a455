"""The page in a real browser, against a real console process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.console.fake import INVITATION, NEWCOMER, TOKEN, three_nodes

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import Browser, ConsoleMessage, Page, expect

from tests.console.browser import open_browser
from tests.console.running import console

LOST = "Connection to this node lost, trying again"
PATIENCE_MS = 15_000  # the longest back-off after two failures, on a busy machine


@contextmanager
def page_of(browser: Browser, port: int, complaints: list[str], **options: Any) -> Iterator[Page]:
    context = browser.new_context(**options)
    page = context.new_page()

    def on_console(message: ConsoleMessage) -> None:
        complaints.append(f"{message.type}: {message.text}")

    page.on("console", on_console)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"http://127.0.0.1:{port}/")
    try:
        yield page
    finally:
        context.close()


def test_the_page_shows_follows_loses_and_finds_its_node() -> None:
    complaints: list[str] = []
    with (
        console() as node,
        open_browser() as browser,
        page_of(browser, node.port, complaints) as page,
    ):
        expect(page.get_by_role("heading", level=1)).to_have_text("amber-otter")
        expect(page).to_have_title("amber-otter · p2pmesh")
        _assert_three_nodes(page)

        status = three_nodes()
        status["nodes"][2]["state"] = "dead"
        status["nodes"][1]["name"] = "<b>anna</b>"
        status["models"][1]["state"] = "ready"
        node.show(status)
        expect(page.get_by_role("row", name="living-room-mac")).to_contain_text("dead")
        expect(page.locator("#nodes")).to_contain_text("<b>anna</b>")
        expect(page.locator("#summary")).to_contain_text("2 of 3 nodes live")
        assert page.locator("b").count() == 0
        assert complaints == []

        assert node.stop() == 0
        expect(page.get_by_role("alert")).to_have_text(LOST)
        expect(page.locator("#nodes tr")).to_have_count(3)
        with console(node.port) as again:
            expect(page.get_by_role("alert")).to_be_hidden(timeout=PATIENCE_MS)
            expect(page.get_by_role("row", name="living-room-mac")).to_contain_text("suspect")
            assert TOKEN not in page.content()
            assert again.stop() == 0
    # A browser itself reports each refused attempt; nothing else may be said.
    assert {line for line in complaints if "ERR_" not in line} == set()


def _assert_three_nodes(page: Page) -> None:
    nodes = page.get_by_role("table", name="Nodes")
    expect(nodes.locator("tbody").get_by_role("row")).to_have_count(3)
    mine = nodes.get_by_role("row", name=re.compile("^kitchen-pc"))
    expect(mine).to_contain_text("this node")
    expect(nodes.get_by_role("row", name=re.compile("annas-laptop"))).to_contain_text("1.8 ms")
    drawing = page.locator("#topology svg")
    expect(drawing).to_have_attribute("aria-label", re.compile("living-room-mac suspect"))
    expect(drawing.locator("line")).to_have_count(2)
    models = page.get_by_role("table", name="Models")
    expect(models.get_by_role("row", name=re.compile("Llama-3.3"))).to_contain_text("not served")
    expect(models).to_contain_text("needs 43.1 GiB; the largest node has 24.0 GiB")
    expect(page.locator("#warnings")).to_have_text("GPU found but unused: p2pmesh engine install")
    expect(page.locator("#api")).to_have_text("http://127.0.0.1:9337/v1")
    expect(page.locator("#curl")).to_contain_text('"model": "p2pmesh-demo-tiny"')
    expect(mine).to_contain_text("adminfounded the mesh")
    expect(nodes.get_by_role("row", name=re.compile("annas-laptop"))).to_contain_text(
        "servelet in on the network of kitchen-pcuntil "
    )
    expect(page.locator("#summary")).to_contain_text("open · 2 of 3 nodes live")
    expect(page.locator("#who")).to_have_text(
        "This mesh is open: anyone on this network can join. "
        "The node that answers can read the prompt."
    )
    expect(page.locator("#newcomers")).to_be_hidden()
    expect(page.get_by_role("table", name="Invitations")).to_be_hidden()


def test_members_can_be_invited_and_let_in() -> None:
    complaints: list[str] = []
    status = three_nodes()
    status["mesh"].update(
        open=False, admits=False, others=["it's <i>late</i>"], notices=["Only one admin"]
    )
    status["nodes"][0]["role"], status["nodes"][1]["role"] = "serve", "invite"
    status["nodes"][1].update(basis="invite", stage=True, by="<b>kim</b>")
    hers = {**INVITATION, "id": "e" * 26, "used": None, "stage": False, "by": "annas-laptop"}
    any_number = {**INVITATION, "id": "f" * 26, "used": None, "uses": 0}
    status["invitations"] = [INVITATION, hers, any_number]
    status["newcomers"] = [{**NEWCOMER, "name": "<i>carl</i>"}]
    with console() as node, open_browser() as browser:
        node.show(status)
        permissions = ["clipboard-read", "clipboard-write"]
        with page_of(browser, node.port, complaints, permissions=permissions) as page:
            expect(page.locator("#summary")).to_contain_text("private · ")
            expect(page.locator("#who")).to_contain_text("private: whoever is invited can join")
            expect(page.get_by_role("list", name="Waiting to join")).to_have_text(
                "<i>carl</i> at 192.168.1.33 waits to join. To let it in: p2pmesh admit dddddddd"
            )
            expect(page.get_by_role("list", name="Warnings").get_by_role("listitem")).to_have_text(
                [
                    "GPU found but unused: p2pmesh engine install",
                    "Only one admin",
                    (
                        'Another open mesh "it\'s <i>late</i>" is here: '
                        "p2pmesh up --mesh 'it'\\''s <i>late</i>'"
                    ),
                ]
            )
            anna = page.get_by_role("row", name=re.compile("annas-laptop")).first
            expect(anna).to_contain_text("inviteinvited by <b>kim</b>, right stage")
            rows = page.get_by_role("table", name="Invitations").locator("tbody tr")
            expect(rows).to_have_count(3)
            expect(rows.nth(0)).to_contain_text("cccccccc")
            expect(rows.nth(0)).to_contain_text("1 of 2")
            expect(rows.nth(0)).to_contain_text("and the right stage")
            expect(rows.nth(1)).to_contain_text("at most 2")
            expect(rows.nth(1)).not_to_contain_text("right stage")
            expect(rows.nth(2)).to_contain_text("any number of times")
            expect(page.locator("#inviter")).to_have_text(
                "on annas-laptop, then on the other machine p2pmesh join TOKEN"
            )
            page.get_by_role("button", name="Copy the command that invites").press("Enter")
            expect(page.locator("#said")).to_have_text("Copied")
            assert page.evaluate("navigator.clipboard.readText()") == "p2pmesh invite --qr"
            assert page.locator("b, i").count() == 0
        assert node.stop() == 0
    assert complaints == []


def test_a_lonely_node_without_models_is_explained_and_addresses_can_be_copied() -> None:
    complaints: list[str] = []
    status = three_nodes()
    status["nodes"] = status["nodes"][:1]
    status["models"] = []
    status["node"]["warnings"] = []
    status["node"]["api"] = "0.0.0.0:9337"
    with console() as node, open_browser() as browser:
        node.show(status)
        permissions = ["clipboard-read", "clipboard-write"]
        with page_of(browser, node.port, complaints, permissions=permissions) as page:
            expect(page.locator("#alone")).to_be_visible()
            expect(page.locator("#inviter")).to_contain_text("here, then on the other machine")
            expect(page.locator("#no-models")).to_be_visible()
            expect(page.locator("#warnings")).to_be_hidden()
            page.get_by_role("button", name="Copy the API address").press("Enter")
            expect(page.locator("#said")).to_have_text("Copied")
            copied = page.evaluate("navigator.clipboard.readText()")
            assert copied == "http://127.0.0.1:9337/v1"
        assert node.stop() == 0
    assert complaints == []


@pytest.mark.parametrize(
    "others", [2, *(pytest.param(number, marks=pytest.mark.full) for number in (11, 40))]
)
def test_nothing_sticks_out_of_the_page_at_any_width(others: int) -> None:
    complaints: list[str] = []
    status = three_nodes()
    long = status["nodes"][2]
    status["nodes"] = [
        *status["nodes"][:2],
        *({**long, "id": str(n), "name": f"a-very-long-name-{n}" * 3} for n in range(others - 1)),
    ]
    status["invitations"] = [{**INVITATION, "by": "a-very-long-name" * 4}]
    status["newcomers"] = [{**NEWCOMER, "name": "a-very-long-name" * 4}]
    with console() as node, open_browser() as browser:
        node.show(status)
        with page_of(browser, node.port, complaints) as page:
            expect(page.locator("#nodes tr")).to_have_count(others + 1)
            for width in (1280, 768, 390, 320):
                page.set_viewport_size({"width": width, "height": 800})
                expect(page.locator("#topology svg")).to_be_visible()
                page.evaluate("new Promise(requestAnimationFrame)")
                assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert complaints == []
