"""How a task is run and observed, as its owner says: `@task`, `options`, `Policy`. Pure decisions, no I/O."""

from __future__ import annotations

import fnmatch
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, ParamSpec, TypedDict, TypeVar, Unpack, overload

from .errors import NameClash

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])

Trace = Literal["child", "link", "none"]
TRACES = ("child", "link", "none")

_ATTRIBUTE = "__aftertask__"


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

    Raises:
        TypeError: A value is of the wrong type.
        ValueError: A value is none of those allowed.
    """

    name: str | None = None
    owner: str | None = None
    observe: bool | None = None
    expected: tuple[type[Exception], ...] | type[Exception] | None = None
    trace: Trace | None = None

    def __post_init__(self) -> None:
        for field in ("name", "owner"):
            value = getattr(self, field)
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise TypeError(f"Policy.{field} must be a non-empty string or None, got {value!r}")
        if self.observe not in (None, True, False):
            raise TypeError(f"Policy.observe must be True, False or None, got {self.observe!r}")
        if self.trace is not None and self.trace not in TRACES:
            raise ValueError(f"Policy.trace must be one of {', '.join(TRACES)}, got {self.trace!r}")
        classes = self.classes
        if not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in classes):
            raise TypeError(f"Policy.expected must be exception classes, got {self.expected!r}")

    @property
    def classes(self) -> tuple[type[Exception], ...]:
        """The expected exception classes, as `except` wants them."""
        if self.expected is None:
            return ()
        return self.expected if isinstance(self.expected, tuple) else (self.expected,)

    def over(self, base: Policy) -> Policy:
        """This policy, and `base` wherever this one says nothing."""
        said = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(base, **{name: value for name, value in said.items() if value is not None})


class PolicyOptions(TypedDict, total=False):
    """The keywords of `@task` and `options`: those of `Policy`."""

    name: str
    owner: str
    observe: bool
    expected: tuple[type[Exception], ...] | type[Exception]
    trace: Trace


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
    if not callable(func):
        raise TypeError(f"@task registers a function, got {func!r}")
    target = getattr(func, "__func__", func)  # a static or class method, where @task stands above that decorator
    code = code_name(target)
    entry = Registered(policy.name or code, code, policy, "inline" if is_async(target) else "thread")
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
    unknown = [name for name in keywords if name not in PolicyOptions.__annotations__]
    if unknown:
        known = ", ".join(sorted(PolicyOptions.__annotations__))
        raise TypeError(f"{unknown[0]!r} is no policy; known are {known}")
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


def code_name(func: Any) -> str:
    """
    A callable as `module.qualname`: partials unwrapped, a bound method by its class, a callable object by its own.

    Never a `repr`, and never an exception: what a hostile object hides is called by its class.
    """
    func, _ = unwrap(func)
    owner = _plain(func, "__self__")
    if owner is not None and _text(func, "__name__"):
        if type(owner).__name__ == "module":  # print, len: a builtin function belongs to its module
            return f"{owner.__name__}.{_text(func, '__qualname__') or func.__name__}"
        kind = owner if isinstance(owner, type) else type(owner)
        return f"{kind.__module__}.{kind.__qualname__}.{func.__name__}"
    qualname = _text(func, "__qualname__")
    if qualname is None or isinstance(func, type):
        kind = func if isinstance(func, type) else type(func)
        return f"{_module(kind)}.{kind.__qualname__}"
    return f"{_module(func)}.{qualname}"


def _module(thing: Any) -> str:
    module = _text(thing, "__module__") or _text(type(thing), "__module__") or "builtins"
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


def _text(thing: Any, name: str) -> str | None:
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
        self._patterns = [(name, policy) for name, policy in policies.items() if is_pattern(name)]

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
        for pattern, policy in reversed(self._patterns):
            if fnmatch.fnmatchcase(task, pattern):
                chosen = policy.over(chosen)
        if task in self._exact:
            chosen = self._exact[task].over(chosen)
        return chosen if call is None else call.over(chosen)


def is_pattern(name: str) -> bool:
    """Whether a key of `Settings.policies` is a pattern, not a name."""
    return any(char in name for char in "*?[")
