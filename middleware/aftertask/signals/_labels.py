"""Bounds on label values: which tasks and exception classes have their own label."""

from __future__ import annotations

from collections.abc import Callable

from .._log import log
from .families import OTHER

#: Number of unregistered tasks with a label of their own; registered ones always have one.
UNREGISTERED_TASKS = 100

#: Number of exception classes with a label of their own.
ERROR_TYPES_PER_TASK = 20
ERROR_TYPES_PER_PROCESS = 50


class Bounds:
    """
    Folds label values beyond a bound into `__other__`; the first one of each label is logged.

    Args:
        on_overflow: Called with the label's name whenever a value is folded.
    """

    def __init__(self, on_overflow: Callable[[str], object]) -> None:
        self._on_overflow = on_overflow
        self._tasks: set[str] = set()
        self._error_types: dict[str, set[str]] = {}
        self._all_error_types: set[str] = set()
        self._logged: set[str] = set()

    def task(self, name: str) -> str:
        """The `task` label of a task that is not registered; a fold is not counted here, but once per run."""
        if name not in self._tasks:
            if len(self._tasks) >= UNREGISTERED_TASKS:
                return OTHER
            self._tasks.add(name)
        return name

    def count_folded_run(self) -> None:
        """Count a run whose task has no label value of its own."""
        self._fold(
            "task", f"{UNREGISTERED_TASKS} unregistered tasks have a label of their own; register the others with @task"
        )

    def error_type(self, task: str, name: str) -> str:
        """The `error_type` label of an exception class."""
        known = self._error_types.setdefault(task, set())
        if name in known:
            return name
        is_full = name not in self._all_error_types and len(self._all_error_types) >= ERROR_TYPES_PER_PROCESS
        if is_full or len(known) >= ERROR_TYPES_PER_TASK:
            self._fold(
                "error_type",
                f"{ERROR_TYPES_PER_TASK} exception classes per task and {ERROR_TYPES_PER_PROCESS} per process have a "
                "label of their own; do not create exception classes at run time",
            )
            return OTHER
        known.add(name)
        self._all_error_types.add(name)
        return name

    def _fold(self, label: str, advice: str) -> None:
        self._on_overflow(label)
        if label not in self._logged:
            self._logged.add(label)
            log("warning", "label.overflow", label=label, folded_into=OTHER, advice=advice)
