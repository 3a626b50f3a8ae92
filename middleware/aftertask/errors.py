"""What aftertask raises, beside plain `ValueError` and `TypeError` for bad arguments."""

from __future__ import annotations


class AftertaskError(Exception):
    """The base of every error that aftertask itself raises."""


class NameClash(AftertaskError, ValueError):
    """Two different functions were registered under one task name."""


class RegistryClash(AftertaskError, ValueError):
    """The Prometheus registry already holds a family of ours that somebody else registered."""
