"""Pages and JSON from what the source returns. Everything that comes from a run is shown as text."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from anyio.lowlevel import checkpoint
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .. import _clock
from ._entry import Entry, Step, short, words

#: Control characters, marks that turn the direction of text around, and halves of characters.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

_PIECES = 50  # of a page that are rendered without a pause, in about half a millisecond
_WIDE = 600  # the width of a timeline, in units of its view box


def visible(value: object) -> object:
    """The text that a template prints: a hidden character appears as its code point, so no text imitates another."""
    if isinstance(value, str) and not isinstance(value, Markup) and _HIDDEN.search(value):
        return _HIDDEN.sub(lambda found: f"[U+{ord(found[0]):04X}]", value)
    return value


def seconds(value: float | None) -> str:
    """A duration for people: `0.4 ms`, `12 ms`, `1.24 s`, `2 min 5 s`, `1 h 3 min`; a dash for none."""
    if value is None:
        return "\N{EN DASH}"
    if value < 0.9995:
        return f"{value * 1000:.1f} ms" if value < 0.00995 else f"{value * 1000:.0f} ms"
    if value < 59.95:
        return f"{value:.2f} s" if value < 9.995 else f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def ago(at: float, now: float) -> str:
    """A moment for people: `now`, `4 s ago`, `3 min ago`, `2 h ago`, `5 d ago`."""
    passed = max(0.0, now - at)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if passed >= size:
            return f"{int(passed / size)} {unit} ago"
    return f"{int(passed)} s ago" if passed >= 1 else "now"


def iso(at: float | None) -> str | None:
    """A moment in ISO 8601, UTC, with milliseconds; None for None."""
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")


def clock(at: float, *, finely: bool = False) -> str:
    """The time of day, UTC; finely: with milliseconds."""
    return datetime.fromtimestamp(at, UTC).time().isoformat("milliseconds" if finely else "seconds")


def percent(share: float) -> str:
    """A share for people."""
    return f"{share:.1%}".replace("%", " %")


def shown(value: object) -> str:
    """A JSON value as text."""
    return json.dumps(value, ensure_ascii=False)


def bars(values: Sequence[float], most: float, height: float) -> str:
    """The path of a bar for each value, in a view box that is one unit wide for each; `most` is as high as the box."""
    if not most:
        return ""
    tops = ((at, max(value / most * height, 0.6)) for at, value in enumerate(values) if value)
    return "".join(f"M{at + 0.1:.1f} {height:g}v-{top:.2f}h.8v{top:.2f}z" for at, top in tops)


def segments(entry: Entry, now: float) -> list[tuple[Step, float, float]]:
    """The steps of a run with where each begins and how wide it is in a graph of 600 units."""
    steps = [step for step in entry.steps() if step.kind != "end"]
    end = max([now if entry.ended is None else entry.ended, *(step.started + (step.took_s or 0.0) for step in steps)])
    scale = _WIDE / max(end - entry.scheduled, 1e-6)
    begins = [max(0.0, min((step.started - entry.scheduled) * scale, _WIDE - 2)) for step in steps]
    took = [(end - step.started if step.took_s is None else step.took_s) * scale for step in steps]
    return [(step, at, min(max(wide, 2), _WIDE - at)) for step, at, wide in zip(steps, begins, took, strict=True)]


def templates() -> Callable[[str, dict[str, object]], Awaitable[str]]:
    """A function that renders a template by its name, without holding up the app's tasks."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        auto_reload=False,
        undefined=StrictUndefined,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (seconds, ago, iso, clock, percent, shown, words)
    environment.filters["fields"] = asdict
    environment.filters |= {each.__name__: each for each in filters}
    environment.globals |= {"bars": bars, "segments": segments}

    async def render(name: str, values: dict[str, object]) -> str:
        pieces = list[str]()
        for piece in environment.get_template(name).generate(values):
            pieces.append(piece)
            if len(pieces) % _PIECES == 0:
                await checkpoint()
        return "".join(pieces)

    return render


_TIMES = frozenset({"scheduled", "queued", "started", "ended", "at", "last_success", "last_bad", "failing_since"})
TASK = "task owner in_flight runs bad_runs p50_s p95_s wait_p95_s last_success last_bad failing_since"
_RUN = "id task state bad scheduled queued ended reason trace_id whose"
_ATTEMPT = "number started duration_s error_type message stack hint delay_s"


def run_json(entry: Entry) -> dict[str, object]:
    """A run as the API lists it."""
    last, origin, progress, now = entry.last, entry.origin, entry.progress, _clock.timestamp()
    return {
        **plain(entry, _RUN),
        "queue_wait_s": entry.waited_s(now),
        "duration_s": entry.took_s(now),
        "attempt": 0 if last is None else last.number,
        "max_attempts": entry.info.max_attempts,
        "error_type": (entry.raised or None) if last is None else last.error_type,
        "error_message": None if last is None else last.message,
        "http_method": origin.method,
        "http_route": origin.route,
        "request_id": origin.request_id,
        "progress": None if progress is None else progress.text,
        **({} if entry.stored is None else plain(entry.stored, "durable dead replay_of replayed_by")),
    }


def whole_run_json(entry: Entry, siblings: Sequence[Entry], stack: str | None) -> dict[str, object]:
    """A run with everything that is known about it."""
    return {
        **run_json(entry),
        "owner": entry.info.owner and short(entry.info.owner),
        "parent": entry.parent,
        "caused_by": None if entry.caused_by is None else entry.caused_by[0],
        "attempts": [plain(attempt, _ATTEMPT) for attempt in entry.attempts],
        "notes": [plain(note, "at kind text stack") for note in entry.notes],
        "stack_now": stack,
        "siblings": [run_json(each) for each in siblings],
    }


def plain(thing: object, names: str) -> dict[str, object]:
    """These attributes, moments as text."""
    return {name: iso(getattr(thing, name)) if name in _TIMES else getattr(thing, name) for name in names.split()}
