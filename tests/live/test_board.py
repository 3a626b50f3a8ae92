"""The board in a real browser, against the real demo."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import axe_playwright_python
import httpx2
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from live.servers import Server, eventually, free_port, process, program, uvicorn

pytestmark = [pytest.mark.long, pytest.mark.timeout(120)]

ROOT = Path(__file__).parents[2]
SHOP = ROOT / "examples" / "shop"
APPS = Path(__file__).parent / "apps"
AXE = next(Path(axe_playwright_python.__file__).parent.rglob("axe.min.js"))

#: Nothing of the browser's own goes out; root needs no sandbox.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

#: The fixture `visit`.
Visit = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium."""
    path = program("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the board of `make demo`, with its traffic."""
    log, port = tmp_path_factory.mktemp("demo") / "log", free_port()
    with process(sys.executable, str(SHOP / "demo.py"), "--port", str(port), log=log):
        url = f"http://127.0.0.1:{port}/aftertask/"

        def has_failures() -> bool:
            runs = httpx2.get(f"{url}api/runs?state=failed&task=mail.receipt", timeout=20).json()["runs"]
            letters = httpx2.get(f"{url}api/dead", timeout=20).json()["letters"]
            return url in log.read_text() and bool(runs) and letters > 1

        eventually(has_failures, seconds=60, what="a failed receipt and dead letters on the board")
        yield url


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Server]:
    """The shop, without customers."""
    with uvicorn("app:app", SHOP, tmp_path / "log") as server:
        yield server


@pytest.fixture
def journaled(tmp_path: Path) -> Iterator[Server]:
    """The same with a journal, and with two dead letters: the carrier is down."""
    with uvicorn("app:app", SHOP, tmp_path / "log", AFTERTASK_JOURNAL=str(tmp_path / "tasks.db")) as server:
        carrier_is(server, up=False)
        for number in (1, 2):
            assert httpx2.post(f"{server.url}/parcels/{number}", timeout=20).status_code == 200
        eventually(lambda: dead_letters(server) == 2, what="two dead letters")
        yield server


def carrier_is(shop: Server, *, up: bool) -> None:
    """Whether parcels can be booked."""
    assert httpx2.post(f"{shop.url}/carrier", params={"up": up}, timeout=20).status_code == 200


def dead_letters(shop: Server) -> int:
    """How many there are."""
    return int(httpx2.get(f"{shop.url}/aftertask/api/dead", timeout=20).json()["letters"])


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """Opens a page; at the end, none had an error, sent a request elsewhere, or was wider than its window."""
    contexts: list[BrowserContext] = []
    complaints: list[str] = []

    def open_page(url: str, **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        origin = "/".join(url.split("/")[:3]) + "/"
        page.on("console", lambda line: complaints.append(line.text) if line.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(f"dialog {dialog.message}"))
        page.on("request", lambda sent: None if sent.url.startswith(origin) else complaints.append(sent.url))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        for page in context.pages:
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), page.url
        context.close()
    assert complaints == []


def failed_receipt(page: Page, board: str) -> None:
    """Go to the page of a failed receipt."""
    page.goto(f"{board}runs?task=mail.receipt&state=failed")
    page.locator("tbody a").first.click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("mail.receipt")


def order(shop: Server, **query: str) -> None:
    """One order; the connection ends with it."""
    assert httpx2.post(f"{shop.url}/orders/7", params=query, timeout=20).status_code == 200


LOOKS: dict[str, dict[str, Any]] = {
    "wide": {"viewport": {"width": 1280, "height": 900}},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}},
    "dark phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"},
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS.keys())
def test_each_page_is_sound_and_accessible(demo: str, visit: Visit, look: dict[str, Any]) -> None:
    """In every look: live, with its content, without a serious finding of axe-core."""
    page = visit(demo, **look)
    expect(page.locator("#live")).to_have_text("Live")
    expect(page.get_by_role("heading", level=1)).to_have_text(re.compile(r"\d tasks? failing|No task fails now"))
    check_with_axe(page)
    page.goto(f"{demo}runs")
    expect(page.locator("tbody tr")).to_have_count(50)
    check_with_axe(page)
    failed_receipt(page, demo)
    expect(page.locator("pre").first).to_contain_text("MailServerDown")
    check_with_axe(page)
    page.goto(f"{demo}dead")
    expect(page.locator("tbody a").first).to_have_text("parcels.book")
    check_with_axe(page)
    page.locator("section", has=page.locator("#letters")).locator("tbody a").first.click()
    expect(page.get_by_text("Dead letter because it failed")).to_be_visible()
    check_with_axe(page)
    is_dark = page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(17, 20, 24)"
    assert is_dark == (look.get("color_scheme") == "dark")


