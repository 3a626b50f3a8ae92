"""
See every background task a FastAPI or Starlette app runs after it has responded, and those it never ran.

`app.add_middleware(AftertaskMiddleware)` is all it takes. The events and the base class of signals are in
`aftertask.events`.
"""

from __future__ import annotations

from ._core.notes import note
from ._core.observe import observe_functions
from ._version import __version__ as __version__
from .errors import (
    AftertaskError,
    DuplicateKey,
    EngineUnavailable,
    JournalError,
    NameClash,
    NotSerializable,
    QueueFull,
    RegistryClash,
    TaskTimeout,
)
from .events import HazardFound, TaskEvent, TaskRun, cancel_run, current_run, get_run, progress
from .middleware import AftertaskMiddleware
from .policies import Limit, Policy, Retry
from .settings import Settings
from .tasks import options, task

__all__ = [
    "AftertaskError",
    "AftertaskMiddleware",
    "DuplicateKey",
    "EngineUnavailable",
    "HazardFound",
    "JournalError",
    "Limit",
    "NameClash",
    "NotSerializable",
    "Policy",
    "QueueFull",
    "RegistryClash",
    "Retry",
    "Settings",
    "TaskEvent",
    "TaskRun",
    "TaskTimeout",
    "cancel_run",
    "current_run",
    "get_run",
    "note",
    "observe_functions",
    "options",
    "progress",
    "task",
]
