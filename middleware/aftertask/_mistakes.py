"""Mistakes in an app's setup that would go unnoticed: logged when it is built, and listed by `aftertask check`."""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import FunctionType, ModuleType

from ._core.advice import KEEP_RESULT, LOST_RESULT
from ._core.route import endpoints_of, serves
from ._log import log
from .policies import Limit, Policy, PolicyBook, is_pattern
from .settings import PREFIX, Settings, ignored_variables
from .tasks import Registered, attribute, code_name, registered_tasks, registration


@dataclass(frozen=True, slots=True)
class Mistake:
    """
    One thing that has no effect, or not the effect that it seems to have.

    Attributes:
        kind: `task_on_endpoint`, `metrics_path_taken`, `ignored_variable`, `no_journal`, `unused_policy` or
            `limit_name`.
        subject: The function, path, variable, task, pattern or name at fault.
        message, remedy: What is wrong, and what to do.
        func: The function at fault; None if a setting is.
    """

    kind: str
    subject: str
    message: str
    remedy: str
    func: object = None


#: Where the mistakes go instead of the log, for a command that reports them in its own way.
collected: ContextVar[list[Mistake] | None] = ContextVar("aftertask_mistakes", default=None)


def log_mistakes(app: object, settings: Settings) -> None:
    """Log each mistake in the setup of an app as one warning."""
    instead = collected.get()
    if instead is not None:
        instead.extend(mistakes(app, settings))
        return
    for found in (*mistakes(app, settings), *_refused_tasks(settings)):
        advice = f"{found.message}: {found.remedy}"
        log("warning", "setup.mistake", kind=found.kind, subject=found.subject, advice=advice)


def mistakes(app: object, settings: Settings) -> Iterator[Mistake]:
    """Each mistake in the setup of an app, its `@task`s and its settings."""
    for endpoint in endpoints_of(app):
        if registration(endpoint) is not None:
            name = code_name(endpoint)
            message = f"{name} is an endpoint and not a background task, so its @task does nothing"
            remedy = "put @task on the function that is passed to add_task()"
            yield Mistake("task_on_endpoint", name, message, remedy, endpoint)
    path = settings.metrics_path
    if path is not None and serves(app, path):
        message = f"the app serves {path} itself, so aftertask does not respond there"
        remedy = (
            "include Settings.registry in what that route serves, or choose another Settings.metrics_path (None for no "
            "endpoint)"
        )
        yield Mistake("metrics_path_taken", path, message, remedy)
    for setting in ignored_variables(settings):
        variable = f"{PREFIX}{setting.upper()}"
        message = f"{variable} is set, but an explicit Settings(…) ignores the environment"
        remedy = f"write Settings.from_env(…), whose keywords override the variables, or {setting}=… in Settings"
        yield Mistake("ignored_variable", variable, message, remedy)
    yield from _lost_results(settings)
    yield from _unused_policies(settings)
    yield from _limits(settings)


def _lost_results(settings: Settings) -> Iterator[Mistake]:
    for entry, policy in _without_journal(settings):
        if policy.keep_result and not policy.durable:  # a durable one is refused when it is added
            yield Mistake("no_journal", entry.name, f"{entry.name} {LOST_RESULT}", KEEP_RESULT, entry.function)


def _refused_tasks(settings: Settings) -> Iterator[Mistake]:
    """Durable tasks without a journal; not among `mistakes`, because the command finds them itself, as errors."""
    for entry, policy in _without_journal(settings):
        if policy.durable:
            message = f"{entry.name} is durable, so each request that adds it fails: there is no journal"
            remedy = "set Settings(journal=…), or leave durable=True out"
            yield Mistake("no_journal", entry.name, message, remedy, entry.function)


def _without_journal(settings: Settings) -> Iterator[tuple[Registered, Policy]]:
    book = PolicyBook(settings.policies)
    for entry in registered_tasks() if settings.journal is None else ():
        yield entry, book.policy(entry.name, None, entry.policy)


def _unused_policies(settings: Settings) -> Iterator[Mistake]:
    names = [entry.name for entry in registered_tasks()]
    for name in settings.policies:
        if not fnmatch.filter(names, name) and not _may_match_a_function(name):
            known = f"; registered tasks are {', '.join(sorted(names)[:10])}" if names else ""
            message = f"Settings.policies has {name!r}, which matches no task and no function of a loaded module"
            yield Mistake("unused_policy", name, message, f"write module.function, or the name in @task{known}")


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
            sizes = f"{limits[limit.name].size} and {limit.size}"
            message = (
                f"two limits are named {limit.name!r} and have different sizes, {sizes}, so each counts separately"
            )
            yield Mistake("limit_name", limit.name, message, "share one Limit object, or give each its own name")
