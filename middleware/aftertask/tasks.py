"""`@task` and `options`: which functions are tasks, their names, and the options declared for them."""

from __future__ import annotations

import functools
import inspect
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CoroutineType, FunctionType, MethodType, ModuleType
from typing import Any, ParamSpec, TypeVar, Unpack, cast, overload

from .errors import NameClash
from .policies import Policy, PolicyOptions

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])

_ATTRIBUTE = "__aftertask__"

#: No callable is unwrapped more often than this, whatever it claims to wrap.
_DEEPEST = 50

#: Tracers that replace a task by a closure of their own, by package, and the variable that holds the user's function.
_TRACERS = {"ddtrace": "task"}

_EMPTY = Policy()


@dataclass(frozen=True, slots=True)
class Registered:
    """A function registered with `@task`, under its final name."""

    name: str
    code: str
    policy: Policy
    executor: str
    function: Callable[..., Any] = field(compare=False, repr=False)


_registry: dict[str, Registered] = {}


def registered_tasks() -> list[Registered]:
    """Every task registered in this process so far."""
    return list(_registry.values())


@contextmanager
def registrations_forgotten() -> Iterator[None]:
    """Forget, at the end, what was registered inside; for tests that declare their own tasks."""
    before = dict(_registry)
    try:
        yield
    finally:
        _registry.clear()
        _registry.update(before)


@overload
def task(func: F, /) -> F: ...
@overload
def task(**policy: Unpack[PolicyOptions]) -> Callable[[F], F]: ...
def task(func: Any = None, /, **policy: Any) -> Any:
    """
    Register a function as a task; the function itself is returned unchanged.

    The metrics of a registered task exist from the start, at zero, so that `increase()` sees its first failure. Its
    name is never folded into `__other__`. The keywords are those of `Policy`.

    Raises:
        NameClash: Another function is registered under this name.
        TypeError: A keyword is unknown, or the object cannot be a task.
    """
    if isinstance(func, str):
        raise TypeError(f"@task registers a function, got {func!r}; write @task(name={func!r})")
    if "key" in policy:
        raise TypeError("@task names every run of a task; key belongs to one call: use options(func, key=…)")
    chosen = Policy(**policy)
    if func is None:
        return functools.partial(_register, policy=chosen)
    return _register(func, policy=chosen, stacklevel=3)


def _register(func: F, *, policy: Policy, stacklevel: int = 2) -> F:
    # @task may stand above @staticmethod or @classmethod.
    target = func.__func__ if isinstance(func, (staticmethod, classmethod)) else func
    if not callable(target):
        raise TypeError(f"@task registers a function, got {func!r}")
    code = code_name(target)
    _warn_if_ignored(target, code, stacklevel + 1)
    entry = Registered(policy.name or code, code, policy, executor_of(target, policy), target)
    known = _registry.get(entry.name)
    if known is not None and known.code != code:
        raise NameClash(
            f"the task name {entry.name!r} is already used by {known.code}, so {code} cannot have it; "
            f"give one of them another name with @task(name=…)"
        )
    try:
        setattr(target, _ATTRIBUTE, entry)
    except (AttributeError, TypeError):
        raise TypeError(
            f"@task cannot mark {code}, which takes no attributes; name it in Settings.policies instead"
        ) from None
    _registry[entry.name] = entry
    return func


def _warn_if_ignored(target: object, code: str, stacklevel: int) -> None:
    """Warn about a use of `@task` that has no effect, or that cancels the effect of another."""
    if isinstance(target, functools.partial):
        warnings.warn(
            f"@task has no effect on a functools.partial of {code}, whose runs have the name and the policy of the "
            "function inside: put @task on that function, or use options(function, …) where it is added",
            stacklevel=stacklevel,
        )
    known = attribute(target, _ATTRIBUTE)
    if isinstance(known, Registered) and _registry.get(known.name) is known:
        warnings.warn(
            f"@task is used twice on {code}, and only the outer one counts: its name and options replace those of "
            f"{known.name!r}; write one @task with all of them",
            stacklevel=stacklevel,
        )


def hidden_task(func: object) -> str | None:
    """The registered task that a closure without `functools.wraps` calls, if its variables show one; otherwise None."""
    if type(func) is not FunctionType or "<locals>" not in func.__qualname__ or registration(func) is not None:
        return None
    entries = [registration(value) for value in closure_of(func).values() if callable(value)]
    return next((entry.name for entry in entries if entry is not None), None)


def closure_of(func: FunctionType) -> Mapping[str, object]:
    """The variables that a function uses of those around it; empty if one of them has no value yet."""
    try:
        return inspect.getclosurevars(func).nonlocals
    except ValueError:
        return {}


def options(func: Callable[P, R], /, **policy: Unpack[PolicyOptions]) -> Callable[P, R]:
    """
    Set the policy of one call: `tasks.add_task(options(send_mail, trace="link"), address)`.

    The result can be called like `func`, with or without the middleware. The keywords are those of `Policy` except
    `name` and `owner`, which belong to the task. They override every other source.

    Raises:
        TypeError: A keyword is unknown, or is `name` or `owner`.
    """
    if not callable(func):
        raise TypeError(f"options() takes a function, got {func!r}")
    for name in ("name", "owner"):
        if name in policy:
            raise TypeError(f"options() sets the policy of one call; {name} belongs to the task: use @task({name}=…)")
    call = _Call(func)
    call.policy = Policy(**policy)
    return call


class _Call(functools.partial[Any]):
    """A function with the policy of one call; a `partial`, because tests for async functions look inside those."""

    policy: Policy


def call_policy(func: object) -> Policy:
    """The policy that `options` set for this call; empty if it set nothing."""
    return unwrap(func)[1] or _EMPTY


