"""`note`: keys that show whose work a run is, attached to the request or the run that the caller is part of."""

from __future__ import annotations

from .._taskrun import LONGEST_NOTE, Note, current_run
from .._text import Redact, redacted
from .serve import serving_here

#: At most this many keys of a request are kept, and as many of a run.
_MOST_NOTES = 10


def note(**keys: object) -> None:
    """
    Attach keys that show whose work a run is, such as `note(user_id=42)`.

    In a request they belong to all of its runs, those added before included; inside a task to its run alone. They
    appear as `notes` in log lines, alerts, `get_run` and `current_run`, also for a run that never started. Outside of a
    request and a run, and in a worker process, the call does nothing.

    Args:
        keys: Numbers and flags stay what they are, anything else is kept as text, cut to 200 characters; None removes a
            key. `Settings.redact` is applied to each. At most 10 keys are kept; further ones are left out.
    """
    run = current_run()
    serving = serving_here.get()
    request = run.request if run is not None else None if serving is None else serving.request
    if request is None:
        return
    kept = dict(request.notes if run is None else run.own_notes)
    for key, value in keys.items():
        if value is None:
            kept.pop(key, None)
        elif key in kept or len(kept) < _MOST_NOTES:
            kept[key] = _noted(key, value, request.redact)
    if run is None:
        request.notes = kept
    else:
        run.own_notes = kept


def _noted(key: str, value: object, redact: Redact) -> Note:
    try:
        text = str(value)[:LONGEST_NOTE]
    except Exception as error:
        text = f"[it cannot be read: {type(error).__name__}]"
    # With its key: `token=…` is recognised by it.
    shown = redacted(f"{key}={text}", redact).removeprefix(f"{key}=")
    return value if shown == text and isinstance(value, (int, float)) else shown
