"""Colours that mean the same on every panel: of outcomes, states, quantiles, and of the lines that are limits."""

from __future__ import annotations

from collections.abc import Iterator

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models import dashboard as models

OUTCOMES = {
    "succeeded": "green",
    "failed": "red",
    "timed_out": "orange",
    "rejected": "purple",
    "dropped": "yellow",
    "skipped": "dark-yellow",
    "cancelled": "#8e8e8e",
    "expired": "light-blue",
    "lost": "dark-red",
    "offloaded": "blue",
}
#: In flight is neither good nor bad.
STATES = {
    "scheduled": "super-light-blue",
    "queued": "light-blue",
    "running": "blue",
    "backoff": "dark-blue",
    "abandoned threads": "#8e8e8e",
}
QUANTILES = {
    "p50": "light-blue",
    "p95": "blue",
    "p99": "dark-blue",
    "p50 ok": "light-green",
    "p95 ok": "green",
    "p99 ok": "dark-green",
    "p50 error": "light-red",
    "p95 error": "red",
    "p99 error": "dark-red",
}
STATUSES = {"sent": "green", "failed": "red", "dropped": "yellow", "rate_limited": "purple"}
OTHERS = {
    "success rate": "green",
    "scheduled": "blue",
    "finished": "green",
    "waiting": "light-blue",
    "running": "blue",
    "oldest waiting": "light-blue",
    "oldest running": "blue",
    "1 s": "light-blue",
    "10 s": "blue",
    "60 s": "dark-blue",
}
#: Lines that are limits: dashed, without fill.
LIMITS = ("SLO", "timeout")

_BY_LABEL = {"{{outcome}}": OUTCOMES, "{{state}}": STATES}
_SINGLE = {**OTHERS, **QUANTILES, "abandoned threads": STATES["abandoned threads"]}


def by_name() -> dashboard.FieldColor:
    """A series keeps its colour whatever else is shown."""
    return dashboard.FieldColor().mode(models.FieldColorModeId.PALETTE_CLASSIC_BY_NAME)


def overrides(legends: list[str]) -> Iterator[tuple[str, list[models.DynamicConfigValue]]]:
    """What certain series of a panel look like, by their name."""
    for legend in legends:
        for name, colour in _BY_LABEL.get(legend, {}).items():
            yield name, [_colour(colour)]
        if legend in _SINGLE:
            yield legend, [_colour(_SINGLE[legend])]
        if legend in LIMITS:
            dashes = {"fill": "dash", "dash": [10, 10]}
            yield (
                legend,
                [
                    _colour("red"),
                    models.DynamicConfigValue(id_val="custom.lineStyle", value=dashes),
                    models.DynamicConfigValue(id_val="custom.fillOpacity", value=0),
                ],
            )
        if legend == "{{task}}":
            yield "__none__", [models.DynamicConfigValue(id_val="displayName", value="no task")]


def endings(legends: list[str]) -> Iterator[tuple[str, list[models.DynamicConfigValue]]]:
    """The same for series with a status after another word, by a regular expression."""
    if any(legend.endswith(" {{status}}") for legend in legends):
        for status, colour in STATUSES.items():
            yield f"/ {status}$/", [_colour(colour)]


def _colour(colour: str) -> models.DynamicConfigValue:
    return models.DynamicConfigValue(id_val="color", value={"mode": "fixed", "fixedColor": colour})
