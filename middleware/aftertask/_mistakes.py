"""What an app's set-up gets wrong in silence, found once when its middleware is built, and logged with the remedy."""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType, ModuleType

from ._core.route import routes_of, with_included
from ._log import log
from .policies import Limit, is_pattern
from .settings import Settings
from .tasks import attribute, code_name, registered_tasks, registration


@dataclass(frozen=True, slots=True)
class Mistake:
    """
    One thing that has no effect, or not the one that it seems to have.

    Attributes:
        kind: `task_on_endpoint`, `metrics_path_taken`, `unused_policy` or `limit_name`.
        subject: The function, path, pattern or name that it is about.
        advice: What is wrong and what to do, in one sentence.
    """

    kind: str
    subject: str
    advice: str


def log_mistakes(app: object, settings: Settings) -> None:
    """Log each mistake in the set-up of an app as one warning."""
    for found in (*_of_routes(app, settings.metrics_path), *_unused_policies(settings), *_limits(settings)):
        log("warning", "setup.mistake", kind=found.kind, subject=found.subject, advice=found.advice)


def _of_routes(app: object, metrics_path: str | None) -> Iterator[Mistake]:
    for route in with_included(routes_of(app)):
        endpoint = attribute(route, "endpoint")
        if registration(endpoint) is not None:
            advice = (
                "@task does nothing on an endpoint, which is no background task: put it on the function that is given "
                "to add_task()"
            )
            yield Mistake("task_on_endpoint", code_name(endpoint), advice)
        path = attribute(route, "path")
        if metrics_path is not None and isinstance(path, str) and path.rstrip("/") == metrics_path.rstrip("/"):
            advice = (
                "the app serves this path itself, so aftertask does not: include Settings.registry in what it serves, "
                "or choose another Settings.metrics_path (None for no endpoint)"
            )
            yield Mistake("metrics_path_taken", path, advice)


def _unused_policies(settings: Settings) -> Iterator[Mistake]:
    names = [entry.name for entry in registered_tasks()]
    for name in settings.policies:
        if not fnmatch.filter(names, name) and not _may_match_a_function(name):
            known = f"; registered tasks are {', '.join(sorted(names)[:10])}" if names else ""
            advice = f"this key of Settings.policies matches no task and no function of a loaded module{known}"
            yield Mistake("unused_policy", name, advice)


def _may_match_a_function(name: str) -> bool:
    """Whether a loaded module has a function that a key of `Settings.policies` names, or may have one."""
    head = re.split(r"[*?\[]", name)[0]
    if "<locals>" in name or not head.strip("."):
        return True
    if not is_pattern(name):
        return any(_has(module, name) for module in _modules(head))
    return any(
        fnmatch.fnmatchcase(f"{module.__name__}.{each}", name) or head.startswith(f"{module.__name__}.{each}.")
        for module in _modules(head)
        for each, value in list(vars(module).items())
        if isinstance(value, (FunctionType, type))
    )


def _modules(head: str) -> Iterator[ModuleType]:
    """The loaded modules whose functions may have a name that begins like this."""
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and (head.startswith(f"{name}.") or name.startswith(head)):
            yield module


def _has(module: ModuleType, name: str) -> bool:
    found: object = module
    for part in name.removeprefix(f"{module.__name__}.").split("."):
        found = attribute(found, part)
    return found is not None


def _limits(settings: Settings) -> Iterator[Mistake]:
    limits: dict[str, Limit] = {}
    for policy in (*(entry.policy for entry in registered_tasks()), *settings.policies.values()):
        limit = policy.limit
        if isinstance(limit, Limit) and limits.setdefault(limit.name, limit).size != limit.size:
            advice = (
                f"two limits have this name and different sizes, {limits[limit.name].size} and {limit.size}, so each "
                "counts for itself: share one Limit object, or give each its own name"
            )
            yield Mistake("limit_name", limit.name, advice)
