"""
The messages of a response on their way out, looked at only once somebody wants to: most requests have no task.

A `send` of ours around the server's would be called for each message of each request, to do nothing. Starlette puts one
around it anyway, `ServerErrorMiddleware`'s, which finds the server's in a cell of its closure: what is put into that
cell sees all messages, and until then nobody pays. Where our `send` is another one, a `partial` goes around it, which
can be told later on to call something else.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, MutableMapping
from types import CellType, CodeType
from typing import Any, cast

from starlette.middleware.errors import ServerErrorMiddleware

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


def watch(send: Send, by: Callable[[Send, Message], Awaitable[None]]) -> Callable[[], None]:
    """
    From now on each message goes out by `by(send, message)`; returns what ends that.

    Args:
        send: One whose code is `passes_on()`, or a `partial` of one.
        by: Gets the `send` to pass the message on to.
    """
    if isinstance(send, functools.partial):
        inner = send.func
        _turn(send, by, inner)
        return functools.partial(_turn, send, inner)
    cell = _cell(send)
    outer = cell.cell_contents
    cell.cell_contents = functools.partial(by, outer)
    return functools.partial(setattr, cell, "cell_contents", outer)


def _turn(send: Any, function: Callable[..., object], *args: object) -> None:
    send.__setstate__((function, args, {}, None))


def _cell(send: Any) -> CellType:
    cell: CellType = send.__closure__[send.__code__.co_freevars.index("send")]
    return cell


@functools.cache
def passes_on() -> CodeType | None:
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

    try:
        _run(ServerErrorMiddleware(cast(Any, app))({"type": "http"}, cast(Any, None), send))
        watch(given[0], lambda outer, message: _both(got, outer, message))
        _run(given[0]({"type": "x"}))
    except Exception:
        return None
    return cast(CodeType, given[0].__code__) if got == ["watched", {"type": "x"}] else None


async def _both(got: list[object], send: Send, message: Message) -> None:
    got.append("watched")
    await send(message)


def _run(coroutine: Any) -> None:
    try:
        coroutine.send(None)
    except StopIteration:
        pass
    else:
        coroutine.close()
        raise RuntimeError("it waits for something")
