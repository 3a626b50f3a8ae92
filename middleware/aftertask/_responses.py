"""
How a response awaits its background through us.

`__call__` of the response classes is hooked, once per process. A response that is served in a marked scope and has a
background is called as something that shares its `__dict__` and whose `background` is awaited through us, where the
framework's own code sends it; an app's own code is called with the response itself, which is lent a runner meanwhile.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import sys
from collections.abc import Awaitable, Callable, Collection, Iterator
from types import FunctionType
from typing import Any, cast

from starlette.responses import Response

from ._mark import Exchange, Scope, asgi_scope, exchange_of, expecting, is_known
from ._weave import woven


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
            of_caller = asgi_scope(sys._getframe(2))
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
    call = functools.partial(original, in_its_place, scope, *rest)
    return _until_sent(call, response if is_lent else None, exchange) if is_lent or exchange.owed else call()


async def _until_sent(call: Callable[[], Awaitable[None]], lent: Any, exchange: Exchange) -> None:
    try:
        await call()
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
    return await serve(background, original, self, scope, receive, send)
"""


def _serve_plain(background: Any, original: Any, response: Any, scope: Scope, *rest: Any) -> Awaitable[None]:
    """Call a response that comes to no background while it is sent: others are expected, and maybe not this one's."""
    if background is None and not is_known(scope):
        return cast(Awaitable[None], original(response, scope, *rest))
    return _serve(original, response, scope, *rest)


def _woven(original: Any) -> Any:
    if not shipped(original, {"starlette.responses"}):
        return None
    return woven(original, _LOOK, original=original, expecting=expecting, serve=_serve_plain)


def _hook_response(original: Any) -> Any:
    if original is _known and _woven_in is not None:
        return _woven_in

    @functools.wraps(original)
    def __call__(self: Any, scope: Scope, receive: Any, send: Any) -> Awaitable[None]:
        try:
            background = self.background
        except Exception:
            background = self
        if background is None and not expecting:
            return cast(Awaitable[None], original(self, scope, receive, send))
        return _serve_plain(background, original, self, scope, receive, send)

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


def hook_responses() -> None:
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


def shipped(function: Any, modules: Collection[str]) -> bool:
    """Whether it is the framework's own function and nobody's wrapper, which may pass for it in name."""
    return type(function) is FunctionType and function.__globals__.get("__name__") in modules


# Beforehand, since it reads a file, and the hooks are set on the event loop.
_known = Response.__dict__["__call__"]
_woven_in = _woven(_known)
