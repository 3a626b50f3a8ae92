"""The exceptions that aftertask raises, besides `ValueError` and `TypeError` for bad arguments."""

from __future__ import annotations


class AftertaskError(Exception):
    """Base class of every error that aftertask raises itself."""


class NameClash(AftertaskError, ValueError):
    """Two different functions were registered under one task name."""


class RegistryClash(AftertaskError, ValueError):
    """The Prometheus registry already has a metric with the same name that is not aftertask's."""


class TaskTimeout(AftertaskError, TimeoutError):
    """An attempt took longer than the timeout of its task's policy."""

    __module__ = "aftertask"  # `error.type` is a public name


class QueueFull(AftertaskError):
    """A limit accepts no more runs at the moment; respond with 503, or try again later."""

    __module__ = "aftertask"


class EngineUnavailable(AftertaskError, ConnectionError):
    """An engine did not take a run within its deadline."""

    __module__ = "aftertask"


class UnknownMessage(AftertaskError, ValueError):
    """A message was written by a version of aftertask, or of the task, that this worker cannot read."""


class UnknownExecutor(AftertaskError, ValueError):
    """A task's `executor` is neither one of aftertask's nor an engine of the app."""


class NotSerializable(AftertaskError, TypeError):
    """A call that must leave the process, for a worker process or the journal, has a part that cannot be serialized."""

    __module__ = "aftertask"


class JournalError(AftertaskError, RuntimeError):
    """The journal cannot keep a durable run, so the run was not accepted; respond with 503, or try again later."""

    __module__ = "aftertask"


class DuplicateKey(AftertaskError, ValueError):
    """
    A run with the same key has not ended yet, so this one was not accepted.

    Attributes:
        key: The key set by `options(…, key=…)`.
        run_id: Id of the run that already has this key.
    """

    __module__ = "aftertask"

    def __init__(self, key: str, run_id: str) -> None:
        super().__init__(f"run {run_id} has the key {key!r} and has not ended yet, so a second one is not accepted")
        self.key, self.run_id = key, run_id


class ProcessTaskError(AftertaskError):
    """
    A task failed in a worker process with an exception that cannot be rebuilt here.

    Attributes:
        type_name: Class of the original exception as `module.Qualname`.
        type_names: The same for all its base classes, so that `expected` and `Retry.on` still match.
        stack: The original traceback as text.
    """

    __module__ = "aftertask"

    def __init__(self, message: str, *, type_name: str, type_names: tuple[str, ...], stack: str) -> None:
        super().__init__(message)
        self.type_name, self.type_names, self.stack = type_name, type_names, stack
