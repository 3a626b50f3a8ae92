"""Function → name and policy in force, cached."""

from __future__ import annotations

import difflib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

from .._log import log
from .._taskrun import LOCAL, TaskInfo, TaskRun
from .._text import is_library
from ..engines import Engine
from ..errors import UnknownExecutor
from ..policies import EXECUTORS, STUCK_AFTER, Limit, Policy, PolicyBook, Retry
from ..tasks import attribute, code_name, executor_of, hidden_task, is_async, registered_tasks, registration, unwrap
from .emit import Emitter
from .executors.engine import Remote
from .limits import Limiter
from .process import on_fork

_WRAPPED = (
    "this is a function inside of a library's: if it wraps one of yours, that one's name and @task are not found, and "
    "a policy has to be set in Settings.policies under this name"
)

#: What a decorator without `functools.wraps` does to the task below it, and the remedy.
HIDDEN = "calls {}, whose @task has no effect here, because a decorator above it hides it"
UNHIDE = "use functools.wraps in that decorator, or put @task above it"

#: At most this many names are cached: functions may be made on the fly.
_CACHED = 2000


def is_opaque(func: object) -> bool:
    """Whether this is a function inside of a library's, which may wrap and hide one of the user's."""
    if type(func) is not FunctionType or attribute(func, "__wrapped__") is not None:
        return False
    return "<locals>" in func.__qualname__ and is_library(func.__code__)


def _look_for_wrapper(func: object, name: str) -> None:
    """Log that a function seems to wrap another, whose `@task` is not found."""
    hidden = hidden_task(func)
    if hidden is not None:
        log("warning", "task.hidden", task=name, advice=f"it {HIDDEN.format(hidden)}: {UNHIDE}")
    elif is_opaque(func):
        log("info", "task.wrapped", task=name, advice=_WRAPPED)


@dataclass(frozen=True, slots=True, eq=False)
class ResolvedTask:
    """
    A task's policy in force: what signals may know of it (`info`), and what the core acts on.

    Attributes:
        info: What is known of the task.
        observe: False: the task is left alone.
        retry: None means one attempt.
        limiter: None means no limit.
        max_waiting: Accepted runs beyond the limit; None means any number.
        expires: Seconds from scheduling within which the run must start; None means no deadline.
        run_on_error: Whether it runs after the error response if its handler raised.
        own_thread: Whether its thread is one of aftertask's own.
        keeps_thread: Whether a shared thread may be left behind with something that it holds until it ends.
        on_error: Called with the run and the exception when the run has failed or timed out; None if not set.
        remote: The engine that its runs are handed to; None if they execute here.
    """

    info: TaskInfo
    observe: bool
    retry: Retry | None = None
    limiter: Limiter | None = None
    max_waiting: int | None = None
    expires: float | None = None
    run_on_error: bool = False
    own_thread: bool = False
    keeps_thread: bool = False
    on_error: Callable[[TaskRun, Exception], object] | None = None
    remote: Remote | None = None

    @property
    def waits(self) -> bool:
        """Whether an attempt may have to wait for something, or may start too late."""
        return self.own_thread or self.keeps_thread or self.expires is not None


def task_info(
    task: str, code: str, executor: str, policy: Policy, *, registered: bool, on_failure: str, engine: str = LOCAL
) -> TaskInfo:
    """What signals may know of a task: its policy in force, with the defaults filled in."""
    return TaskInfo(
        task=task,
        code=code,
        registered=registered,
        engine=engine,
        executor=executor,
        shares_threads=executor == "thread" and policy.executor != "thread",
        owner=policy.owner,
        expected=policy.expected_classes,
        trace=policy.trace,
        timeout=policy.timeout,
        max_attempts=1 if policy.retry is None else policy.retry.attempts,
        on_failure=policy.on_failure or on_failure,
        priority=policy.priority or 0,
        alert=policy.alert is not False,
        severity=policy.severity,
        alert_after=policy.alert_after or 1,
        slow_after=policy.slow_after,
        stuck_after=policy.stuck_after or (2 * policy.timeout if policy.timeout else STUCK_AFTER),
        durable=policy.durable is True,
        idempotent=policy.idempotent is True,
        keep_result=policy.keep_result is True,
    )


