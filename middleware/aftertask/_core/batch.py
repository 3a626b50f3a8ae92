"""The runs of one response: their order, and what a failure does to the others."""

from __future__ import annotations

import anyio

from .lifecycle import Lifecycle
from .loops import cancelled_from_outside
from .run import Run


class Batch:
    """
    The runs of one response while they run; the framework's own loop hands them over one by one.

    Args:
        lifecycle: Takes a run through its life.
        background: The background that carries the runs.

    Attributes:
        stopped_by: The run whose failure ended the batch; None if none has.
    """

    def __init__(self, lifecycle: Lifecycle, background: object) -> None:
        self.background = background
        self.stopped_by: Run | None = None
        self._lifecycle = lifecycle
        self._started = 0
        self._failures: list[tuple[int, Exception]] = []
        self._retries: list[tuple[int, Run, float]] = []

    async def run(self, run: Run) -> None:
        """
        Run the next one; an error is raised at once only if its `on_failure` is `stop`.

        Under `continue` and `contain` a retry does not hold the siblings up: it follows in `finish`.
        """
        self._started += 1
        place = self._started
        try:
            if run.info.on_failure == "stop" or run.observed_only:
                await self._lifecycle.live(run)
            else:
                delay_s = await self._lifecycle.attempt(run)
                if delay_s is not None:
                    self._retries.append((place, run, delay_s))
        except BaseException as error:
            if not self._contained(place, run, error):
                raise

    async def finish(self, error: BaseException | None) -> None:
        """
        Complete the retries, then raise what should leave the batch.

        Args:
            error: What left the loop over its runs; None if the loop completed.

        Raises:
            ExceptionGroup: Several runs failed; a single failure is raised as itself.
        """
        try:
            if self._retries:
                await self._retry(cancelled=error is not None and not isinstance(error, Exception))
            if isinstance(error, Exception):
                self._failures.append((self._started + 1, error))
            elif error is not None:
                raise error
            if self._failures:
                raise self._failure()
        finally:
            # The traceback holds this frame: it would be a reference cycle.
            self._failures, self._retries, error = [], [], None

    def _failure(self) -> Exception:
        """What the failures come out as: one as itself, several as a group, in the order of the runs."""
        failures = [failure for _, failure in sorted(self._failures, key=lambda kept: kept[0])]
        if len(failures) == 1:
            return failures[0]
        return ExceptionGroup(f"{len(failures)} of {self._started} background tasks failed", failures)

    async def _retry(self, *, cancelled: bool) -> None:
        """Take the runs that wait for another attempt to their outcomes, at the same time."""
        try:
            async with anyio.create_task_group() as group:
                for place, run, delay_s in self._retries:
                    group.start_soon(self._later_attempts, place, run, delay_s)
                if cancelled:
                    group.cancel_scope.cancel()
        except BaseExceptionGroup as several:
            raise _first(several) from None

    async def _later_attempts(self, place: int, run: Run, delay_s: float) -> None:
        await self._lifecycle.back_off(run, delay_s)
        try:
            await self._lifecycle.live(run)
        except BaseException as error:
            if not self._contained(place, run, error):
                raise

    def _contained(self, place: int, run: Run, error: BaseException) -> bool:
        """Whether the siblings go on: what a failure does is the failing run's own setting."""
        if run.outcome not in ("failed", "timed_out") or cancelled_from_outside(error):
            return False
        if run.observed_only:  # user code is the caller, and gets the error
            self.stopped_by = self.stopped_by or run
            return False
        if run.info.on_failure == "continue" and isinstance(error, Exception):
            self._failures.append((place, error))
            return True
        # A task's own CancelledError fails like any exception; SystemExit and its like are for the process.
        if run.info.on_failure == "contain" and isinstance(error, (Exception, anyio.get_cancelled_exc_class())):
            return True
        self.stopped_by = self.stopped_by or run
        return False


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found
