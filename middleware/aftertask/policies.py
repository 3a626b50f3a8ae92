"""How a task is run and observed: `Policy`, `Retry`, `Limit`. Values and pure decisions, no I/O."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypedDict, get_args

from ._taskrun import TaskRun
from ._text import number_hint, type_name
from .errors import ProcessTaskError

Trace = Literal["child", "link", "none"]
TRACES: tuple[str, ...] = get_args(Trace)
OnFailure = Literal["stop", "continue", "contain"]
ON_FAILURE: tuple[str, ...] = get_args(OnFailure)
Executor = Literal["auto", "thread", "process"]
EXECUTORS: tuple[str, ...] = get_args(Executor)
Severity = Literal["info", "warning", "critical"]
SEVERITIES: tuple[str, ...] = get_args(Severity)
ExceptionClasses = tuple[type[Exception], ...] | type[Exception]

#: A run without a timeout is stuck after this many seconds; one with a timeout after twice its timeout.
STUCK_AFTER = 1800.0


def matches(error: BaseException, classes: tuple[type[Exception], ...]) -> bool:
    """`isinstance`, also for an exception of a worker process that could not be rebuilt here."""
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
        on: Exception classes that are retried; a timeout raises `TaskTimeout`.
        give_up_on: Exception classes that are not retried, even if `on` names one of their bases.

    Raises:
        TypeError, ValueError: A value is not allowed.

    Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """

    attempts: int = 3
    wait_initial: float = 1.0
    wait_max: float = 30.0
    on: ExceptionClasses = Exception
    give_up_on: ExceptionClasses = ()

    def __new__(cls, *values: object, **named: object) -> Retry:
        """Refuse what it does not take, with a hint."""
        if values:
            raise TypeError(f"Retry takes keywords only, got {values[0]!r}; write Retry(attempts={values[0]!r})")
        for name in named:
            if name not in cls.__dataclass_fields__:
                raise TypeError(f"unknown argument {name!r} of Retry; {_hint(name, cls.__dataclass_fields__)}")
        return object.__new__(cls)

    def __post_init__(self) -> None:
        _check_whole("Retry.attempts", self.attempts, least=1, hint="; 1 means no retry")
        _check_seconds("Retry.wait_initial", self.wait_initial, zero=True)
        _check_seconds("Retry.wait_max", self.wait_max, zero=True)
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

    Runs wait in the order of their priority, then of their arrival. The limit holds within one process.

    Args:
        name: What it limits, such as `"smtp"`: the `limiter` label of its metrics.
        size: Maximum number of runs at the same time; at least 1.
        max_waiting: Maximum number of accepted runs beyond those that may run; one more raises `QueueFull`.
            None means `Settings.max_waiting`.

    Raises:
        TypeError, ValueError: A value is not allowed.
    """

    name: str
    size: int
    max_waiting: int | None = None

    def __new__(cls, *values: object, **named: object) -> Limit:
        """Refuse what is no name and size, with a hint."""
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
        _check_whole("Limit.size", self.size, least=1)
        if self.max_waiting is not None:
            _check_whole("Limit.max_waiting", self.max_waiting, least=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """
    Options of one task. A field left at None inherits from the next outer scope.

    Args:
        name: The task's name in every signal; by default `module.qualname`.
        owner: Responsible team or person, shown with the task's metrics and alerts.
        observe: False: no run, no metric, no log line, as if the middleware were absent.
        expected: Exception classes that are a normal part of the task: its run is failed, but not bad.
        trace: `"child"` of the request's span, `"link"` (its own trace, linked to the request's), or `"none"`.
        timeout: Seconds per attempt, more than 0. An async attempt is cancelled; a sync one cannot be stopped and is
            abandoned: its thread continues.
        retry: When and how often a failed attempt is followed by another.
        limit: Maximum number of runs of this task at the same time, or a `Limit` that several tasks share.
        priority: Smaller runs first, within a response and among the runs that wait for one limit; by default 0.
        on_failure: What a failure does to the later runs of the batch: `"stop"` (as Starlette: they are skipped),
            `"continue"` (they run, then the error is raised), `"contain"` (they run, and nothing is raised).
        expires: Seconds after scheduling within which the run must start; afterwards it is not started.
        run_on_error: Run the task, after the error response, also if the handler that added it raised.
        idempotent: Whether two executions at the same time do no harm: an abandoned sync attempt may then be retried.
        executor: `"thread"`: in aftertask's own threads (an async function with its own event loop). `"process"`: in a
            worker process. `"auto"`: as Starlette does.
        on_error: Called with the run and the exception when the run has failed or timed out; may be async.
        alert: False: failures of this task are not alerted.
        severity: Severity of its alerts: `"info"`, `"warning"` or `"critical"`.
        alert_after: Number of bad runs before the first alert; by default 1.
        slow_after: Seconds after which a running attempt is reported as slow; by default never.
        stuck_after: Seconds after which a running attempt is reported as stuck; by default twice its `timeout`, or
            1800.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is not allowed.
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
    executor: Executor | None = None
    on_error: Callable[[TaskRun, Exception], object] | None = None
    alert: bool | None = None
    severity: Severity | None = None
    alert_after: int | None = None
    slow_after: float | None = None
    stuck_after: float | None = None

    def __new__(cls, *values: object, **named: object) -> Policy:
        """Refuse what is no option, with a hint."""
        if values:
            raise TypeError(f"Policy takes keywords only, got {values[0]!r}; write Policy(timeout=…) and the like")
        _refuse_unknown(named)
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
        """This policy, completed by `base` where a field is None."""
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
    executor: Executor
    on_error: Callable[[TaskRun, Exception], object]
    alert: bool
    severity: Severity
    alert_after: int
    slow_after: float
    stuck_after: float