class Resolver:
    """
    The policies of one app's tasks.

    Args:
        policies: Task name or pattern to policy, as `Settings.policies`.
        on_failure: `Settings.on_failure`.
        max_waiting: `Settings.max_waiting`.
        thread_limit: `Settings.thread_limit`.
        engines: `Settings.engines`.
        emitter: Learns of every task and every limiter.

    Raises:
        UnknownExecutor: A task has an executor that is none of ours and no engine.
    """

    def __init__(
        self,
        policies: Mapping[str, Policy],
        *,
        on_failure: str,
        max_waiting: int | None,
        thread_limit: int,
        engines: Mapping[str, Engine],
        emitter: Emitter,
    ) -> None:
        self.threads = Limiter("aftertask", thread_limit)
        self._book = PolicyBook(policies)
        self._on_failure, self._max_waiting, self._emitter = on_failure, max_waiting, emitter
        self._limiters: dict[str, Limiter] = {}
        self._remotes = {name: Remote(name, engine) for name, engine in engines.items()}
        for name in engines:
            emitter.engine_known(name)
        self._by_name: dict[object, ResolvedTask] = {}
        self._by_function: weakref.WeakKeyDictionary[FunctionType, ResolvedTask] = weakref.WeakKeyDictionary()
        # Two sync endpoints may schedule a task's first run at the same time: they must get one limiter.
        self._lock = threading.RLock()
        on_fork(self)
        for task, policy in self._known_policies():
            self._check_executor(task, policy)
            if policy.limit is not None:
                self._limiter(policy.limit, task)
        for entry in registered_tasks():
            policy = self._book.policy(entry.name, None, entry.policy)
            emitter.task_known(self._info(policy.name or entry.name, entry.code, entry.executor, policy, True))

    def after_fork(self) -> None:
        """Resolve anew in a child process: what was emitted about tasks was the parent's."""
        self._lock = threading.RLock()
        self._by_name.clear()
        self._by_function = weakref.WeakKeyDictionary()

    def log_policies(self) -> None:
        """Log the policies in force, if there are any."""
        chosen = {task: plain for task, policy in self._known_policies() if (plain := _plain_policy(policy))}
        patterns = {pattern: _plain_policy(policy) for pattern, policy in self._book.patterns}
        if chosen or patterns or self._on_failure != "stop":
            log(
                "info",
                "lifecycle.policies",
                on_failure=self._on_failure,
                policies=chosen,
                patterns=patterns or None,
            )

    def resolve(self, func: Any, *, whole: bool = False) -> ResolvedTask:
        """
        The policy in force for a function, with the name of its task.

        Args:
            func: What the user gave to `add_task`, or a user's container class or other awaitable callable.
            whole: Whether it is such a container or callable: it always runs on the event loop, once.
        """
        if type(func) is not FunctionType or whole:
            return self._resolve(func, whole)
        resolved = self._by_function.get(func)
        if resolved is None:
            resolved = self._by_function[func] = self._resolve(func, whole)
        return resolved

    def _resolve(self, func: Any, whole: bool) -> ResolvedTask:
        inner, call_policy = unwrap(func)
        if call_policy is not None and call_policy.key is not None:  # of this call only: it would fill the cache
            call_policy = replace(call_policy, key=None)
        entry, code = registration(inner), code_name(inner)
        key = code, entry, call_policy, whole, is_async(func)
        with self._lock:
            resolved = self._by_name.get(key)
            if resolved is None:
                if len(self._by_name) >= _CACHED:
                    self._by_name.clear()
                name = code if entry is None else entry.name
                policy = self._book.policy(name, call_policy, None if entry is None else entry.policy)
                registered = entry is not None or name in self._book.named
                if entry is None:
                    _look_for_wrapper(inner, name)
                self._check_executor(name, policy)
                executor = "inline" if whole else executor_of(func, policy)
                info = self._info(policy.name or name, code, executor, policy, registered)
                resolved = self._by_name[key] = self._make(info, policy, whole)
        return resolved

    def _make(self, info: TaskInfo, policy: Policy, whole: bool) -> ResolvedTask:
        own_thread = info.executor == "thread" and not info.shares_threads
        if own_thread:
            self._emitter.pool_known(self.threads, threads=True)
        if policy.observe is not False:
            self._emitter.task_known(info)
        limit = policy.limit
        own_max_waiting = limit.max_waiting if isinstance(limit, Limit) else None
        return ResolvedTask(
            info=info,
            observe=policy.observe is not False,
            retry=None if whole else policy.retry,
            limiter=None if limit is None else self._limiter(limit, info.task),
            max_waiting=self._max_waiting if own_max_waiting is None else own_max_waiting,
            expires=policy.expires,
            run_on_error=policy.run_on_error is True,
            own_thread=own_thread,
            keeps_thread=info.shares_threads and (policy.timeout is not None or limit is not None),
            on_error=policy.on_error,
            remote=None if whole else self._remotes.get(policy.executor or ""),
        )

    def _info(self, task: str, code: str, executor: str, policy: Policy, registered: bool) -> TaskInfo:
        return task_info(task, code, executor, policy, registered=registered, on_failure=self._on_failure)

    def _check_executor(self, task: str, policy: Policy) -> None:
        name = policy.executor
        if name is None or name in EXECUTORS or name in self._remotes:
            return
        close = difflib.get_close_matches(name, [*EXECUTORS, *self._remotes], 1)
        hint = f"did you mean {close[0]!r}?" if close else f"add Settings(engines={{{name!r}: …}})"
        raise UnknownExecutor(f"task {task} has executor={name!r}, which is neither an executor nor an engine; {hint}")

    def waiting_tasks(self) -> list[str]:
        """Tasks whose engine has just failed to take a run: durable runs of theirs wait."""
        if all(remote.is_open for remote in self._remotes.values()):
            return []
        known = list(self._by_name.values())
        return [each.info.task for each in known if each.remote is not None and not each.remote.is_open]

    def _known_policies(self) -> Iterator[tuple[str, Policy]]:
        """Every task with a known name, with its policy."""
        declared = {entry.name: entry.policy for entry in registered_tasks()}
        for task in sorted({*declared, *self._book.named}):
            yield task, self._book.policy(task, None, declared.get(task))

    def _limiter(self, limit: int | Limit, task: str) -> Limiter:
        """A number's limiter belongs to this app's task, that of a `Limit` to all tasks that share it."""
        if isinstance(limit, Limit):
            limiter = _shared_limiters.of(limit)
        else:
            limiter = self._own_limiter(task, limit)
            if limiter.size != limit:  # options(limit=…) gives another number: it gets a limiter of its own
                limiter = self._own_limiter(f"{task}:{limit}", limit)
        self._emitter.pool_known(limiter, threads=False)
        return limiter

    def _own_limiter(self, name: str, size: int) -> Limiter:
        return self._limiters.setdefault(name, Limiter(name, size))


class _SharedLimiters:
    """The limiters of `Limit` objects, which several tasks and apps of the process share."""

    def __init__(self) -> None:
        self._limiters: weakref.WeakKeyDictionary[Limit, Limiter] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def of(self, limit: Limit) -> Limiter:
        with self._lock:
            limiter = self._limiters.get(limit)
            if limiter is None:
                limiter = self._limiters[limit] = Limiter(limit.name, limit.size)
            return limiter

    def after_fork(self) -> None:
        self._lock = threading.Lock()


_shared_limiters = _SharedLimiters()


def _plain_policy(policy: Policy) -> dict[str, Any]:
    """The chosen fields as plain values for a log line."""
    return {name: _plain(value) for name, value in policy.chosen().items() if name not in ("name", "owner")}


def _plain(value: Any) -> Any:
    match value:
        case Retry():
            fields = ("attempts", "wait_initial", "wait_max", "on", "give_up_on")
            return {name: _plain(getattr(value, name)) for name in fields}
        case Limit():
            return {"name": value.name, "size": value.size, "max_waiting": value.max_waiting}
        case tuple():
            return [_plain(each) for each in value]
        case type() if value.__module__ == "builtins":
            return value.__name__
    return code_name(value) if callable(value) else value
