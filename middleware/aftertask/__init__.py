"""
See every background task a FastAPI or Starlette app runs after it has answered, and those it never ran.

`app.add_middleware(AftertaskMiddleware)` is all it takes.
"""

from __future__ import annotations

from ._observe import observe_functions
from .errors import AftertaskError, NameClash, NotSerializable, QueueFull, RegistryClash, TaskTimeout
from .events import (
    Abandoned,
    AbandonedEnded,
    Admission,
    Cancelled,
    Dropped,
    Expired,
    Failed,
    Failure,
    HazardFound,
    Lost,
    Offloaded,
    Progress,
    Rejected,
    Request,
    Retrying,
    Scheduled,
    Signal,
    Skipped,
    Slow,
    Started,
    Stuck,
    Succeeded,
    TaskEvent,
    TaskRun,
    TimedOut,
    current_run,
    get_run,
    progress,
)
from .middleware import AftertaskMiddleware
from .policies import Limit, Policy, Retry, options, task
from .settings import Settings

__version__ = "0.1.0"

__all__ = [
    "Abandoned",
    "AbandonedEnded",
    "Admission",
    "AftertaskError",
    "AftertaskMiddleware",
    "Cancelled",
    "Dropped",
    "Expired",
    "Failed",
    "Failure",
    "HazardFound",
    "Limit",
    "Lost",
    "NameClash",
    "NotSerializable",
    "Offloaded",
    "Policy",
    "Progress",
    "QueueFull",
    "RegistryClash",
    "Rejected",
    "Request",
    "Retry",
    "Retrying",
    "Scheduled",
    "Settings",
    "Signal",
    "Skipped",
    "Slow",
    "Started",
    "Stuck",
    "Succeeded",
    "TaskEvent",
    "TaskRun",
    "TaskTimeout",
    "TimedOut",
    "current_run",
    "get_run",
    "observe_functions",
    "options",
    "progress",
    "task",
]
