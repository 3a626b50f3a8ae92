"""
The messages of a response on their way out, looked at only once somebody wants to: most requests have no task.

A `send` of ours around the server's would be called for each message of each request, to do nothing. Starlette puts one
around it anyway, `ServerErrorMiddleware`'s, which finds the server's in a cell of its closure: what is put into that
cell sees all messages, and until then nobody pays. Where our `send` is another one, a `partial` goes around it, which
can be made to call something else later on.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, MutableMapping
from types import CodeType, FunctionType
from typing import Any, cast

from starlette.middleware.errors import ServerErrorMiddleware

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
By = Callable[[Send, Message], Awaitable[None]]


class Around(functools.partial[Awaitable[None]]):
    """What goes around a `send`, and calls it."""

    __slots__ = ()

    def turn(self, by: By) -> Callable[[], None]:
        """Call `by` from now on; returns what ends that."""
        # A partial of a partial is one, so there is more to keep than a function.
        called = self.func, self.args, self.keywords, None
        put: Any = super().__setstate__  # type: ignore[misc]  # typeshed leaves it out
        put((by, (functools.partial(self.func, *self.args, **self.keywords),), {}, None))
        return functools.partial(put, called)


class Messages:
    """
    How one app's messages can be watched: found out at its first request.

    Args:
        tell: Called with whether each request's `send` has to come by `around`, at first True.
        refuses: Whether what watches may refuse a response: then it must not be behind `ServerErrorMiddleware`, which
            is to answer in its place.
    """

    def __init__(self, tell: Callable[[bool], None], *, refuses: bool) -> None:
        self._tell = tell
        self._wraps: bool | None = refuses or None
        tell(True)

    def around(self, send: Send) -> Send:
        """What a request sends by."""
        if self._wraps is None:
            self._wraps = not _has_cell(send)
            self._tell(self._wraps)
        return Around(send) if self._wraps else send

    def watch(self, send: Send, by: By) -> Callable[[], None]:
        """
        From now on each message of a request goes out by `by(send, message)`; returns what ends that.

        Where a request comes by another way than the first did (a middleware around us changes the `send` of some), its
        messages are not seen; those of all later ones are.
        """
        if isinstance(send, Around):
            return send.turn(by)
        if _has_cell(send):
            return _put_into_cell(send, by)
        self._wraps = True
        self._tell(True)
        return _nothing


def _has_cell(send: Send) -> bool:
    """Whether it is the `send` of `ServerErrorMiddleware`."""
    return type(send) is FunctionType and send.__code__ is _passes_on()


def _put_into_cell(send: Any, by: By) -> Callable[[], None]:
    cell = send.__closure__[send.__code__.co_freevars.index("send")]
    outer = cell.cell_contents
    cell.cell_contents = functools.partial(by, outer)
    return functools.partial(setattr, cell, "cell_contents", outer)


def _nothing() -> None:
    pass


@functools.cache
def _passes_on() -> CodeType | None:
    """
    The code of the `send` that `ServerErrorMiddleware` gives what is in it, found by letting it.

    None where what is put into that cell gets no messages: then it is another middleware than we know.
    """
    given: list[Any] = []
    got: list[object] = []

    async def app(scope: object, receive: object, send: object) -> None:
        given.append(send)

    async def send(message: object) -> None:
        got.append(message)

    async def by(send: Send, message: Message) -> None:
        got.append("watched")
        await send(message)

    try:
        _run(ServerErrorMiddleware(cast(Any, app))({"type": "http"}, cast(Any, None), send))
        _put_into_cell(given[0], by)
        _run(given[0]({"type": "x"}))
    except Exception:
        return None
    return cast(CodeType, given[0].__code__) if got == ["watched", {"type": "x"}] else None


def _run(coroutine: Any) -> None:
    try:
        coroutine.send(None)
    except StopIteration:
        return
    coroutine.close()
    raise RuntimeError("it waits for something")
