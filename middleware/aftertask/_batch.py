"""What the runs of one response do to each other where a failure does not simply end them all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
from anyio.abc import TaskGroup

Rest = Callable[[], Coroutine[Any, Any, None]]


class Batch:
    """
    The runs of one response, while they run.

    Attributes:
        id: The identity of the background that they belong to.
        open: Whether there is something to wait for, or to raise, when the last one has been started.
    """

    __slots__ = ("_failures", "_group", "_started", "id", "open")

    def __init__(self, id: int) -> None:
        self.id = id
        self.open = False
        self._started = 0
        self._failures: list[tuple[int, Exception]] = []
        self._group: TaskGroup | None = None

    def keep(self) -> Callable[[Exception], None]:
        """For a run that starts now: what keeps its failure back until the others have run."""
        self._started += 1
        return functools.partial(self._keep, self._started)

    def _keep(self, order: int, error: Exception) -> None:
        self.open = True
        self._failures.append((order, error))

    async def spawn(self, rest: Rest) -> None:
        """Have the rest of a run go on beside its siblings."""
        if self._group is None:
            # Entered here and left in `finish`: both are called by the task that runs the batch, one after the other.
            self._group = anyio.create_task_group()
            await self._group.__aenter__()
            self.open = True
        self._group.start_soon(rest)

    async def finish(self, total: int, error: BaseException | None) -> None:
        """
        Wait for what goes on, then raise what is to come out.

        Args:
            total: How many runs the batch has.
            error: What came out of the loop over its runs; None where that came to its end.
        """
        self.open = False
        if self._group is not None:
            group, self._group = self._group, None
            if error is not None and not isinstance(error, Exception):
                group.cancel_scope.cancel()
            try:
                await group.__aexit__(None, None, None)
            except BaseExceptionGroup as several:
                error = _first(several)  # nothing but what ends the batch comes out of a run that goes on
        if isinstance(error, Exception):
            self._failures.append((self._started + 1, error))
        elif error is not None:
            raise error
        errors = [failure for _, failure in sorted(self._failures, key=lambda kept: kept[0])]
        self._failures = []
        try:
            if len(errors) > 1:
                raise ExceptionGroup(f"{len(errors)} of {total} background tasks failed", errors)
            if errors:
                raise errors[0]
        finally:
            del errors, error  # their tracebacks hold this frame: there would be a cycle


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found
