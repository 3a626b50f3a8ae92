"""How a task is run and observed: `Policy`, `Retry`, `Limit`. Values and pure decisions, no I/O."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypedDict, get_args

from ._signatures import takes
from ._taskrun import TaskRun
from ._text import name_hint, number_hint, type_name
from .errors import ProcessTaskError

Trace = Literal["child", "link", "none"]
TRACES: tuple[str, ...] = get_args(Trace)
OnFailure = Literal["stop", "continue", "contain"]
ON_FAILURE: tuple[str, ...] = get_args(OnFailure)
#: Where a task runs, besides the engines of `Settings.engines`.
EXECUTORS = ("auto", "thread", "process")
Severity = Literal["info", "warning", "critical"]
SEVERITIES: tuple[str, ...] = get_args(Severity)
ExceptionClasses = tuple[type[Exception], ...] | type[Exception]

#: A run without a timeout is stuck after this many seconds; one with a timeout after twice its timeout.
STUCK_AFTER = 1800.0


def matches(error: BaseException, classes: tuple[type[Exception], ...]) -> bool:
    """Like `isinstance`, but also for an exception from a worker process that could not be rebuilt here."""
    if isinstance(error, ProcessTaskError):
        return any(type_name(kind) in error.type_names for kind in classes)
    return isinstance(error, classes)


#: What other libraries call an option, and how it is written here.
_SYNONYMS = dict.fromkeys(("retries", "max_retries", "attempts", "max_attempts"), "write retry=Retry(attempts=…)") | (
    dict.fromkeys(("concurrency", "max_concurrency", "workers"), "write limit=…, a number or a Limit")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """
    Retry a failed run with exponential back-off and full jitter.

    The wait before attempt n + 1 is uniform between 0 and `min(wait_max, wait_initial * 2 ** (n - 1))`.

    Args:
        attempts: Maximum number of calls, including the first; at least 1.
        wait_initial: Upper bound of the first wait, in seconds.
        wait_max: Upper bound of any wait, in seconds.
        on: Exception classes to retry; a timeout raises `TaskTimeout`.
        give_up_on: Exception classes not to retry, even if `on` has one of their base classes.

    Raises:
        TypeError, ValueError: A value is invalid.

    Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """

    attempts: int = 3
    wait_initial: float = 1.0
    wait_max: float = 30.0
    on: ExceptionClasses = Exception
    give_up_on: ExceptionClasses = ()

    def __new__(cls, *values: object, **named: object) -> Retry:
        """Refuse an unknown argument, with a hint."""
        if values:
            raise TypeError(f"Retry takes keywords only, got {values[0]!r}; write Retry(attempts={values[0]!r})")
        for name in named:
            if name not in cls.__dataclass_fields__:
                raise TypeError(f"unknown argument {name!r} of Retry; {name_hint(name, cls.__dataclass_fields__)}")
        return object.__new__(cls)

    def __post_init__(self) -> None:
        check_whole("Retry.attempts", self.attempts, least=1, hint="; 1 means no retry")
        check_seconds("Retry.wait_initial", self.wait_initial, zero=True)
        check_seconds("Retry.wait_max", self.wait_max, zero=True)
        for name in ("on", "give_up_on"):
            object.__setattr__(self, name, exception_classes(f"Retry.{name}", getattr(self, name)))

    def applies_to(self, error: BaseException) -> bool:
        """Whether this error is retried."""
        retried, given_up = exception_classes("on", self.on), exception_classes("give_up_on", self.give_up_on)
        return matches(error, retried) and not matches(error, given_up)

    def delay_s(self, attempt: int) -> float:
        """Seconds to wait after this attempt (from 1) failed."""
        # Beyond 2 ** 60 every upper bound is long reached, and the power must not overflow.
        return random.uniform(0.0, min(self.wait_max, self.wait_initial * 2.0 ** min(attempt - 1, 60)))


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Limit:
    """
    A maximum number of runs at the same time, for one task or for several that share this object.

    Waiting runs are ordered by priority, then by arrival. The limit holds within one process.

    Args:
        name: What it limits, such as `"smtp"`: the `limiter` label of its metrics.
        size: Maximum number of runs at the same time; at least 1.
        max_waiting: Maximum number of runs that may wait; one more raises `QueueFull`. None means
            `Settings.max_waiting`.

    Raises:
        TypeError, ValueError: A value is invalid.
    """

    name: str
    size: int
    max_waiting: int | None = None

    def __new__(cls, *values: object, **named: object) -> Limit:
        """Refuse anything but a name and a size, with a hint."""
        for name in named:
            if name not in cls.__dataclass_fields__:
                raise TypeError(f"unknown argument {name!r} of Limit; {name_hint(name, cls.__dataclass_fields__)}")
        given = {*("name", "size")[: len(values)], *named}
        if given and not given >= {"name", "size"}:  # none are given where one is copied
            raise TypeError(
                "Limit takes a name and a size: write Limit('smtp', 5); for one task alone limit=5 is enough"
            )
        return object.__new__(cls)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"Limit takes its name first, got {self.name!r}: write Limit('smtp', {self.name!r})")
        _check_text("Limit.name", self.name)
        check_whole("Limit.size", self.size, least=1)
        if self.max_waiting is not None:
            check_whole("Limit.max_waiting", self.max_waiting, least=0, hint="; None means Settings.max_waiting")


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """
    Options of one task. A field left at None inherits from the next outer scope.

    Args:
        name: The task's name in every signal; by default `module.qualname`.
        owner: Responsible team or person, shown with the task's metrics and alerts.
        observe: False: no run, no metric, no log line, as if the middleware were absent.
        expected: Exception classes that are a normal part of the task: such a run has failed, but is not bad.
        trace: `"child"` of the request's span, `"link"` (its own trace, linked to the request's), or `"none"`.
        timeout: Seconds per attempt, more than 0. An async attempt is cancelled; a sync one cannot be stopped and is
            abandoned: its thread continues.
        retry: When and how often a failed attempt is repeated.
        limit: Maximum number of runs of this task at the same time, or a `Limit` that several tasks share.
        priority: Smaller numbers run first, within a response and among the runs that wait for one limit; by default 0.
        on_failure: What a failure does to the later runs of the batch: `"stop"` (as in Starlette, they are skipped),
            `"continue"` (they run, then the error is raised), `"contain"` (they run, and nothing is raised).
        expires: Seconds after scheduling within which the run must start; after that it is no longer started.
        run_on_error: True: the task also runs, after the error response, if the handler that added it raised.
        idempotent: Whether a second execution does no harm, even at the same time. If so, an abandoned sync attempt is
            retried, and a durable run whose worker died during it runs again.
        durable: On disk before the response is sent; runs after the request, in another worker if this one dies.
        key: For `options` only: while a run with this key has not ended, a second one is rejected.
        keep_result: True: the function's return value is kept for `get_run`, as JSON of at most 16 384 bytes.
        executor: `"thread"`: in aftertask's own threads (an async function with its own event loop). `"process"`: in a
            worker process. `"auto"`: as in Starlette. Or the name of an engine in `Settings.engines`.
        on_error: Called with the run and the exception when the run has failed or timed out; may be async.
        alert: False: failures of this task are not alerted.
        severity: Severity of its alerts: `"info"`, `"warning"` or `"critical"`.
        alert_after: Number of bad runs before the first alert; by default 1.
        slow_after: Seconds after which a running attempt is reported as slow; by default never.
        stuck_after: Seconds after which a running attempt is reported as stuck; by default twice its `timeout`, or
            1800.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is invalid.
    """

    name: str | None = None
    owner: str | None = None
    observe: bool | None = None
    expected: ExceptionClasses | None = None
    trace: Trace | None = None
    timeout: float | None = None
    retry: Retry | None = None
    limit: int | Limit | None = None
    priority: int | None = None
    on_failure: OnFailure | None = None
    expires: float | None = None
    run_on_error: bool | None = None
    idempotent: bool | None = None
    durable: bool | None = None
    key: str | None = None
    keep_result: bool | None = None
    executor: str | None = None
    on_error: Callable[[TaskRun, Exception], object] | None = None
    alert: bool | None = None
    severity: Severity | None = None
    alert_after: int | None = None
    slow_after: float | None = None
    stuck_after: float | None = None

    def __new__(cls, *values: object, **named: object) -> Policy:
        """Refuse an unknown option, with a hint."""
        if values:
            raise TypeError(f"Policy takes keywords only, got {values[0]!r}; write Policy(timeout=…) and the like")
        known = cls.__dataclass_fields__
        for name in named:
            if name not in known:
                raise TypeError(f"unknown policy option {name!r}; {_SYNONYMS.get(name) or name_hint(name, known)}")
        return object.__new__(cls)

    def __post_init__(self) -> None:
        for field, value in self.chosen().items():
            _CHECKS[field](f"Policy.{field}", value)

    @property
    def expected_classes(self) -> tuple[type[Exception], ...]:
        """The expected exception classes as a tuple."""
        return () if self.expected is None else exception_classes("Policy.expected", self.expected)

    def chosen(self) -> dict[str, Any]:
        """The fields that are not None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def over(self, base: Policy) -> Policy:
        """This policy, with the fields of `base` where its own are None."""
        return replace(base, **self.chosen())


