"""
How Starlette and FastAPI run background tasks, and where we step in. The only module that knows.

A background task hangs on a response, which never crosses the ASGI boundary; so the middleware marks the ASGI scope,
and four hooks on Starlette's classes, set once per process when the first middleware is built, do nothing but for a
scope with our mark:

1. `__call__` of the response classes: a response that is served in a marked scope, and has a background, is called as
   something that shares its `__dict__`, and whose `background` is awaited through us. Everybody else has the response.
   `Response`'s own has our look woven into it (`_weave`), since every response pays for it.
2. `BackgroundTask.__call__`: tasks that user code runs inside a task, and what serves a background and is no response.
3. `BackgroundTasks.__init__`: finds the container that FastAPI injects into a request.
4. `BackgroundTasks.add_task`: a task added to such a container is scheduled.

No context variable decides whose a task is: under uvicorn a context leaks into the next request of its connection
(CPython #140947), and the tasks of an app that has no middleware would be taken.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import sys
from collections.abc import Awaitable, Callable, Collection, Iterator, MutableMapping
from types import FrameType, FunctionType
from typing import Any, Protocol, cast

from starlette.background import BackgroundTask, BackgroundTasks
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from . import _clock
from ._weave import woven
from .events import TaskRun, current_run

KEY = "aftertask"

#: A marked scope holds a list under `KEY`: most requests have no task, and nothing is made faster than a list. Its
#: exchange, None until somebody wants it; the middleware, which makes it; and while the request lasts, what it came
#: with: the context variables, and the `send` by which its messages go out (`_messages`). That is nothing (an empty
#: tuple) as soon as the exchange has it: so one look at it tells whether there is an exchange.
EXCHANGE, MIDDLEWARE, CAME_WITH = range(3)

#: The framework's own containers, which run what they hold one after another.
_LOOPS = {("starlette.background", "BackgroundTasks"), ("fastapi.background", "BackgroundTasks")}
_LOOPS_IN = {module for module, _ in _LOOPS}

Scope = MutableMapping[str, Any]
Loop = Callable[[Any], Awaitable[None]]


class Exchange(Protocol):
    """One request and its response, as far as the hooks need it."""

    def answer(self, response: Response, scope: Scope) -> Any:
        """A response is served; returns what is to be called in its place."""
        ...

    def serve(self, value: Any, served: Scope) -> Awaitable[None]:
        """Run a response's background."""
        ...

    def inject(self, container: BackgroundTasks, scope: Scope, exits: object) -> None:
        """FastAPI made this container for the request."""
        ...

    def add(self, container: BackgroundTasks) -> None:
        """A task was added to the injected container."""
        ...

    def adopt(self, target: BackgroundTask) -> Awaitable[None] | None:
        """User code runs an injected task itself; None where it is none of ours."""
        ...

    def nest(self, target: BackgroundTask, parent: TaskRun) -> Awaitable[None]:
        """User code runs a task inside a run."""
        ...

    @property
    def owed(self) -> object:
        """What is to run after the error response; None where nothing is."""
        ...

    def compensate(self) -> Awaitable[None]:
        """Run it."""
        ...


#: The requests whose responses are looked at even where they have no background: by the identity of the container that
#: FastAPI injected, or of what is owed once an error response is out.
expecting: dict[int, Exchange] = {}


def exchange_of(scope: Scope) -> Exchange | None:
    """The request that this scope belongs to; None where it has no mark."""
    mark = scope.get(KEY)
    if mark is None:
        return None
    exchange: Exchange | None = mark[EXCHANGE]
    if exchange is None:
        lasts = len(mark) > CAME_WITH
        exchange = mark[EXCHANGE] = mark[MIDDLEWARE].exchange(mark[CAME_WITH] if lasts else None)
        if lasts:
            mark[CAME_WITH] = ()
    return exchange


