"""PromQL over aftertask's own metrics: whether the names in a query are emitted, and for which targets."""

from __future__ import annotations

import re

from ..signals import families

# Not the middle of a recorded name such as job:aftertask_tasks_bad:ratio_rate5m.
_SELECTOR = re.compile(rf"(?<![\w:])({families.PREFIX}\w+)(?![\w:])(?:\{{([^}}]*)\}})?")


def samples(family: families.Family) -> tuple[str, ...]:
    """The names under which Prometheus keeps a family."""
    if family.kind == "counter":
        return (f"{family.full_name}_total",)
    if family.kind == "histogram":
        return tuple(family.full_name + end for end in ("_bucket", "_sum", "_count"))
    return (family.full_name,)


#: Every sample name that is emitted today, and its family.
EMITTED = {name: family for family in families.FAMILIES for name in samples(family)}


def check(query: str) -> None:
    """Require that aftertask emits every metric of ours in a query. Raises ValueError."""
    unknown = {found[1] for found in _SELECTOR.finditer(query)} - EMITTED.keys()
    if unknown:
        raise ValueError(f"no metric is called {', '.join(sorted(unknown))}; see aftertask.signals.families: {query}")


def select(query: str, selector: str) -> str:
    """The same query with label matchers, such as `job="api"`, added to each metric of ours."""
    if not selector:
        return query
    return _SELECTOR.sub(lambda found: f"{found[1]}{{{', '.join(filter(None, (selector, found[2])))}}}", query)
