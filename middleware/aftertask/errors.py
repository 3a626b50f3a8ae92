"""What aftertask raises, beside plain `ValueError` and `TypeError` for bad arguments."""

from __future__ import annotations


class AftertaskError(Exception):
    """The base of every error that aftertask itself raises."""


class NameClash(AftertaskError, ValueError):
    """Two different functions were registered under one task name."""


class RegistryClash(AftertaskError, ValueError):
    """The Prometheus registry already holds a family of ours that somebody else registered."""


class TaskTimeout(AftertaskError, TimeoutError):
    """A task's attempt took longer than the time limit of its policy."""

    __module__ = "aftertask"  # the name that signals tell it by


class QueueFull(AftertaskError):
    """A limit accepts no more runs for now: answer 503, or try again later."""

    __module__ = "aftertask"  # the name that signals tell it by


class NotSerializable(AftertaskError, TypeError):
    """A call was to go to another process, and something in it cannot be pickled."""

    __module__ = "aftertask"  # the name that signals tell it by
