"""The parts of one app that its requests work with."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from .emit import Emitter
from .keeper import Keeper
from .lifecycle import Lifecycle
from .schedule import Scheduler
from .shutdown import Shutdown

Scope = MutableMapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """
    The parts of one app that a request works with.

    Attributes:
        find_request_id: `Settings.request_id`.
        keeps_context: Whether tasks get the endpoint's context variables (`Settings(context="endpoint")`).
        run_ids_header: `Settings.run_ids_header`.
        keeper: Keeps durable runs; None if nothing does.
        runs_after_request: Whether batches wait until the call of the app has returned (`Settings.run_after`).
        batch_started: Called on the event loop before a batch starts.
    """

    emit: Emitter
    scheduler: Scheduler
    lifecycle: Lifecycle
    shutdown: Shutdown
    find_request_id: Callable[[Scope], object]
    keeps_context: bool
    run_ids_header: str | None
    keeper: Keeper | None
    runs_after_request: bool
    batch_started: Callable[[], None]
