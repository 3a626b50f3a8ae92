"""For the tests of apps that use aftertask: recorded events, waiting without sleeping, a clock that tests advance."""

from __future__ import annotations

from .clock import VirtualClock
from .recorder import Recorder, recorded

__all__ = ["Recorder", "VirtualClock", "recorded"]
