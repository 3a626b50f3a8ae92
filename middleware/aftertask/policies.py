"""How a task is run and observed, as its owner says: `@task`, `options`, `Policy`. Pure decisions, no I/O."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import inspect
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypedDict, TypeVar, Unpack, overload

from .errors import NameClash

if TYPE_CHECKING:
    from .events import TaskRun

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])

Trace = Literal["child", "link", "none"]
TRACES = ("child", "link", "none")
OnFailure = Literal["stop", "continue", "contain"]
ON_FAILURE = ("stop", "continue", "contain")
Executor = Literal["auto", "thread", "process"]
EXECUTORS = ("auto", "thread", "process")
Severity = Literal["info", "warning", "critical"]
SEVERITIES = ("info", "warning", "critical")
ExceptionClasses = tuple[type[Exception], ...] | type[Exception]

#: A run without a time limit is stuck when it has been running for so many seconds; one with, after twice its limit.
STUCK_AFTER = 1800.0

_ATTRIBUTE = "__aftertask__"


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """
    Try a failed run again, after waits that grow and are spread by full jitter.

    The wait before attempt n + 1 is drawn evenly from 0 to `min(wait_max, wait_initial * 2 ** (n - 1))`.

    Args:
        attempts: Calls in total, the first included; at least 1.
        wait_initial: Upper end of the first wait, in seconds.
        wait_max: Longest wait before an attempt, in seconds.
        on: Exception classes worth another attempt; a time limit raises `TaskTimeout`.
        give_up_on: Exception classes that are not, though `on` names a base of theirs.

    Raises:
        TypeError, ValueError: A value is not one of those allowed.

    Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """

    attempts: int = 3
    wait_initial: float = 1.0
    wait_max: float = 30.0
    on: ExceptionClasses = Exception
    give_up_on: ExceptionClasses = ()

    def __post_init__(self) -> None:
        _whole("Retry.attempts", self.attempts, least=1, hint="; 1 means no retry")
        _seconds("Retry.wait_initial", self.wait_initial, zero=True)
        _seconds("Retry.wait_max", self.wait_max, zero=True)
        for name in ("on", "give_up_on"):
            object.__setattr__(self, name, _classes(f"Retry.{name}", getattr(self, name)))

    def wants(self, error: Exception) -> bool:
        """Whether this error is worth another attempt."""
        return isinstance(error, self.on) and not isinstance(error, self.give_up_on)

    def delay_s(self, attempt: int) -> float:
        """Seconds to wait after this attempt (from 1) has failed, before the next."""
        # Beyond 2 ** 60 every limit is long reached, and the power must not overflow.
        return random.uniform(0.0, min(self.wait_max, self.wait_initial * 2.0 ** min(attempt - 1, 60)))


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Limit:
    """
    At most so many runs at once, of one task or of several that share this object.

    Fair: runs wait in the order of their priority, and among equals in the order in which they came. It holds for one
    process.

    Args:
        name: What it limits, such as `"smtp"`: the `limiter` label of its metrics.
        size: Runs at once; at least 1.
        max_waiting: Runs accepted beyond those that may run at once; one more is refused with `QueueFull`.
            None: as `Settings.max_waiting` says.

    Raises:
        TypeError, ValueError: A value is not one of those allowed.
    """

    name: str
    size: int
    max_waiting: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise TypeError(f"Limit.name must be a non-empty string, got {self.name!r}")
        _whole("Limit.size", self.size, least=1)
        if self.max_waiting is not None:
            _whole("Limit.max_waiting", self.max_waiting, least=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """
    What its owner asks for a task. None, everywhere: not said, so what is said further out holds.

    Args:
        name: The task's name in every signal; by default `module.qualname`.
        owner: A team or person, shown with the task's metrics.
        observe: False: as if the task were not there; no run, no metric, no log line.
        expected: Exception classes that are part of the task's life: its run is failed, but not bad.
        trace: `"child"` of the request's span, `"link"` (a trace of its own, linked to the request's), or `"none"`.
        timeout: Seconds for each attempt, more than 0. An async one is cancelled then; a sync one cannot be, and is
            abandoned: its thread goes on.
        retry: When and how often a failed attempt is followed by another.
        limit: Runs of this task at once; or a `Limit` that several tasks share.
        priority: Smaller goes first, within a response and among the runs that wait for the same limit; else 0.
        on_failure: What a failure does to the rest of the batch: `"stop"` (as Starlette: later tasks are skipped),
            `"continue"` (they run, then it is raised), `"contain"` (they run, nothing is raised).
        expires: A run that could not start within so many seconds after it was scheduled is not started any more.
        run_on_error: Run it, after the error response, also where the handler that added it raised.
        idempotent: Whether running it twice at once does no harm: then an abandoned sync attempt may be tried again.
        executor: `"thread"`: in aftertask's own threads, not those of sync endpoints, an async function with an event
            loop of its own. `"process"`: in a worker process. `"auto"`: as Starlette does.
        on_error: Called with the run and the exception when the run has failed or timed out; may be async.
        alert: False: no alert tells of this task.
        severity: Of its alerts: `"info"`, `"warning"` or `"critical"`.
        alert_after: Bad runs before the first alert; else 1.
        slow_after: Seconds after which a running attempt is told as slow; else never.
        stuck_after: Seconds after which a running attempt is told as stuck; else twice its `timeout`, or 1800.

    Raises:
        TypeError: A value is of the wrong type.
        ValueError: A value is none of those allowed.
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

    def __post_init__(self) -> None:
        for field, value in self.said().items():
            _CHECKS[field](f"Policy.{field}", value)

    @property
    def classes(self) -> tuple[type[Exception], ...]:
        """The expected exception classes, as `except` wants them."""
        return () if self.expected is None else _classes("Policy.expected", self.expected)

    def said(self) -> dict[str, Any]:
        """The fields that say something."""
        said = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in said.items() if value is not None}

    def told(self) -> dict[str, Any]:
        """The fields that say something, as plain values for a log line."""
        return {name: _plainly(value) for name, value in self.said().items() if name not in ("name", "owner")}

    def over(self, base: Policy) -> Policy:
        """This policy, and `base` wherever this one says nothing."""
        return replace(base, **self.said())


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


