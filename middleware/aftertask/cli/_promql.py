"""PromQL over aftertask's own metrics: which names a query uses, whether they are emitted, and for which targets."""

from __future__ import annotations

import re

from ..signals import families

#: Metrics of parts that are still to come. A rule or panel on one of these is left out until its family is in
#: `families`; any other unknown name is an error.
PLANNED = frozenset({f"{families.PREFIX}events_dropped_total"})

# Not the middle of a recorded name such as job:aftertask_tasks_bad:ratio_rate5m.
_NAME = re.compile(rf"(?<![\w:]){families.PREFIX}\w+(?![\w:])")
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


def names(query: str) -> set[str]:
    """The sample names of ours that a query asks for."""
    return set(_NAME.findall(query))


def is_emitted(query: str) -> bool:
    """
    Whether aftertask emits every metric of a query.

    Raises:
        ValueError: A name is neither emitted nor planned.
    """
    unknown = names(query) - set(EMITTED)
    if wrong := sorted(unknown - PLANNED):
        raise ValueError(f"no metric is called {', '.join(wrong)}; see aftertask.signals.families: {query}")
    return not unknown


def select(query: str, selector: str) -> str:
    """The same query with label matchers, such as `job="api"`, added to each metric of ours."""
    if not selector:
        return query
    return _SELECTOR.sub(lambda found: f"{found[1]}{{{', '.join(filter(None, (selector, found[2])))}}}", query)