def check_with_axe(page: Page) -> None:
    """No serious or critical finding, color contrast included."""
    page.evaluate(AXE.read_text())
    found = page.evaluate("axe.run()")["violations"]
    serious = [each for each in found if each["impact"] in ("serious", "critical")]
    assert [(each["id"], each["nodes"][0]["html"]) for each in serious] == []


#: Notes when a page has had this many rows, by the clock of this machine.
WHEN_ROWS = """wanted => new Promise(done => {
    const look = () => document.querySelectorAll("tbody tr").length >= wanted && done(Date.now() / 1000);
    new MutationObserver(look).observe(document.getElementById("main"), {childList: true, subtree: true});
    look();
})"""


def test_a_change_is_on_the_page_within_two_seconds(shop: Server, visit: Visit) -> None:
    """From the end of the run to its row; at least four times of five: something else may hold the machine up."""
    page = visit(f"{shop.url}/aftertask/runs?state=bad")
    expect(page.locator("#live")).to_have_text("Live")
    took = []
    for number in range(1, 6):
        order(shop, fault="mail")
        shown = page.evaluate(WHEN_ROWS, 3 * number)
        newest = httpx2.get(f"{shop.url}/aftertask/api/runs?limit=1", timeout=20).json()["runs"][0]
        took.append(shown - datetime.fromisoformat(newest["ended"]).timestamp())
    assert sorted(took)[3] < 2, took


def test_a_run_is_followed_from_its_start_to_its_end(shop: Server, visit: Visit) -> None:
    """Its page changes as it does."""
    page = visit(f"{shop.url}/aftertask/runs?state=running")
    httpx2.post(f"{shop.url}/reports", params={"seconds": 4}, timeout=20)
    page.get_by_role("link", name="reports.build").click()
    expect(page.get_by_role("heading", name="Where it is now")).to_be_visible()
    expect(page.locator("h1 .state")).to_have_text("running")
    expect(page.locator("h1 .state")).to_have_text("succeeded", timeout=20_000)
    expect(page.get_by_role("heading", name="Where it is now")).to_have_count(0)


def test_a_run_is_cancelled_by_the_button(journaled: Server, visit: Visit) -> None:
    """The page says what that did, and then shows it."""
    page = visit(f"{journaled.url}/aftertask/runs?state=running")
    httpx2.post(f"{journaled.url}/reports", params={"seconds": 100}, timeout=20)
    page.get_by_role("link", name="reports.build").click()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("It is cancelled")).to_be_visible()
    expect(page.locator("h1 .state")).to_have_text("cancelled")
    expect(page.get_by_role("button", name="Cancel")).to_have_count(0)


@pytest.mark.timeout(240)
def test_a_dead_letter_is_replayed_to_success(demo: str, visit: Visit) -> None:
    """When the outage of the demo is over."""

    def is_over() -> bool:
        runs = httpx2.get(f"{demo}api/runs?task=parcels.book&limit=5", timeout=20).json()["runs"]
        return {run["state"] for run in runs} == {"succeeded"}

    eventually(is_over, seconds=120, what="the end of the outage")
    page = visit(f"{demo}dead")
    page.locator("section", has=page.locator("#letters")).locator("tbody a").first.click()
    page.get_by_role("button", name="Replay").click()
    expect(page.get_by_text("It will run again")).to_be_visible()
    letter = page.url.rpartition("/")[2].partition("?")[0]
    page.locator("p", has_text="is replayed by").get_by_role("link").click()
    expect(page.locator("h1 .state")).to_have_text("succeeded", timeout=20_000)
    page.get_by_role("link", name=letter).click()
    expect(page.get_by_text("is replayed by")).to_be_visible()


