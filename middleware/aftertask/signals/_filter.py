"""`RunFilter`: the keys of the current run on the app's own stdlib log records."""

from __future__ import annotations

import logging

from ..events import current_run
from .logs import KEYS, run_keys


class RunFilter(logging.Filter):
    """
    Adds the keys of the current run (`task`, `run_id`, `trace_id`, …) to every stdlib log record.

    Add it to a handler: `handler.addFilter(RunFilter())`. Outside a run, the keys are None, so that a format can always
    name them.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the keys that the record does not have yet; always return True."""
        run = current_run()
        keys = dict.fromkeys(KEYS) if run is None else run_keys(run)
        for key, value in keys.items():
            if not hasattr(record, key):
                setattr(record, key, value)
        return True
