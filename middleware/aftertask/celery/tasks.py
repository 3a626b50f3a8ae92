"""Tasks of `@task(executor="celery")` on a worker: decoded, called, retried, and finally sent to the dead letters."""

from __future__ import annotations

import json
from asyncio import CancelledError
from collections.abc import Mapping

from billiard.common import terminate_handler_fired
from celery import Celery, Task
from celery.app.task import Context
from celery.canvas import Signature
from celery.exceptions import SoftTimeLimitExceeded

from .._core.emit import Emitter
from .._core.executors.own_loop import call_here
from .._core.run import Run
from .._encoding import DoesNotFit, decode
from .._taskrun import current_run
from .._text import error_type
from ..errors import TaskTimeout, UnknownMessage
from ..policies import EXECUTORS, Policy, PolicyBook, matches
from ..tasks import Registered, code_name, registered_tasks
from .engine import GRACE
from .header import NAME, read
from .letters import Letter
from .publishing import REDACTED


class Offloaded(Task):  # type: ignore[misc]  # Celery has no types
    """
    A function of `@task` as a Celery task.

    Args:
        entry: What `@task` registered.
        policy: The policy in force.
        emit: Counts errors of `on_error`.
    """

    abstract = True
    ignore_result = True
    serializer = "json"

    def __init__(self, entry: Registered, policy: Policy, emit: Emitter) -> None:
        self.name, self._function, self.policy, self._emit = entry.name, entry.function, policy, emit
        # A task that is not idempotent must not run twice, and is acknowledged before it starts.
        self.acks_late = self.reject_on_worker_lost = policy.idempotent is True
        # For a message without limits of its own, such as a replayed dead letter.
        self.soft_time_limit, self.time_limit = policy.timeout, policy.timeout and policy.timeout + GRACE

    def __call__(self, /, **encoded: object) -> object:
        """Celery's own could not pass on an argument named `self`."""
        return self.run(**encoded)

    def run(self, /, **encoded: object) -> object:
        """One attempt."""
        args, kwargs = self._arguments(encoded)
        try:
            return call_here(self._function, args, kwargs)
        except SoftTimeLimitExceeded as error:
            text = f"{self.name} did not finish within its timeout of {self.policy.timeout or 0:g} s"
            raised: Exception = TaskTimeout(text).with_traceback(error.__traceback__)
        except (SystemExit, KeyboardInterrupt, CancelledError) as error:
            if terminate_handler_fired():  # the worker ends this process
                raise
            self.request.raised = error
            # Celery would take the process for lost, and have an idempotent run exit again and again.
            raise RuntimeError(f"{self.name} raised {error_type(error)}") from error
        except Exception as error:
            raised = error
        self.request.raised = raised  # Celery replaces one that cannot be pickled
        retry, attempt = self.policy.retry, self.request.retries + 1
        if retry is not None and attempt < retry.attempts and retry.applies_to(raised):
            raise self.retry(exc=raised, countdown=retry.delay_s(attempt), max_retries=retry.attempts - 1)
        self._call_on_error(raised)
        raise raised

    def _arguments(self, encoded: Mapping[str, object]) -> tuple[tuple[object, ...], Mapping[str, object]]:
        read(self.request.get(NAME))
        try:
            return decode(self._function, json.dumps(encoded))
        except DoesNotFit as error:
            raise UnknownMessage(f"the arguments do not fit {self.name} of this worker: {error}") from None

    def _call_on_error(self, error: Exception) -> None:
        run, callback = current_run(), self.policy.on_error
        if callback is not None and run is not None:
            try:
                call_here(callback, (run, error), {})
            except Exception as broken:
                self._emit.broken(code_name(callback), "on_error", broken)

    def signature_from_request(self, *args: object, **options: object) -> Signature:
        """A retry; Celery itself would show the arguments again, and let a run expire that has started in time."""
        return super().signature_from_request(*args, **options, **REDACTED, expires=None)

    def dead_letter(self, run: Run, request: Context, error: BaseException) -> Letter | None:
        """The letter of a run that ended for good; an expected failure has none."""
        if matches(error, self.policy.expected_classes):
            return None
        reason = "interrupted" if run.outcome in ("lost", "cancelled") else str(run.outcome)
        if isinstance(error, UnknownMessage):
            reason = "unknown_message"
        message = (self.name, run.id, request.args, request.kwargs, request.get(NAME))
        return Letter(*message, run.info.task, reason, error_type(error))


def register(app: Celery, book: PolicyBook, emit: Emitter) -> None:
    """Make every `@task` function whose executor is an engine a task of this worker."""
    for entry in registered_tasks():
        policy = book.policy(entry.name, None, entry.policy)
        if policy.executor not in (None, *EXECUTORS) and entry.name not in app.tasks:
            app.register_task(Offloaded(entry, policy, emit))