class PolicyOptions(TypedDict, total=False):
    """The keywords of `@task` and `options`: those of `Policy`."""

    name: str
    owner: str
    observe: bool
    expected: ExceptionClasses
    trace: Trace
    timeout: float
    retry: Retry
    limit: int | Limit
    priority: int
    on_failure: OnFailure
    expires: float
    run_on_error: bool
    idempotent: bool
    durable: bool
    key: str
    keep_result: bool
    executor: str
    on_error: Callable[[TaskRun, Exception], object]
    alert: bool
    severity: Severity
    alert_after: int
    slow_after: float
    stuck_after: float


class PolicyBook:
    """
    The policies of one app: `Settings.policies` by task name, over what `@task` declares.

    Args:
        policies: Task name or pattern (`mail.*`, as `fnmatch`) to policy.

    Attributes:
        named: The entries under the exact name of a task.
        patterns: The others, in order.
    """

    def __init__(self, policies: Mapping[str, Policy]) -> None:
        self.named = {name: policy for name, policy in policies.items() if not is_pattern(name)}
        self.patterns = [(name, policy) for name, policy in policies.items() if is_pattern(name)]

    def policy(self, task: str, call: Policy | None, declared: Policy | None) -> Policy:
        """One task's policy, field by field: `options()`, the exact name, patterns in order, `@task`."""
        chosen = declared or Policy()
        for pattern, policy in reversed(self.patterns):
            if fnmatch.fnmatchcase(task, pattern):
                chosen = policy.over(chosen)
        if task in self.named:
            chosen = self.named[task].over(chosen)
        return chosen if call is None else call.over(chosen)


