"""The runs of a worker: turns a message and a Celery task into a `TaskRun`, a `TaskInfo` and a policy."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import datetime

from celery import Task
from celery.app.task import Context
from celery.utils.serialization import UnpickleableExceptionWrapper

from .._core.background import Work
from .._core.emit import Emitter
from .._core.resolver import ResolvedTask, task_info
from .._core.run import Run
from .._text import stack, type_name
from ..errors import ProcessTaskError, UnknownMessage
from ..policies import Policy, PolicyBook
from ..signals.messaging import MessageInfo, received
from ..tasks import code_name, registered_tasks
from .header import NAME, Header, read

#: The engine of every run on a worker.
ENGINE = "celery"


async def _never() -> None:
    """A worker calls its functions itself."""


class Runs:
    """
    Makes the runs of one worker.

    Args:
        book: The policies, by task name.
        emit: Gets what becomes known of tasks; identifies the worker.
        system: The broker's name.
        executor: The worker's pool, such as `prefork`.
    """

    def __init__(self, book: PolicyBook, emit: Emitter, *, system: str, executor: str) -> None:
        self._book, self._emit, self._system, self._executor = book, emit, system, executor
        self._resolved: dict[str, ResolvedTask] = {}

    def resolve(self, task: Task) -> ResolvedTask:
        """A Celery task's policy in force: from `Settings.policies` or `@task`, and Celery's own time limit."""
        if task.name in self._resolved:
            return self._resolved[task.name]
        entry = next((entry for entry in registered_tasks() if entry.name == task.name), None)
        policy = self._book.policy(task.name, None, entry.policy if entry else Policy())
        policy = Policy(timeout=policy.timeout or task.soft_time_limit or task.time_limit).over(policy)
        code = entry.code if entry else code_name(task.run)
        # A worker knows its tasks by name, so they are few: each has a label of its own.
        name = policy.name or task.name
        info = task_info(name, code, self._executor, policy, registered=True, on_failure="contain", engine=ENGINE)
        if entry is None and task.max_retries not in (None, Task.max_retries):  # the default says nothing
            info = replace(info, max_attempts=1 + task.max_retries)
        is_observed = policy.observe is not False
        if is_observed:
            self._emit.task_known(info)
        found = self._resolved[task.name] = ResolvedTask(info, is_observed, policy.retry if entry else None)
        return found

    def run(self, task: Task, request: Context) -> Run | None:
        """The run of a message, of which `request` is Celery's own record; None if its task is not observed."""
        resolved = self.resolve(task)
        if not resolved.observe:
            return None
        try:
            head = read(request.get(NAME))
        except UnknownMessage:  # the process that executes it refuses it
            head = Header()
        delivery = request.delivery_info or {}
        message = MessageInfo()
        message.app, message.redact, message.thread = self._emit, self._emit.redact, threading.get_ident()
        message.http_route, message.http_method, message.request_id = head.http_route, head.http_method, head.request_id
        message.carrier, message.first = head.carrier or _other_tracers(request), head.first
        message.system, message.queue = self._system, delivery.get("routing_key") or delivery.get("exchange") or ""
        received(message)
        run = Run(resolved, message, Work(None, None, (), {}, False, _never))
        run.id, run.attempt = request.id, request.retries or 0
        if head.scheduled_at is not None:
            age_s = max(0.0, run.timestamp - head.scheduled_at)  # the sender's clock may be ahead
            run.timestamp = head.scheduled_at
            run.scheduled_s -= age_s
            run.queued_s = run.scheduled_s + max(0.0, _eta(request) - head.scheduled_at)
        run.observed_only = head.scheduled_at is None  # how long it has waited is unknown
        return run


def _eta(request: Context) -> float:
    """When a message may be executed at the earliest, in seconds since the Unix epoch; 0 if at once."""
    return datetime.fromisoformat(request.eta).timestamp() if isinstance(request.eta, str) else 0.0


def _other_tracers(request: Context) -> dict[str, str]:
    """The trace context that OpenTelemetry's own package puts next to Celery's headers."""
    names = ("traceparent", "tracestate")
    return {name: value for name in names if isinstance(value := request.get(name), str)}


def raised(request: Context, error: BaseException) -> BaseException:
    """The exception that a task raised, if Celery has replaced it because it cannot be pickled."""
    kept = request.get("raised")  # by a task of ours
    if isinstance(kept, BaseException):
        return kept
    if not isinstance(error, UnpickleableExceptionWrapper):
        return error
    name = f"{error.exc_module}.{error.exc_cls_name}"
    text = stack(error, str).replace(type_name(UnpickleableExceptionWrapper), name)
    return ProcessTaskError(str(error), type_name=name, type_names=(name,), stack=text)


def is_redelivered(request: Context) -> bool:
    """Whether the broker has delivered a message before."""
    return bool((request.delivery_info or {}).get("redelivered"))


def is_first(request: Context) -> bool:
    """Whether a message starts a run, rather than repeating or retrying one."""
    return not request.retries and not is_redelivered(request)
