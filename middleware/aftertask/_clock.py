"""The only clock: tests turn it by replacing these names (`aftertask.testing.VirtualClock`)."""

from __future__ import annotations

import time

#: Seconds, for durations; its zero means nothing.
monotonic = time.perf_counter

#: Seconds since the Unix epoch, for what is shown to people.
timestamp = time.time