def is_pattern(name: str) -> bool:
    """Whether a key of `Settings.policies` is a pattern rather than a name."""
    return any(char in name for char in "*?[")


def exception_classes(field: str, value: object) -> tuple[type[Exception], ...]:
    """
    Exception classes as a tuple.

    Raises:
        TypeError: The value is neither an exception class nor a tuple of them.
    """
    classes = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in classes):
        tuple_hint = "; write a tuple: (A, B)" if isinstance(value, (list, set, frozenset)) else ""
        raise TypeError(f"{field} must be an exception class or a tuple of them, got {value!r}{tuple_hint}")
    return classes


def _check_text(field: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        raise TypeError(f"{field} must be a non-empty string, got {value!r}")


def _check_flag(field: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{field} must be True, False or None, got {value!r}")


def check_seconds(field: str, value: object, *, zero: bool = False) -> None:
    """Require a finite number of seconds above 0, or with `zero` at least 0. Raises TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{field} must be a number of seconds, got {value!r}{number_hint(value)}")
    if not (value > 0 or (zero and value == 0)) or not math.isfinite(value):
        raise ValueError(f"{field} must be {'at least' if zero else 'more than'} 0 seconds, got {value!r}")


def check_whole(field: str, value: object, *, least: int | None = None, hint: str = "") -> None:
    """Require a whole number, at least `least`; `hint` ends the message. Raises TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{field} must be a whole number, got {value!r}{number_hint(value) or hint}")
    if least is not None and value < least:
        raise ValueError(f"{field} must be at least {least}, got {value!r}{hint}")


def one_of(allowed: tuple[str, ...], *, or_other: bool = False) -> Callable[[str, object], None]:
    """A check that a value is one of these, or with `or_other` any name that is not a likely misspelling of one."""

    def check(field: str, value: object) -> None:
        if value not in allowed:
            close = difflib.get_close_matches(str(value), allowed, 1, 0.75 if or_other else 0.6)
            if or_other and isinstance(value, str) and value and not close:
                return
            hint = f"; did you mean {close[0]!r}?" if close else ""
            known = ", ".join(map(repr, allowed)) + (", or the name of an engine" if or_other else "")
            raise ValueError(f"{field} must be one of {known}, got {value!r}{hint}")

    return check


def _check_retry(field: str, value: object) -> None:
    if not isinstance(value, Retry):
        attempts = value if type(value) is int else "…"
        raise TypeError(f"{field} must be a Retry, got {value!r}; write Retry(attempts={attempts})")


def _check_limit(field: str, value: object) -> None:
    if not isinstance(value, Limit):
        check_whole(field, value, least=1, hint="; or pass a Limit that several tasks share")


def _check_callback(field: str, value: object) -> None:
    if not callable(value):
        raise TypeError(f"{field} must be a function that takes the run and the exception, got {value!r}")
    if not takes(value, 2):
        name = getattr(value, "__qualname__", repr(value))
        raise TypeError(f"{field} is called with the run and the exception, but {name} does not take two arguments")


_CHECKS: dict[str, Callable[[str, object], object]] = {
    **dict.fromkeys(("name", "owner", "key"), _check_text),
    **dict.fromkeys(("observe", "run_on_error", "idempotent", "durable", "keep_result", "alert"), _check_flag),
    "expected": exception_classes,
    "trace": one_of(TRACES),
    "timeout": check_seconds,
    "retry": _check_retry,
    "limit": _check_limit,
    "priority": check_whole,
    "on_failure": one_of(ON_FAILURE),
    "expires": check_seconds,
    "executor": one_of(EXECUTORS, or_other=True),  # which engines there are is known when the app is built
    "on_error": _check_callback,
    "severity": one_of(SEVERITIES),
    "alert_after": functools.partial(check_whole, least=1),
    "slow_after": check_seconds,
    "stuck_after": check_seconds,
}