def is_async(func: object) -> bool:
    """Whether a call returns an awaitable, by the same rule as Starlette's."""
    while isinstance(func, functools.partial):
        func = func.func
    return inspect.iscoroutinefunction(func) or (callable(func) and inspect.iscoroutinefunction(type(func).__call__))


def executor_of(func: object, policy: Policy) -> str:
    """Where a task's function runs: `inline` on the event loop, `thread` or `process`."""
    if policy.executor in (None, "auto"):
        return "inline" if is_async(func) else "thread"
    return str(policy.executor)


def unwrap(func: Any) -> tuple[Any, Policy | None]:
    """The function inside `functools.partial`, `options` and tracers, and the policy that `options` gave this call."""
    policy = None
    for _ in range(_DEEPEST):
        if isinstance(func, _Call):
            policy = func.policy if policy is None else policy.over(func.policy)
        if isinstance(func, functools.partial):
            func = func.func
        else:
            inner = untraced(func)
            if inner is func:
                break
            func = inner
    return func, policy


def untraced(func: object) -> object:
    """The user's function inside the closure of a known tracer; anything else unchanged."""
    for _ in range(_DEEPEST):
        if type(func) is not FunctionType or not isinstance(func.__module__, str):
            break
        variable = _TRACERS.get(func.__module__.partition(".")[0])
        inner = None if variable is None else closure_of(func).get(variable)
        if inner is None:
            break
        func = inner
    return func


def without_options(func: Any) -> Any:
    """The function without the wrappers of `options` and tracers, also inside `functools.partial`."""
    func = untraced(func)
    if isinstance(func, functools.partial):
        return functools.partial(without_options(func.func), *func.args, **func.keywords)
    return func


def flattened(
    func: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]
) -> tuple[Callable[..., object], Sequence[object], Mapping[str, object]]:
    """A call of a partial as one of the function inside, with all its arguments."""
    while isinstance(func, functools.partial):
        partial: functools.partial[object] = func
        func, args, kwargs = partial.func, (*partial.args, *args), {**partial.keywords, **kwargs}
    return func, args, kwargs


def registration(func: object) -> Registered | None:
    """The registration of this function by `@task`, looked up through `__wrapped__`; None if there is none."""
    for _ in range(_DEEPEST):
        entry = attribute(func, _ATTRIBUTE)
        if isinstance(entry, Registered):
            return entry
        wrapped = attribute(func, "__wrapped__")
        if wrapped is None:
            return None
        func = wrapped
    return None


def code_name(func: object) -> str:
    """
    Name a callable as `module.qualname`; a bound method is named with its class, a callable object after its class.

    Looked up through `functools.partial`, `options`, tracers and `__wrapped__`. Never a `repr`, never an exception.
    """
    func, _ = unwrap(func)
    for _ in range(_DEEPEST):
        wrapped = None if type(func) is MethodType else attribute(func, "__wrapped__")
        if wrapped is None:
            break
        func = unwrap(wrapped)[0]
    owner, name = attribute(func, "__self__"), attribute(func, "__name__")
    if owner is not None and isinstance(name, str):
        if isinstance(owner, ModuleType):  # print, len: a builtin function belongs to its module
            return f"{owner.__name__}.{attribute(func, '__qualname__') or name}"
        kind = owner if isinstance(owner, type) else type(owner)
        return f"{_module(kind)}.{kind.__qualname__}.{name}"
    qualname = attribute(func, "__qualname__")
    if isinstance(qualname, str) and not isinstance(func, type):
        return f"{_module(func)}.{qualname}"
    kind = func if isinstance(func, type) else type(func)
    return f"{_module(kind)}.{kind.__qualname__}"


def attribute(thing: object, name: str) -> Any:
    """
    An attribute that really exists; None otherwise.

    Mocks and remote proxies invent any attribute on access, so a plain `getattr` proves nothing.
    """
    try:
        if type(thing) is not MethodType:  # which passes on to its function
            inspect.getattr_static(thing, name)
        return getattr(thing, name, None)
    except Exception:  # no such attribute, or a property of the user's that raises
        return None


def _module(thing: object) -> str:
    module = attribute(thing, "__module__")
    if type(thing) is CoroutineType and thing.cr_frame is not None:
        module = thing.cr_frame.f_globals.get("__name__")  # of its function: a coroutine itself belongs to no module
    if not isinstance(module, str):
        module = attribute(type(thing), "__module__")
    if not isinstance(module, str):
        return "builtins"
    return _main_name() if module == "__main__" else module


def _main_name() -> str:
    """The name by which other processes can import the main module; `__main__` if it has none."""
    spec = attribute(sys.modules.get("__main__"), "__spec__")
    return spec.name if spec is not None and spec.name else "__main__"


def find_function(task: str, code: str) -> Callable[..., object] | None:
    """
    The function of a task that is known by name only: the one at `module.qualname`, or else the one that is registered.

    None if neither is known here, or if the function must be bound to an object first.
    """
    place, _, name = code.rpartition(".")
    if f"{place}.".startswith(f"{_main_name()}."):
        place = f"__main__{place.removeprefix(_main_name())}"
    try:
        owner = pkgutil.resolve_name(place)
    except Exception:  # there is none, or its module is broken: its tasks are unknown here
        owner = None
    found = attribute(owner, name)
    takes_self = isinstance(owner, type) and isinstance(inspect.getattr_static(owner, name, None), FunctionType)
    if callable(found) and code_name(found) == code and not takes_self:
        return cast(Callable[..., object], found)
    entry = _registry.get(task)
    return None if entry is None else entry.function