class _Stand:
    """In the place of a value, for framework code that looks before it calls: same class, attributes and truth."""

    __slots__ = ("_run", "_value")

    def __init__(self, value: Any, run: Callable[[Any], Awaitable[None]]) -> None:
        object.__setattr__(self, "_value", value)
        object.__setattr__(self, "_run", run)

    @property  # type: ignore[misc]  # the class of what it stands for
    def __class__(self) -> type:
        return type(self._value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._value, name)

    def __setattr__(self, name: str, new: Any) -> None:
        setattr(self._value, name, new)

    def __bool__(self) -> bool:
        return bool(self._value)


class Runner(_Stand):
    """A response's background, or one element of it: awaited by the framework, run by us."""

    __slots__ = ()

    async def __call__(self) -> None:  # a coroutine function, as what is not is called in a thread
        await self._run(self._value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """In a copy or a pickle it is what it stands for: that may be read where there is no aftertask."""
        return copy.copy, (self._value,)


def plain(value: Any) -> Any:
    """What a runner stands for; anything else as it is."""
    return value._value if type(value) is Runner else value


class View(_Stand):
    """A framework's container, for its own loop: `tasks` are runners, each made when its turn comes; it may grow."""

    __slots__ = ()

    @property
    def tasks(self) -> Iterator[Any]:
        """A runner for each element."""
        return (Runner(task, self._run) for task in self._value.tasks)


def loop_of(value: Any) -> Loop | None:
    """The framework's own loop, where `value` is its container; None where it is a task, or a user's container."""
    kind = type(value)
    if kind is BackgroundTask:
        return None
    for owner in kind.__mro__:
        if "__call__" in owner.__dict__:
            return owner.__dict__["__call__"] if (owner.__module__, owner.__name__) in _LOOPS else None
    return None


def leaves(value: Any) -> Iterator[Any]:
    """The tasks inside a background: a framework container is its leaves, anything else is one."""
    if loop_of(value) is None:
        yield value
    else:
        for element in value.tasks:
            if type(element) is BackgroundTask:
                yield element
            else:
                yield from leaves(plain(element))


def is_shipped(loop: Loop) -> bool:
    """Whether this is the loop that the framework shipped: then running its elements one by one is the same."""
    return _shipped(loop, _LOOPS_IN)


def is_whole(target: Any) -> bool:
    """Whether this is a user's container or task class that calls its function itself: one run, whatever it does."""
    if not isinstance(target, BackgroundTask):
        return False
    owner = next(cls for cls in type(target).__mro__ if "__call__" in cls.__dict__)
    return owner is not BackgroundTask


def call(target: Any, spanned: Callable[[Any], bool] | None) -> Awaitable[Any]:
    """
    Call a task as the framework would, through whatever another library has put around it.

    `spanned` tells whether a tracer feeds the same provider as ours: then OpenTelemetry's own wrapper is left out, or
    there would be two spans for one attempt.
    """
    if type(target) is BackgroundTask:
        if BackgroundTask.__call__ is _hooked and _hooked_is_plain:
            if target.is_async:
                called: Awaitable[Any] = target.func(*target.args, **target.kwargs)  # cast() is a call
                return called
            return run_in_threadpool(_in_thread, target)
        unwrapped = getattr(BackgroundTask, "_otel_original_call", None)
        if unwrapped is not None and spanned is not None and spanned(_contrib_tracer(BackgroundTask.__call__)):
            return cast(Awaitable[Any], unwrapped(target))
    return cast(Awaitable[Any], target())


def _in_thread(target: BackgroundTask) -> Any:
    run = current_run()
    if run is not None:
        run.thread_s = _clock.monotonic()
    return target.func(*target.args, **target.kwargs)


def unhooked(target: Any) -> Awaitable[None]:
    """Call a task as if we were not there."""
    if isinstance(target, BackgroundTask) and not is_whole(target):
        return inner(target)
    return cast(Awaitable[None], target())


def inner(target: BackgroundTask, spanned: Callable[[Any], bool] | None = None) -> Awaitable[None]:
    """
    Call the function of a task, as `BackgroundTask.__call__` does without us.

    `spanned` as in `call`: OpenTelemetry's own wrapper, where it is under our hook, is left out.
    """
    unwrapped = getattr(BackgroundTask, "_otel_original_call", None)
    if unwrapped is not None and (unwrapped in _hooks or _shipped(unwrapped, _LOOPS_IN)) and spanned is not None:
        tracer = _contrib_tracer(_original)
        if tracer is not None and spanned(tracer):
            return cast(Awaitable[None], unwrapped(target))
    return cast(Awaitable[None], _original(target))


def native_tracer(scope: Scope) -> Any:
    """The tracer of FastAPI's own telemetry, where it traces this request's tasks; else None."""
    return getattr(scope.get("fastapi.telemetry"), "tracer", None)


def _contrib_tracer(wrapper: Any) -> Any:
    while wrapper is not None:
        code, cells = getattr(wrapper, "__code__", None), getattr(wrapper, "__closure__", None)
        if code is not None and cells and "tracer" in code.co_freevars:
            return cells[code.co_freevars.index("tracer")].cell_contents
        wrapper = getattr(wrapper, "__wrapped__", None)
    return None


class _Own:
    """
    What goes before a response's class in that of what the framework's own code is called with, see `own`.

    `background` is what there is to await each time that it is read; all else is the response's.
    """

    __slots__ = ()
    _aftertask: tuple[Any, Exchange, Scope]

    def __init_subclass__(cls) -> None:
        """A user's class that keeps a list of its subclasses need not know of ours."""

    @property
    def background(self) -> Any:
        response, exchange, scope = self._aftertask
        value = plain(response.background)
        return None if value is None else Runner(value, functools.partial(exchange.serve, served=scope))

    @background.setter
    def background(self, value: Any) -> None:
        self._aftertask[0].background = plain(value)

    @background.deleter
    def background(self) -> None:
        del self._aftertask[0].background


_SHIPS = frozenset({"starlette", "fastapi", "sse_starlette"})
_MAKES = frozenset({"__init__", "__init_subclass__", "render", "init_headers"})


@functools.lru_cache(maxsize=256)
def _own_class(kind: type) -> type | None:
    """
    A class that passes for `kind` where the framework's own code sends the response; None where the app's code sees it.

    That is code which sends it, in any method but those that only make a response, and what keeps something outside of
    the `__dict__`.
    """
    shipped = [cls for cls in kind.__mro__ if cls.__module__.partition(".")[0] in _SHIPS]
    sends = {name for cls in shipped for name, value in vars(cls).items() if isinstance(value, FunctionType)} - _MAKES
    for cls in set(kind.__mro__) - {*shipped, object}:
        if sends & vars(cls).keys() or vars(cls).get("__slots__"):
            return None
    names: dict[str, Any] = {"__slots__": ("_aftertask",), "__module__": kind.__module__, "__doc__": kind.__doc__}
    if hasattr(kind, "__del__"):
        names["__del__"] = lambda self: None  # the response has its own
    try:
        made = type(kind)(kind.__name__, (_Own, kind), names)
    except Exception:  # a base that allows for no slots, a metaclass that wants more
        return None
    made.__qualname__ = kind.__qualname__
    return made


def own(response: Any, exchange: Exchange, scope: Scope) -> Any:
    """
    What a response's code is called with in its place, so that it awaits its background through us.

    The framework's own code gets what has the response's `__dict__`: what either of them sets, the other has. An app's
    own code gets the response itself, whose background is awaited by a runner until it is sent.
    """
    kind: type[Any] = type(response)
    own_class = _own_class(kind)  # type: ignore[arg-type]  # a class is hashable
    if own_class is None:
        _lend(response, exchange, scope)
        return response
    made: Any = object.__new__(own_class)
    object.__setattr__(made, "__dict__", response.__dict__)
    object.__setattr__(made, "_aftertask", (response, exchange, scope))
    return made


#: How often a response that was lent a runner is being sent, by identity: it may be shared by requests.
_lent: dict[int, int] = {}


def _lend(response: Any, exchange: Exchange, scope: Scope) -> None:
    attributes = getattr(response, "__dict__", {})
    value = attributes.get("background")
    if value is None:
        return  # it has none, or computes it: a task is seen when it is called
    _lent[id(response)] = _lent.get(id(response), 0) + 1
    if type(value) is not Runner:

        def run(value: Any) -> Awaitable[None]:
            of_caller = _asgi_scope(sys._getframe(2))
            found = None if of_caller is None else exchange_of(of_caller)
            return exchange.serve(value, scope) if found is None else found.serve(value, cast(Scope, of_caller))

        attributes["background"] = Runner(value, run)


def _take_back(response: Any) -> None:
    left = _lent.pop(id(response)) - 1
    if left:
        _lent[id(response)] = left
    elif type(response.__dict__.get("background")) is Runner:
        response.__dict__["background"] = plain(response.__dict__["background"])


def _serve(original: Any, response: Any, scope: Scope, *rest: Any) -> Awaitable[None]:
    """Call a response; where the scope is marked, the request is told, and the response awaits its background by us."""
    exchange = None if isinstance(response, _Own) else exchange_of(scope)
    if exchange is None:
        return cast(Awaitable[None], original(response, scope, *rest))
    lent = _lent.get(id(response), 0)
    in_its_place = exchange.answer(response, scope)
    is_lent = _lent.get(id(response), 0) > lent
    called: Awaitable[None] = original(in_its_place, scope, *rest)
    return _until_sent(called, response if is_lent else None, exchange) if is_lent or exchange.owed else called


async def _until_sent(called: Awaitable[None], lent: Any, exchange: Exchange) -> None:
    try:
        await called
    finally:
        if lent is not None:
            _take_back(lent)
    if exchange.owed is not None:
        await exchange.compensate()


#: Most responses have no background, and this is all that we do for them: one that cannot tell it is to say so itself.
_LOOK = """
try:
    background = self.background
except Exception:
    background = self
if background is not None or expecting:
    return await serve(original, self, scope, receive, send)
"""


def _hook_response(original: Any) -> Any:
    if _shipped(original, {"starlette.responses"}):
        made = woven(original, _LOOK, original=original, expecting=expecting, serve=_serve)
        if made is not None:
            return made

    @functools.wraps(original)
    def __call__(self: Any, scope: Scope, receive: Any, send: Any) -> Awaitable[None]:
        try:
            if self.background is None and not expecting:
                return cast(Awaitable[None], original(self, scope, receive, send))
        except Exception:
            pass
        return _serve(original, self, scope, receive, send)

    return _as_coroutine_function(__call__)


def _hook_subclass(original: Any) -> Any:
    """For a class with a `__call__` of its own: it may come to a background only while it is being sent."""

    @functools.wraps(original)
    def __call__(self: Any, *args: Any, **named: Any) -> Awaitable[None]:
        if named or len(args) != 3:
            return cast(Awaitable[None], original(self, *args, **named))
        return _serve(original, self, *args)

    return _as_coroutine_function(__call__)


def _as_coroutine_function(function: Any) -> Any:
    """Have it taken for the coroutine function that it stands for; to be one costs a frame for each response."""
    if sys.version_info >= (3, 12):
        return inspect.markcoroutinefunction(function)
    function._is_coroutine = asyncio.coroutines._is_coroutine  # type: ignore[attr-defined]  # how asyncio marks them
    return function


def _hook_class(kind: type) -> None:
    call = kind.__dict__.get("__call__")
    if isinstance(call, FunctionType):
        hook = _hook_response if kind is Response else _hook_subclass
        kind.__call__ = hook(call)  # type: ignore[method-assign]  # the hook


def _hook_responses() -> None:
    """All response classes that have a `__call__`, those to come too."""
    classes, found = {Response}, [Response]
    while found:
        new = {*found.pop().__subclasses__()} - classes
        classes |= new
        found += new
    for kind in classes:
        _hook_class(kind)
    usual = Response.__dict__.get("__init_subclass__")

    def __init_subclass__(cls: type[Response], /, **named: Any) -> None:
        (super(Response, cls).__init_subclass__ if usual is None else usual.__get__(None, cls))(**named)
        _hook_class(cls)

    Response.__init_subclass__ = classmethod(__init_subclass__)  # type: ignore[assignment]  # the hook


def _asgi_scope(frame: FrameType | None) -> Scope | None:
    """The scope of the ASGI callable that awaits a task, seen through the task's containers."""
    while (
        frame is not None
        and frame.f_code.co_name == "__call__"
        and isinstance(frame.f_locals.get("self"), BackgroundTask)
    ):
        frame = frame.f_back
    scope = frame.f_locals.get("scope") if frame is not None else None
    return scope if isinstance(scope, dict) else None


def _hook_call(original: Callable[[Any], Awaitable[None]]) -> Any:
    @functools.wraps(original)
    async def __call__(self: BackgroundTask) -> None:
        run = current_run()
        if run is not None and run.target is self and not run.plan.whole:
            return await original(self)
        scope = _asgi_scope(sys._getframe(1))
        exchange = None if scope is None else exchange_of(scope)
        if scope is not None and (run is None or cast(Any, run.request) is not exchange):
            # An ASGI callable serves a background: ours if marked, another app's if not.
            return await (original(self) if exchange is None else exchange.serve(self, scope))
        if run is not None and run.outcome is None:
            return await cast(Exchange, run.request).nest(self, run)
        for waiting in list(expecting.values()):
            adopted = waiting.adopt(self)
            if adopted is not None:
                return await adopted
        return await original(self)

    return __call__


def _hook_init(original: Callable[..., None]) -> Any:
    @functools.wraps(original)
    def __init__(self: BackgroundTasks, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        frame = sys._getframe(1)
        if frame.f_code.co_name == "solve_dependencies":
            local = frame.f_locals
            scope: Any = getattr(local.get("request"), "scope", None)
            exchange = exchange_of(scope) if isinstance(scope, dict) else None
            if exchange is not None:
                exchange.inject(self, scope, local.get("async_exit_stack"))

    return __init__


def _hook_add_task(original: Callable[..., None]) -> Any:
    @functools.wraps(original)
    def add_task(self: BackgroundTasks, func: Any, *args: Any, **kwargs: Any) -> None:
        original(self, plain(func), *args, **kwargs)
        exchange = expecting.get(id(self))
        if exchange is not None:
            exchange.add(self)

    return add_task


_hooked: Any = None
_original: Any = None
_hooked_is_plain = False
#: Every hook that was ever set, with what it was set around.
_hooks: dict[Any, Any] = {}


def install() -> None:
    """
    Set the hooks, once per process. They stay: another library may have wrapped ours since, and would be undone.

    Only `BackgroundTask.__call__` is looked at again with each batch, because of OpenTelemetry's FastAPI package: put
    around our hook its span would come before ours, so we go around it; taken away, it puts back what it once found.
    """
    global _hooked, _original, _hooked_is_plain
    first, found = _hooked is None, BackgroundTask.__call__
    if found is _hooked:
        return
    is_around_ours = getattr(BackgroundTask, "_otel_original_call", None) in _hooks
    if found not in _hooks and (first or found is _original or _shipped(found, _LOOPS_IN) or is_around_ours):
        hook = _hook_call(found)
        _hooks[hook] = found
        BackgroundTask.__call__ = found = hook  # type: ignore[method-assign]  # the hook
    if found in _hooks:
        _hooked, _original = found, _hooks[found]
        _hooked_is_plain = _shipped(_original, _LOOPS_IN)
    if not first:
        return
    BackgroundTasks.__init__ = _hook_init(BackgroundTasks.__init__)  # type: ignore[method-assign]  # the hook
    BackgroundTasks.add_task = _hook_add_task(BackgroundTasks.add_task)  # type: ignore[method-assign]  # the hook
    _hook_responses()


def _shipped(function: Any, modules: Collection[str]) -> bool:
    """Whether it is the framework's own function and nobody's wrapper, which may pass for it in name."""
    return type(function) is FunctionType and function.__globals__.get("__name__") in modules