def test_dead_letters_are_acted_on_by_the_keyboard_alone(journaled: Server, visit: Visit) -> None:
    """One is chosen and replayed, the other deleted, which takes two steps."""
    page = visit(f"{journaled.url}/aftertask/dead")
    check_with_axe(page)
    carrier_is(journaled, up=True)
    tab_to(page, "tbody input[type=checkbox]")
    page.keyboard.press("Space")
    page.wait_for_timeout(1500)  # an update passes, and leaves the choice alone
    assert page.evaluate("document.activeElement.checked")
    page.keyboard.press("Shift+Tab")
    tab_to(page, "#chosen button")
    page.keyboard.press("Enter")
    expect(page.get_by_text("It will run again")).to_be_visible()
    page.goto(f"{journaled.url}/aftertask/dead")
    expect(page.locator("section", has=page.locator("#letters")).locator("tbody tr")).to_have_count(1)
    tab_to(page, "details:last-of-type summary")
    page.keyboard.press("Enter")
    tab_to(page, "details[open] button")
    page.keyboard.press("Enter")
    expect(page.get_by_text("None. A durable run")).to_be_visible()
    query = f"{journaled.url}/aftertask/api/runs?task=parcels.book&state=succeeded"
    runs = eventually(lambda: httpx2.get(query, timeout=20).json()["runs"], what="the replay succeeding")
    assert len(runs) == 1


def test_many_dead_letters_are_replayed_by_the_button(journaled: Server, visit: Visit) -> None:
    """The page shows how far it is, and then that none is left."""
    page = visit(f"{journaled.url}/aftertask/dead")
    carrier_is(journaled, up=True)
    page.get_by_role("button", name="Replay all 2").click()
    expect(page.get_by_text("2 of 2 are run again")).to_be_visible()
    expect(page.get_by_text("None. A durable run")).to_be_visible()
    page.get_by_role("navigation").get_by_role("link", name="Runs").click()
    expect(page.locator("tr", has_text="parcels.book").locator(".state.succeeded")).to_have_count(2, timeout=20_000)


def test_dead_letters_can_be_replayed_without_script(journaled: Server, visit: Visit) -> None:
    """Each button is a form."""
    page = visit(f"{journaled.url}/aftertask/dead", java_script_enabled=False)
    page.get_by_role("checkbox").first.check()
    page.get_by_role("button", name="Replay chosen").click()
    expect(page.get_by_text("It will run again")).to_be_visible()
    assert dead_letters(journaled) >= 1


def test_filters_are_in_the_address_and_survive_going_back(demo: str, visit: Visit) -> None:
    """And a filter that is being typed is left alone by the updates."""
    page = visit(f"{demo}runs")
    page.get_by_label("State").select_option("failed")
    page.get_by_label("Task").fill("mail.*")
    page.wait_for_timeout(1500)  # an update passes
    expect(page.get_by_label("Task")).to_have_value("mail.*")
    page.get_by_role("button", name="Filter").click()
    page.wait_for_url(re.compile(r"\?task=mail\.\*&state=failed"))
    assert {text.strip() for text in page.locator("td .state").all_inner_texts()} == {"failed"}
    page.locator("tbody a").first.click()
    page.wait_for_url(re.compile(r"/runs/"))
    page.go_back()
    page.wait_for_url(re.compile(r"state=failed"))
    expect(page.get_by_label("State")).to_have_value("failed")


def test_the_keyboard_alone_is_enough(demo: str, visit: Visit) -> None:
    """To skip to the content, change the page, pause, and open a run whose row is being updated."""
    page = visit(demo)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to content"
    for name in ("Now", "Runs"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == name
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(r"/runs$"))
    expect(page.locator("#live")).to_have_text("Live")
    tab_to(page, "#pause")
    page.keyboard.press("Enter")
    expect(page.locator("#live")).to_have_text("Paused")
    tab_to(page, "tbody a")
    address = page.evaluate("document.activeElement.href")
    page.keyboard.press("Enter")
    page.wait_for_url(address)


def tab_to(page: Page, selector: str) -> None:
    """Press Tab until the focus is on such an element, visibly."""
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
            return
    raise AssertionError(f"{selector} is not reached by Tab")


