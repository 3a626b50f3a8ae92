"""Celery: hand runs to it (`CeleryEngine`), and observe its workers (`instrument_worker`). Needs the extra `celery`."""

from __future__ import annotations

from .engine import CeleryEngine
from .worker import instrument_worker

__all__ = ["CeleryEngine", "instrument_worker"]
