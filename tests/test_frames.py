"""How much of our code runs for one task: a reader has to follow it, and each request pays for it."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType

import anyio
import pytest
from fastapi import BackgroundTasks, FastAPI
from prometheus_client import CollectorRegistry

import aftertask
from aftertask import AftertaskMiddleware, Settings
from kit import drive, lifespan

PACKAGE = Path(aftertask.__file__).parent

#: What is reached, so that it grows no further; the goal is 75 frames in 15 modules.
FRAMES, MODULES = 165, 26


async def send_receipt() -> None:
    """A task that does nothing."""


async def endpoint(tasks: BackgroundTasks) -> str:
    """Respond, with one task."""
    tasks.add_task(send_receipt)
    return "ok"


@pytest.mark.usefixtures("no_log_handlers")
def test_one_task_runs_few_frames_in_few_modules(registry: CollectorRegistry) -> None:
    """With the default signals and a lifespan, for a request with one task; a resumed frame counts again."""
    app = FastAPI()
    app.add_api_route("/", endpoint)
    app.add_middleware(AftertaskMiddleware, settings=Settings(registry=registry))
    frames: Counter[tuple[str, str]] = Counter()

    def profile(frame: FrameType, event: str, argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            frames[str(path.relative_to(PACKAGE)), frame.f_code.co_qualname] += 1

    async def measure() -> None:
        async with lifespan(app):
            for _ in range(5):  # what happens once for an app or for a task is not counted
                await drive(app)
            sys.setprofile(profile)
            try:
                await drive(app)
            finally:
                sys.setprofile(None)

    anyio.run(measure)

    modules = {module for module, _ in frames}
    lines = [f"{times:4} {module:28} {name}" for (module, name), times in sorted(frames.items())]
    print("\n".join([*lines, f"{frames.total()} frames in {len(modules)} modules"]))  # noqa: T201  # shown if it fails
    assert frames.total() <= FRAMES
    assert len(modules) <= MODULES
