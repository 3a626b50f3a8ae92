"""
The pictures of the README and of board.md, taken from the running demo with Debian's Chromium.

    python docs/screenshots.py                   # or make screenshots; takes about a minute and a half
    python docs/screenshots.py --seconds 30      # the demo runs for less time before the first one
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

DOCS = Path(__file__).parent
DEMO = DOCS.parent / "examples" / "shop" / "demo.py"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]


def now(page: Page, board: str) -> None:
    """The first page."""
    page.goto(board)


def runs(page: Page, board: str) -> None:
    """The bad runs."""
    page.goto(f"{board}runs?state=bad")


def run(page: Page, board: str) -> None:
    """A receipt that failed."""
    page.goto(f"{board}runs?task=mail.receipt&state=failed")
    page.locator("tbody a").first.click()
    page.wait_for_url(re.compile("/runs/"))


def dead(page: Page, board: str) -> None:
    """The dead letters."""
    page.goto(f"{board}dead")


#: The name of each picture, the page, the window's width and height, and the color scheme.
PICTURES = (
    ("board", now, 1200, 820, "light"),
    ("board-dark", now, 1200, 820, "dark"),
    ("board-runs", runs, 1200, 820, "light"),
    ("board-run", run, 1200, 1020, "dark"),
    ("board-letters", dead, 1200, 820, "light"),
    ("board-phone", now, 390, 844, "light"),
)

#: Stacks name the files of this checkout; its folder is left out of the pictures.
WITHOUT_FOLDER = """folder => document.querySelectorAll("pre").forEach(stack => {
    stack.textContent = stack.textContent.replaceAll(folder, "");
})"""


def address_of(demo: subprocess.Popen[str]) -> str:
    """The board of a demo that has just started: the first address that it prints."""
    assert demo.stdout is not None
    for line in demo.stdout:
        if found := re.search(r"http://\S+/aftertask/", line):
            return found[0]
    raise SystemExit("the demo ended before it had printed an address")


def take(board: str, folder: Path, chromium: str) -> None:
    """Take each picture."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        for name, show, width, height, scheme in PICTURES:
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            show(page, board)
            page.locator('#live[data-live="on"]').wait_for()
            page.evaluate(WITHOUT_FOLDER, f"{DEMO.parent}/")
            page.evaluate("document.activeElement.blur()")
            page.screenshot(path=folder / f"{name}.png")
            page.close()
        browser.close()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=75, help="of the demo before the first picture")
    parser.add_argument("--folder", type=Path, default=DOCS / "images")
    options = parser.parse_args()
    if (chromium := shutil.which("chromium")) is None:
        raise SystemExit("chromium is missing; it is Debian's package chromium")
    options.folder.mkdir(parents=True, exist_ok=True)
    demo = subprocess.Popen([sys.executable, "-u", str(DEMO)], stdout=subprocess.PIPE, text=True)
    try:
        board = address_of(demo)
        # Its output is read on, or it would wait.
        threading.Thread(target=demo.communicate, daemon=True).start()
        time.sleep(options.seconds)
        take(board, options.folder, chromium)
    finally:
        demo.terminate()
        demo.wait(20)


if __name__ == "__main__":
    main()
