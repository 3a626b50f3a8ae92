"""A thread's processor time, as another thread may read it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from functools import partial


def clock_of_this_thread() -> Callable[[], float]:
    """Tells this thread's seconds of processor time, while it lives; the process's, where threads have no clock."""
    get, thread = getattr(time, "pthread_getcpuclockid", None), threading.get_ident()
    if get is None or thread not in sys._current_frames():  # gevent's threads are none
        return time.process_time
    return partial(time.clock_gettime, get(thread))


def is_fine(clock: Callable[[], float]) -> bool:
    """Whether a clock of processor time goes on with each look at it, and not by ticks: then it tells who sleeps."""
    first = clock()
    return any(clock() != first for _ in range(1000))