def _plainly(value: Any) -> Any:
    """A field's value as something that every log can show."""
    if isinstance(value, Retry):
        return {
            "attempts": value.attempts,
            "wait_initial": value.wait_initial,
            "wait_max": value.wait_max,
            "on": _plainly(value.on),
            "give_up_on": _plainly(value.give_up_on),
        }
    if isinstance(value, Limit):
        return {"name": value.name, "size": value.size, "max_waiting": value.max_waiting}
    if isinstance(value, tuple):
        return [_plainly(each) for each in value]
    if isinstance(value, type) and value.__module__ == "builtins":
        return value.__name__
    return code_name(value) if callable(value) else value


def _text(field: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        raise TypeError(f"{field} must be a non-empty string or None, got {value!r}")


def _flag(field: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{field} must be True, False or None, got {value!r}")


def _seconds(field: str, value: object, *, zero: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{field} must be a number of seconds, got {value!r}")
    if not (value > 0 or (zero and value == 0)) or not math.isfinite(value):
        raise ValueError(f"{field} must be {'at least' if zero else 'more than'} 0 seconds, got {value!r}")


def _whole(field: str, value: object, *, least: int | None = None, hint: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{field} must be a whole number, got {value!r}{hint}")
    if least is not None and value < least:
        raise ValueError(f"{field} must be at least {least}, got {value!r}{hint}")


def _one_of(allowed: tuple[str, ...]) -> Callable[[str, object], None]:
    def check(field: str, value: object) -> None:
        if value not in allowed:
            close = difflib.get_close_matches(str(value), allowed, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{field} must be one of {', '.join(map(repr, allowed))}, got {value!r}{hint}")

    return check


def _classes(field: str, value: object) -> tuple[type[Exception], ...]:
    classes = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in classes):
        raise TypeError(f"{field} must be exception classes, got {value!r}")
    return classes


def _retry(field: str, value: object) -> None:
    if not isinstance(value, Retry):
        raise TypeError(f"{field} must be a Retry, got {value!r}; write Retry(attempts=…)")


def _limit(field: str, value: object) -> None:
    if not isinstance(value, Limit):
        _whole(field, value, least=1, hint="; or give a Limit that several tasks share")


def _callback(field: str, value: object) -> None:
    if not callable(value):
        raise TypeError(f"{field} must be a function that takes the run and the exception, got {value!r}")


_CHECKS: dict[str, Callable[[str, Any], object]] = {
    "name": _text,
    "owner": _text,
    "observe": _flag,
    "expected": _classes,
    "trace": _one_of(TRACES),
    "timeout": _seconds,
    "retry": _retry,
    "limit": _limit,
    "priority": _whole,
    "on_failure": _one_of(ON_FAILURE),
    "expires": _seconds,
    "run_on_error": _flag,
    "idempotent": _flag,
    "executor": _one_of(EXECUTORS),
    "on_error": _callback,
    "alert": _flag,
    "severity": _one_of(SEVERITIES),
    "alert_after": functools.partial(_whole, least=1),
    "slow_after": _seconds,
    "stuck_after": _seconds,
}


@dataclass(frozen=True, slots=True)
class Registered:
    """A function that `@task` registered, under its final name."""

    name: str
    code: str
    policy: Policy
    executor: str


_registry: dict[str, Registered] = {}


def registered_tasks() -> list[Registered]:
    """Every task registered in this process so far, by `@task`."""
    return list(_registry.values())


@overload
def task(func: F, /) -> F: ...
@overload
def task(**policy: Unpack[PolicyOptions]) -> Callable[[F], F]: ...
def task(func: Any = None, /, **policy: Any) -> Any:
    """
    Register a function as a task; the function stays itself.

    Its metrics exist from the start, at zero, so that the first failure is seen by `increase()`; its name is never
    folded into `__other__`. The keywords are those of `Policy`.

    Raises:
        NameClash: Another function is registered under this name.
        TypeError: An unknown keyword, or what is decorated cannot be a task.
    """
    chosen = _policy(policy)
    if func is None:
        return functools.partial(_register, policy=chosen)
    return _register(func, policy=chosen)


def _register(func: F, *, policy: Policy) -> F:
    target = getattr(func, "__func__", func)  # a static or class method, where @task stands above that decorator
    if not callable(target):
        raise TypeError(f"@task registers a function, got {func!r}")
    code = code_name(target)
    entry = Registered(policy.name or code, code, policy, executor_of(target, policy))
    known = _registry.get(entry.name)
    if known is not None and known.code != code:
        raise NameClash(
            f"the task name {entry.name!r} is taken by {known.code}, so {code} cannot have it; "
            f"give one of them another name: @task(name=…)"
        )
    try:
        setattr(target, _ATTRIBUTE, entry)
    except (AttributeError, TypeError):
        raise TypeError(
            f"@task cannot mark {code}: it takes no attributes; name it in Settings.policies instead"
        ) from None
    _registry[entry.name] = entry
    return func


def executor_of(func: Any, policy: Policy) -> str:
    """Where a task's function is called: `inline` on the event loop, `thread` or `process`."""
    if policy.executor in (None, "auto"):
        return "inline" if is_async(func) else "thread"
    return str(policy.executor)


def options(func: Callable[P, R], /, **policy: Unpack[PolicyOptions]) -> Callable[P, R]:
    """
    One call's policy: `tasks.add_task(options(send_mail, trace="link"), address)`.

    What it returns calls as `func` does, without the middleware too. Keywords are those of `Policy`; they win over
    every other place, but for `name` and `owner`, which belong to the task.

    Raises:
        TypeError: An unknown keyword, or `name` or `owner`.
    """
    if not callable(func):
        raise TypeError(f"options() takes a function, got {func!r}")
    for name in ("name", "owner"):
        if name in policy:
            raise TypeError(f"options() sets one call's policy, and {name} belongs to the task: use @task({name}=…)")
    return (_AsyncCall if is_async(func) else _Call)(func, _policy(policy))


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """A function with one call's policy; an object, so that the interception finds both."""

    func: Callable[..., Any]
    policy: Policy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.func(*args, **kwargs)


class _AsyncCall(_Call):
    __slots__ = ()

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return await self.func(*args, **kwargs)


def is_async(func: Any) -> bool:
    """Whether calling it gives something to await: the question that Starlette asks of a task."""
    while isinstance(func, functools.partial):
        func = func.func
    return inspect.iscoroutinefunction(func) or (callable(func) and inspect.iscoroutinefunction(type(func).__call__))


def _policy(keywords: Mapping[str, Any]) -> Policy:
    known = list(PolicyOptions.__annotations__)
    for name in keywords:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}"
            raise TypeError(f"{name!r} is no policy; {hint}")
    return Policy(**keywords)


def unwrap(func: Any) -> tuple[Any, Policy | None]:
    """The function inside `functools.partial` and `options`, and the policy that `options` gave this call."""
    policy = None
    while True:
        if isinstance(func, functools.partial):
            func = func.func
        elif isinstance(func, _Call):
            policy = func.policy if policy is None else policy.over(func.policy)
            func = func.func
        else:
            return func, policy


def without_options(func: Any) -> Any:
    """The function that `options` was given, in its `functools.partial`s; itself where that was not used."""
    if isinstance(func, _Call):
        return without_options(func.func)
    if isinstance(func, functools.partial):
        return functools.partial(without_options(func.func), *func.args, **func.keywords)
    return func


def code_name(func: Any) -> str:
    """
    A callable as `module.qualname`: partials unwrapped, a bound method by its class, a callable object by its own.

    Never a `repr`, and never an exception: what a hostile object hides is called by its class.
    """
    func, _ = unwrap(func)
    owner = _plain(func, "__self__")
    if owner is not None and _string(func, "__name__"):
        if type(owner).__name__ == "module":  # print, len: a builtin function belongs to its module
            return f"{owner.__name__}.{_string(func, '__qualname__') or func.__name__}"
        kind = owner if isinstance(owner, type) else type(owner)
        return f"{kind.__module__}.{kind.__qualname__}.{func.__name__}"
    qualname = _string(func, "__qualname__")
    if qualname is None or isinstance(func, type):
        kind = func if isinstance(func, type) else type(func)
        return f"{_module(kind)}.{kind.__qualname__}"
    return f"{_module(func)}.{qualname}"


def _module(thing: Any) -> str:
    module = _string(thing, "__module__") or _string(type(thing), "__module__") or "builtins"
    if module == "__main__":
        import sys

        spec = getattr(sys.modules.get("__main__"), "__spec__", None)
        return spec.name if spec is not None and spec.name else "__main__"
    return module


def _plain(thing: Any, name: str) -> Any:
    try:
        return getattr(thing, name, None)
    except Exception:  # a __getattr__ of the user's that raises
        return None


def _string(thing: Any, name: str) -> str | None:
    value = _plain(thing, name)
    return value if isinstance(value, str) else None


def registration(func: Any) -> Registered | None:
    """What `@task` said of this function; None where it is not registered."""
    entry = _plain(func, _ATTRIBUTE)
    return entry if isinstance(entry, Registered) else None


class PolicyBook:
    """
    The policies of one app: what `Settings.policies` says of a task, over what `@task` says.

    Args:
        policies: Task name or pattern (`mail.*`, as `fnmatch`) to policy.
    """

    def __init__(self, policies: Mapping[str, Policy]) -> None:
        self._exact = {name: policy for name, policy in policies.items() if not is_pattern(name)}
        self.patterns = [(name, policy) for name, policy in policies.items() if is_pattern(name)]

    @property
    def named(self) -> list[str]:
        """The tasks named outright, so registered too."""
        return list(self._exact)

    def names(self, task: str) -> bool:
        """Whether this task is named outright."""
        return task in self._exact

    def policy(self, task: str, call: Policy | None, declared: Policy | None) -> Policy:
        """One task's policy, field by field: `options()`, exact name, patterns in their order, `@task`."""
        chosen = declared or Policy()
        for pattern, policy in reversed(self.patterns):
            if fnmatch.fnmatchcase(task, pattern):
                chosen = policy.over(chosen)
        if task in self._exact:
            chosen = self._exact[task].over(chosen)
        return chosen if call is None else call.over(chosen)


def is_pattern(name: str) -> bool:
    """Whether a key of `Settings.policies` is a pattern, not a name."""
    return any(char in name for char in "*?[")
