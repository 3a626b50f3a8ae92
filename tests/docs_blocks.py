"""
Run every Python block of some pages, each page in a process of its own; tests/test_docs.py calls it.

    python tests/docs_blocks.py README.md docs/settings.md

The blocks of a page run one after another and share their names; those that a page takes for granted are in `given`.
An app that has the middleware is started and stopped after each block, and functions called `test_…` are run by pytest.
Prints a JSON object: page to traceback, or null where all blocks ran.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import contextlib
import inspect
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
import textwrap
import traceback
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import sqlalchemy.orm
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException
from starlette.testclient import TestClient

import aftertask.alerts
import aftertask.signals
from aftertask import AftertaskMiddleware, Limit, Policy, QueueFull, Retry, Settings, options, task
from aftertask.testing import recorded

#: What a reader replaces, and what takes its place here.
PLACEHOLDERS = {
    "whsec_…": f"whsec_{base64.b64encode(bytes(32)).decode()}",
    "start_http_server(9090)": "start_http_server(0, addr='127.0.0.1')",
}

BLOCK = re.compile(r"^(?P<indent> *)```python[^\n]*\n(?P<code>.*?)^ *```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[str]:
    """The Python blocks of a page, padded so that line numbers are those of the page."""
    text = page.read_text()
    for written, value in PLACEHOLDERS.items():
        text = text.replace(written, value)
    return [
        "\n" * text.count("\n", 0, found.start("code")) + textwrap.dedent(found["code"])
        for found in BLOCK.finditer(text)
    ]


def given() -> dict[str, Any]:
    """Names that a block may use though its page does not define them."""

    async def send_welcome_email(email: str) -> None: ...

    return {
        **{each.__name__: each for each in (AftertaskMiddleware, Limit, Policy, QueueFull, Retry, Settings)},
        **{each.__name__: each for each in (BackgroundTasks, Depends, FastAPI, HTTPException, TestClient)},
        "options": options,
        "task": task,
        "anyio": anyio,
        "Session": sqlalchemy.orm.Session,
        "RunFilter": aftertask.signals.RunFilter,
        "usual": aftertask.signals.usual,
        "Iterator": Iterator,
        "logging": __import__("logging"),
        "email": "ada@example.org",
        "tasks": BackgroundTasks(),
        "app": FastAPI(),
        "settings": Settings(),
        "send_welcome_email": send_welcome_email,
    }


def start(app: FastAPI) -> None:
    """Build the app, so that a mistake in its settings is found, and run its lifespan."""
    layers = [layer.cls for layer in app.user_middleware]
    if AftertaskMiddleware in layers:
        with recorded(app), TestClient(app):
            pass


def execute(page: Path, folder: str) -> None:
    """Run the blocks of one page in this folder."""
    page = page.resolve()
    os.chdir(folder)
    module = types.ModuleType("page")
    sys.modules["page"] = sys.modules["main"] = module  # where a reader has put the app
    space = module.__dict__
    space |= given()
    own_app = False
    for code in blocks(page):
        tree = ast.parse(code)
        own_app = own_app or any(
            isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "app" for node in ast.walk(tree)
        )
        if not own_app:
            space["app"] = FastAPI()
        done = eval(compile(tree, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), space)
        if inspect.iscoroutine(done):
            asyncio.run(done)
        start(space["app"])
    if any(name.startswith("test_") for name in space):
        Path("test_page.py").write_text("from page import *\n")
        code = pytest.main(["-q", "-p", "no:cacheprovider", "test_page.py"])
        assert code == 0, f"the page's own tests ended with {code!r}"


def child(page: Path, folder: str, answer: Any) -> None:
    """Run a page in this process, and send what went wrong with what was printed, or None."""
    warnings.simplefilter("error")
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            execute(page, folder)
    except BaseException:
        answer.send(f"{traceback.format_exc()}\n{printed.getvalue()[-3000:]}")
    else:
        answer.send(None)


def main(pages: list[str]) -> None:
    """Run the pages one after another."""
    fork = multiprocessing.get_context("fork")
    found: dict[str, str | None] = {}
    for page in pages:
        here, there = fork.Pipe()
        with tempfile.TemporaryDirectory() as folder:
            process = fork.Process(target=child, args=(Path(page), folder, there))
            process.start()
            found[page] = here.recv() if here.poll(60) else "no answer within 60 seconds"
            process.kill()
            process.join()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