def test_the_focus_stays_where_it_is(shop: Server, visit: Visit) -> None:
    """New rows come in above it."""
    order(shop)
    page = visit(f"{shop.url}/aftertask/runs")
    expect(page.locator("tbody tr")).to_have_count(4)
    link = page.locator("tbody a").nth(2)
    link.focus()
    address = link.get_attribute("href")
    order(shop)
    expect(page.locator("tbody tr")).to_have_count(8)
    assert page.evaluate("document.activeElement.getAttribute('href')") == address


def test_nothing_is_asked_while_hidden_or_paused(shop: Server, visit: Visit) -> None:
    """And the page catches up as soon as it is looked at."""
    page = visit(f"{shop.url}/aftertask/runs")
    expect(page.locator("#live")).to_have_text("Live")
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url))
    page.evaluate(
        "Object.defineProperty(document, 'hidden', {value: true, configurable: true});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    sent.clear()
    order(shop)
    page.wait_for_timeout(2500)  # in which two requests would be sent
    assert sent == []
    page.evaluate(
        "Object.defineProperty(document, 'hidden', {value: false, configurable: true});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    expect(page.locator("tbody tr")).to_have_count(4)
    page.get_by_role("button", name="Pause").click()
    sent.clear()
    page.wait_for_timeout(2500)
    assert sent == []


def test_an_idle_page_gets_empty_answers(shop: Server, visit: Visit) -> None:
    """One a second, all but those with which the graphs move, from when the page shows the end of the order."""
    order(shop)
    page = visit(f"{shop.url}/aftertask/")
    page.wait_for_event("response", lambda response: response.status == 204)
    statuses: list[int] = []
    page.on("response", lambda response: statuses.append(response.status))
    page.wait_for_timeout(5500)
    assert 3 <= len(statuses) <= 7 and statuses.count(204) >= len(statuses) - 2, statuses


def test_it_says_when_the_app_has_gone(shop: Server, visit: Visit, browser: Browser) -> None:
    """And goes on as soon as it is back: here it is not, so the page only says so."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{shop.url}/aftertask/")
    shop.child.terminate()
    shop.child.wait(20)
    expect(page.locator("#live")).to_have_text("Not reachable, trying again", timeout=20_000)
    context.close()


def test_it_can_be_read_without_script(demo: str, visit: Visit) -> None:
    """All but the updates."""
    page = visit(demo, java_script_enabled=False)
    text = page.locator("main").inner_text()
    assert "in the last 10 minutes" in text and "MailServerDown" in text
    page.get_by_role("navigation").get_by_role("link", name="Runs").click()
    page.get_by_label("State").select_option("failed")
    page.get_by_role("button", name="Filter").click()
    page.locator("tbody a").first.click()
    assert page.locator("h1").count() == 1 and page.get_by_text("Same response").is_visible()


def test_a_test_alert_is_sent_by_the_button(demo: str, visit: Visit) -> None:
    """To the demo's own webhook, which accepts it."""
    page = visit(demo)
    page.get_by_role("button", name="Send test").click()
    expect(page.locator("section", has=page.locator("#channels"))).to_contain_text("accepted")


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[str]:
    """The board of an app whose task has a hostile name, error and progress."""
    journal = str(tmp_path / "tasks.db")
    with uvicorn("hostile:app", APPS, tmp_path / "log", ready="/aftertask/", AFTERTASK_JOURNAL=journal) as server:
        httpx2.get(server.url, timeout=20)
        eventually(lambda: dead_letters(server) == 1, what="a dead letter")
        yield f"{server.url}/aftertask/"


def test_hostile_text_is_shown_as_text(hostile: str, visit: Visit) -> None:
    """No script runs, nothing is requested, no line is broken out of."""
    for path in ("", "runs", "dead"):
        page = visit(f"{hostile}{path}")
        expect(page.get_by_role("link", name="<script>alert(1)</script>").first).to_be_visible()
        check_with_axe(page)
    page.locator("section", has=page.locator("#letters")).locator("tbody a").first.click()
    expect(page.locator("h1")).to_contain_text("<script>alert(1)</script><img")
    expect(page.locator("h1")).to_contain_text("[U+202E][U+0000]")
    expect(page.locator("dd", has_text='{"what":"<script>')).to_be_visible()
    check_with_axe(page)
