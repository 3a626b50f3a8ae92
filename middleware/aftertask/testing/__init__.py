"""Helpers for tests of apps that use aftertask: a recorder that waits for events, and a clock that tests advance."""

from __future__ import annotations

from .clock import VirtualClock
from .recorder import Recorder, recorded

__all__ = ["Recorder", "VirtualClock", "recorded"]