def policy_from(keywords: Mapping[str, Any]) -> Policy:
    """
    A policy from the keywords of `@task` or `options`.

    Raises:
        TypeError: A keyword is unknown; the message suggests the closest one.
    """
    _refuse_unknown(keywords)
    return Policy(**keywords)


def _refuse_unknown(named: Mapping[str, object]) -> None:
    for name in named:
        if name not in PolicyOptions.__annotations__:
            raise TypeError(
                f"unknown policy option {name!r}; {_SYNONYMS.get(name) or _hint(name, PolicyOptions.__annotations__)}"
            )


def _hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}"


class PolicyBook:
    """
    The policies of one app: `Settings.policies` by task name, over what `@task` declares.

    Args:
        policies: Task name or pattern (`mail.*`, as `fnmatch`) to policy.
    """

    def __init__(self, policies: Mapping[str, Policy]) -> None:
        self._exact = {name: policy for name, policy in policies.items() if not is_pattern(name)}
        self.patterns = [(name, policy) for name, policy in policies.items() if is_pattern(name)]

    @property
    def named(self) -> list[str]:
        """The tasks with an entry under their exact name."""
        return list(self._exact)

    def names(self, task: str) -> bool:
        """Whether a task has an entry under its exact name."""
        return task in self._exact

    def policy(self, task: str, call: Policy | None, declared: Policy | None) -> Policy:
        """One task's policy, field by field: `options()`, the exact name, patterns in order, `@task`."""
        chosen = declared or Policy()
        for pattern, policy in reversed(self.patterns):
            if fnmatch.fnmatchcase(task, pattern):
                chosen = policy.over(chosen)
        if task in self._exact:
            chosen = self._exact[task].over(chosen)
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


def _check_seconds(field: str, value: object, *, zero: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{field} must be a number of seconds, got {value!r}{number_hint(value)}")
    if not (value > 0 or (zero and value == 0)) or not math.isfinite(value):
        raise ValueError(f"{field} must be {'at least' if zero else 'more than'} 0 seconds, got {value!r}")


def _check_whole(field: str, value: object, *, least: int | None = None, hint: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{field} must be a whole number, got {value!r}{number_hint(value) or hint}")
    if least is not None and value < least:
        raise ValueError(f"{field} must be at least {least}, got {value!r}{hint}")


def _check_one_of(allowed: tuple[str, ...]) -> Callable[[str, object], None]:
    def check(field: str, value: object) -> None:
        if value not in allowed:
            close = difflib.get_close_matches(str(value), allowed, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{field} must be one of {', '.join(map(repr, allowed))}, got {value!r}{hint}")

    return check


def _check_retry(field: str, value: object) -> None:
    if not isinstance(value, Retry):
        attempts = value if isinstance(value, int) else "…"
        raise TypeError(f"{field} must be a Retry, got {value!r}; write Retry(attempts={attempts})")


def _check_limit(field: str, value: object) -> None:
    if not isinstance(value, Limit):
        _check_whole(field, value, least=1, hint="; or pass a Limit that several tasks share")


def _check_callback(field: str, value: object) -> None:
    if not callable(value):
        raise TypeError(f"{field} must be a function that takes the run and the exception, got {value!r}")


_CHECKS: dict[str, Callable[[str, object], object]] = {
    "name": _check_text,
    "owner": _check_text,
    "observe": _check_flag,
    "expected": exception_classes,
    "trace": _check_one_of(TRACES),
    "timeout": _check_seconds,
    "retry": _check_retry,
    "limit": _check_limit,
    "priority": _check_whole,
    "on_failure": _check_one_of(ON_FAILURE),
    "expires": _check_seconds,
    "run_on_error": _check_flag,
    "idempotent": _check_flag,
    "executor": _check_one_of(EXECUTORS),
    "on_error": _check_callback,
    "alert": _check_flag,
    "severity": _check_one_of(SEVERITIES),
    "alert_after": functools.partial(_check_whole, least=1),
    "slow_after": _check_seconds,
    "stuck_after": _check_seconds,
}
