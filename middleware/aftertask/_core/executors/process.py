"""A function in a worker process, for work that keeps a processor busy."""

from __future__ import annotations

import functools
import io
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.to_process

from ..._text import error_message, stack, type_name
from ...errors import NotSerializable, ProcessTaskError
from ...tasks import is_async, without_options
from ..loops import on_trio
from .output import Output, captured, followed, forward_logging

#: What a worker process calls the parent's `__main__`.
_WORKERS_MAIN = "__mp_main__"


@dataclass(frozen=True, slots=True)
class _Raised:
    """
    What a function raised in the worker, as data that always crosses, whatever the exception is made of.

    Attributes:
        message, stack: Text, not redacted yet.
        type_name, type_names: Its class, and that with all base classes, as `module.Qualname`.
        pickled: The exception itself; None if it does not survive pickling.
    """

    message: str
    stack: str
    type_name: str
    type_names: tuple[str, ...]
    pickled: bytes | None


async def call_in_process(
    function: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]
) -> None:
    """
    Call a function in a worker process once one is free; its result is thrown away there. Cancelling kills the process.

    What it prints and logs reaches stdout, stderr and the logging of this process, in the context of the caller.

    Raises:
        Exception: What the function raised, with the worker's `ProcessTaskError` as its cause.
        ProcessTaskError: It raised something that cannot be rebuilt here, or must not be raised here: `SystemExit`,
            `KeyboardInterrupt` and a `CancelledError` of its own would end the server or cancel the caller.
        BrokenWorkerProcess: The process died.
    """
    call = pickle.dumps((without_options(function), args, kwargs))
    backend = "trio" if on_trio() else "asyncio"
    with followed() as output:
        raised = await anyio.to_process.run_sync(_call, call, backend, output, cancellable=True)
    if raised is None:
        return
    remote, error = _remote(raised), _rebuilt(raised)
    try:
        if error is None:
            raise remote
        raise error from remote
    finally:
        del remote, error  # a traceback that holds this frame would be a reference cycle


def check_serializable(
    task_name: str, function: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]
) -> None:
    """
    Refuse a call that cannot be sent to a worker process.

    Raises:
        NotSerializable: The function or an argument cannot be pickled; the message names it, never its value.
    """
    cause = _pickling_error((without_options(function), args, kwargs))
    if cause is None:
        return
    parts = [("the function", without_options(function))]
    parts += [(f"argument {number}", value) for number, value in enumerate(args, 1)]
    parts += [(f"argument {name!r}", value) for name, value in kwargs.items()]
    culprits = (f"{part} ({type(value).__name__})" for part, value in parts if _pickling_error(value) is not None)
    raise NotSerializable(
        f"task {task_name} has executor='process', and {next(culprits, 'the call')} cannot be pickled: "
        f"{type(cause).__name__}; pass plain data, and a function that is defined at the top level of a module"
    )


def _pickling_error(value: object) -> Exception | None:
    try:
        pickle.dumps(value)
    except Exception as error:
        return error.with_traceback(None)
    return None


# --- in the worker


def _call(call: bytes, backend: str, output: Output | None) -> _Raised | None:
    """Call the function; return what it raised. Importing its module and rebuilding its arguments is part of that."""
    with captured(output):
        try:
            function, args, kwargs = pickle.loads(call)
            forward_logging(output)
            function = functools.partial(function, *args, **kwargs)
            if is_async(function):
                anyio.run(function, backend=backend)
            else:
                function()
        except BaseException as error:
            return _raised(error)
    return None


def _raised(error: BaseException) -> _Raised:
    names = tuple(_name_in_parent(kind) for kind in type(error).__mro__)
    # Redacted in the parent, by the app's own function.
    return _Raised(error_message(error, str), stack(error, str), names[0], names, _pickled(error))


def _name_in_parent(kind: type) -> str:
    name = type_name(kind)
    return f"__main__{name.removeprefix(_WORKERS_MAIN)}" if kind.__module__ == _WORKERS_MAIN else name


def _pickled(error: BaseException) -> bytes | None:
    """The exception; None if it cannot be rebuilt, or would be rebuilt as another class or with another message."""
    # Pickle looks up a class by the name of its module; anyio registers it since 4.14, multiprocessing another.
    if "__main__" in sys.modules:  # a parent that was not started from a file gives its workers none
        sys.modules[_WORKERS_MAIN] = sys.modules["__main__"]
    try:
        pickled = pickle.dumps(error)
        rebuilt = pickle.loads(pickled)
        return pickled if type(rebuilt) is type(error) and str(rebuilt) == str(error) else None
    except Exception:
        return None


# --- back in the parent


def _remote(raised: _Raised) -> ProcessTaskError:
    """What happened in the worker; wherever it is printed, as a cause too, the worker's stack follows."""
    error = ProcessTaskError(
        raised.message, type_name=raised.type_name, type_names=raised.type_names, stack=raised.stack
    )
    error.add_note(raised.stack)
    return error


def _rebuilt(raised: _Raised) -> Exception | None:
    if raised.pickled is None:
        return None
    try:
        error = _Unpickler(io.BytesIO(raised.pickled)).load()
    except Exception:  # such as a class of a module that only the worker can import
        return None
    return error if isinstance(error, Exception) else None


class _Unpickler(pickle.Unpickler):
    """Finds the classes of the app's main module, which has another name in the worker."""

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class("__main__" if module == _WORKERS_MAIN else module, name)
