"""`note`: keys that show whose work a run is, attached to the request or the run that the caller is part of."""

from __future__ import annotations

from .._log import log
from .._taskrun import LONGEST_NOTE, Note, current_run
from .._text import Redact, redacted
from .serve import serving_here

#: At most this many keys of a request are kept, and as many of a run.
_MOST_NOTES = 10

_has_warned = False


def note(**keys: object) -> None:
    """
    Attach keys that show whose work a run is, such as `note(user_id=42)`.

    In a request they belong to all of its runs, those added before included; inside a task to its run alone. They
    appear as `notes` in log lines, alerts, `get_run` and `current_run`, also for a run that never started. Outside of a
    request and a run, and in a worker process, the call does nothing.

    Args:
        keys: Numbers and flags stay what they are, anything else is kept as text, cut to 200 characters; None removes a
            key. `Settings.redact` is applied to each. At most 10 keys are kept; further ones are left out, the
            first time with a warning in the log.
    """
    run = current_run()
    serving = serving_here.get()
    request = run.request if run is not None else None if serving is None else serving.request
    if request is None:
        return
    left_out = []
    kept = dict(request.notes if run is None else run.own_notes)
    for key, value in keys.items():
        if value is None:
            kept.pop(key, None)
        elif key in kept or len(kept) < _MOST_NOTES:
            kept[key] = _noted(key, value, request.redact)
        else:
            left_out.append(key)
    if left_out:
        _warn(left_out)
    if run is None:
        request.notes = kept
    else:
        run.own_notes = kept


def _warn(left_out: list[str]) -> None:
    """Log, once per process, that keys were left out."""
    global _has_warned
    if not _has_warned:
        _has_warned = True
        advice = f"a request keeps at most {_MOST_NOTES} keys, and so does a run: remove one by note(key=None)"
        log("warning", "note.left_out", left_out=left_out, advice=advice)


def _noted(key: str, value: object, redact: Redact) -> Note:
    try:
        text = str(value)[:LONGEST_NOTE]
    except Exception as error:
        text, value = f"[it cannot be read: {type(error).__name__}]", None
    # With its key: `token=…` is recognised by it.
    shown = redacted(f"{key}={text}", redact).removeprefix(f"{key}=")
    return value if shown == text and isinstance(value, (int, float)) else shown
