"""The settings of one app as one frozen value; the only reader of `AFTERTASK_*` variables."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeVar

from opentelemetry.trace import TracerProvider
from prometheus_client import REGISTRY, CollectorRegistry

from ._signatures import takes
from ._taskrun import JOURNAL, LOCAL
from ._text import default_redact, name_hint, number_hint
from .alerts import Channel, Route
from .alerts.routing import routes, urls_in
from .alerts.signal import check_base_url, check_trace_url
from .engines import Engine
from .policies import EXECUTORS, ON_FAILURE, TRACES, Limit, OnFailure, Policy, Trace, check_whole, is_pattern, one_of
from .tasks import code_name, is_async

N = TypeVar("N", int, float)

PREFIX = "AFTERTASK_"
CONTEXTS = ("request", "endpoint")
RUN_AFTER = ("response", "request")
_ON, _OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


def request_id_from_state(scope: MutableMapping[str, Any]) -> str | None:
    """The request id that an earlier middleware left in `scope["state"]["request_id"]`; None if there is none."""
    state = scope.get("state")
    value = state.get("request_id") if isinstance(state, Mapping) else getattr(state, "request_id", None)
    return None if value is None else str(value)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """
    How aftertask observes one app.

    Args:
        metrics_path: Path that answers `GET` and `HEAD` with the metrics, relative to the root path; None: no endpoint.
        registry: The Prometheus registry; by default prometheus-client's own.
        tracer_provider: Where spans go; None means the global provider, as soon as there is one.
        trace: A task's span is a `"child"` of the request's span or a root with a `"link"` to it; `"none"`: no spans.
        context: Which context variables set by a sync endpoint its tasks see: only structlog's bound keys
            (`"request"`), or all of them (`"endpoint"`).
        on_failure: What a failure does to the later runs of the batch if the task's policy does not set it: `"stop"`,
            `"continue"` or `"contain"` (see `Policy`).
        run_after: When the tasks of a response start. `"response"`: as in Starlette. `"request"`: when the whole call
            of the app has returned, after the exit code of dependencies with `yield` (where a transaction is
            committed); if that call raised, the tasks are dropped with the reason `request_failed`.
        policies: Task name or pattern (`mail.*`, as `fnmatch`) to `Policy`; overrides what `@task` declares.
        redact: Called with the text of an exception before any signal sees it; returns the text to show.
        request_id: Finds the request's id in the ASGI scope. By default it is what an earlier middleware left in
            `scope["state"]["request_id"]`, never a raw header.
        success_log_rate: Maximum number of `task.succeeded` log lines per second; None: no maximum.
        journal: Path of the SQLite file that keeps durable runs and the history of all runs, on a local disk; all
            workers of a machine share it. Needs the extra `aftertask[journal]`. None: no journal.
        run_ids_header: Name of a response header with the ids of the runs that the response carries; None: no header.
        max_waiting: Maximum number of runs that may wait for a limit, if its `Limit` does not set one; one more raises
            `QueueFull`. None: no maximum.
        thread_limit: Maximum number of threads for tasks with `executor="thread"`, at least 1.
        drain_timeout: Seconds that runs get to finish at shutdown; they outlive the server's cancellation for that
            long. None: the server decides.
        shutdown_report: Log at SIGTERM, SIGINT and the lifespan's shutdown, and every 5 s after, which runs hold up
            the shutdown. Always done with a `drain_timeout`.
        block_threshold: Seconds without a response after which the event loop counts as blocked, at least 0.01; the run
            that blocks it is then reported. None: blocked loops are not reported, but the lag is still measured.
        exclude: Paths whose tasks are not observed: `/health`, `/internal/*`, `/items/{id}`.
        engines: Name to engine, such as `{"celery": CeleryEngine(app)}`; a task with that name as its `executor` is
            handed to it.
        alerts: Channels for alerts about failures: `Webhook`, `Apprise`, functions, URLs, or a `Route` around one of
            these.
        trace_url: Template of a link to a trace in alerts: `https://tempo.example.org/trace/{trace_id}`.
        runbook_url: URL under which the pages of `dashboards/runbooks/` are served, for the link in alerts.

    Raises:
        TypeError, ValueError: A value is invalid; the message names it.
    """

    metrics_path: str | None = "/metrics"
    registry: CollectorRegistry = REGISTRY
    tracer_provider: TracerProvider | None = None
    trace: Trace = "child"
    context: Literal["request", "endpoint"] = "request"
    on_failure: OnFailure = "stop"
    run_after: Literal["response", "request"] = "response"
    policies: Mapping[str, Policy] = field(default_factory=dict)
    redact: Callable[[str], str] = default_redact
    request_id: Callable[[MutableMapping[str, Any]], str | None] = request_id_from_state
    success_log_rate: float | None = 100.0
    journal: str | Path | None = None
    run_ids_header: str | None = None
    max_waiting: int | None = None
    thread_limit: int = 40
    drain_timeout: float | None = None
    shutdown_report: bool = False
    block_threshold: float | None = 0.25
    exclude: tuple[str, ...] = ()
    engines: Mapping[str, Engine] = field(default_factory=dict)
    alerts: Sequence[Channel | Route | str] = ()
    trace_url: str | None = None
    runbook_url: str | None = None

    #: Whether `from_env` created them.
    reads_environment: ClassVar[bool] = False

    def __new__(cls, *positional: object, **values: Any) -> Settings:
        """Refuse an unknown setting with a hint."""
        if positional:
            raise TypeError(f"Settings takes keywords only, got {positional[0]!r}; write Settings(metrics_path=…)")
        for name in values:
            if name not in cls.__dataclass_fields__:
                raise TypeError(unknown_setting(name))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        path = self.metrics_path
        if path is not None and not (isinstance(path, str) and path.startswith("/") and len(path) > 1):
            raise ValueError(f"Settings.metrics_path must be a path that begins with a slash, or None, got {path!r}")
        if not isinstance(self.registry, CollectorRegistry):
            raise TypeError(f"Settings.registry must be a prometheus_client.CollectorRegistry, got {self.registry!r}")
        if self.tracer_provider is not None and not hasattr(self.tracer_provider, "get_tracer"):
            raise TypeError(f"Settings.tracer_provider must be a TracerProvider or None, got {self.tracer_provider!r}")
        one_of(TRACES)("Settings.trace", self.trace)
        one_of(CONTEXTS)("Settings.context", self.context)
        one_of(ON_FAILURE)("Settings.on_failure", self.on_failure)
        one_of(RUN_AFTER)("Settings.run_after", self.run_after)
        if self.max_waiting is not None:
            check_whole("Settings.max_waiting", self.max_waiting, least=0, hint="; None means no maximum")
        check_whole("Settings.thread_limit", self.thread_limit, least=1)
        _number("drain_timeout", self.drain_timeout, "more than 0 seconds", lambda seconds: seconds > 0)
        if not isinstance(self.shutdown_report, bool):
            raise TypeError(f"Settings.shutdown_report must be True or False, got {self.shutdown_report!r}")
        _number("block_threshold", self.block_threshold, "at least 0.01 seconds", lambda seconds: seconds >= 0.01)
        for name in ("redact", "request_id"):
            if not callable(func := getattr(self, name)) or is_async(func):
                raise TypeError(f"Settings.{name} must be a function that is not async, got {func!r}")
            if not takes(func, 1):
                raise TypeError(f"Settings.{name} is called with one argument, but {code_name(func)} does not take one")
        _number("success_log_rate", self.success_log_rate, "at least 0 lines per second", lambda rate: rate >= 0)
        header = self.run_ids_header
        if header is not None and not (isinstance(header, str) and _HEADER_NAME.fullmatch(header)):
            raise ValueError(f"Settings.run_ids_header must be a header's name or None, got {header!r}")
        if self.journal is not None and (not isinstance(self.journal, (str, Path)) or not str(self.journal).strip()):
            raise TypeError(f"Settings.journal must be the path of a file or None, got {self.journal!r}")
        # A URL may hold a password; a Path made of one has lost a slash.
        if re.match(r"\s*[\w+.-]{2,}:/|file:|:memory:$", str(self.journal)):
            raise ValueError("Settings.journal must be the path of a SQLite file on a local disk, no URL or :memory:")
        object.__setattr__(self, "policies", _policies(self.policies, has_journal=self.journal is not None))
        object.__setattr__(self, "engines", _engines(self.engines))
        object.__setattr__(self, "exclude", _exclude(self.exclude))
        object.__setattr__(self, "alerts", tuple(routes(self.alerts)))
        check_trace_url("Settings.trace_url", self.trace_url)
        check_base_url("Settings.runbook_url", self.runbook_url)

    @classmethod
    def from_env(cls, **overrides: Any) -> Settings:
        """
        The settings from the `AFTERTASK_*` variables; keywords override them, and an empty variable counts as unset.

        Raises:
            ValueError: The value of a variable is invalid; the message names the variable.
        """
        values: dict[str, Any] = {}
        for name, text in sorted(os.environ.items()):
            if not name.startswith(PREFIX) or name == "AFTERTASK_DISABLED" or name.startswith("AFTERTASK_TEST_"):
                continue
            setting = name.removeprefix(PREFIX).lower()
            if setting not in _FROM_TEXT:
                _warn_unknown(name)
            elif setting not in overrides and text.strip():
                try:
                    values[setting] = _FROM_TEXT[setting](text)
                except ValueError as error:
                    value = "" if setting == "alerts" else f"={text!r}"  # a channel's URL is a secret
                    raise ValueError(f"{name}{value}: {error}") from None
        try:
            made = cls(**{**values, **overrides})
            object.__setattr__(made, "reads_environment", True)
            return made
        except ValueError as error:
            read = ", ".join(f"{PREFIX}{name.upper()}" for name in values)
            raise ValueError(f"{error} (from the environment: {read})" if read else str(error)) from None


def ignored_variables(settings: Settings) -> list[str]:
    """The settings that a variable would change, but that an explicit `Settings(…)` leaves at the default."""
    if settings.reads_environment:
        return []
    default = Settings()
    unset = [name for name in _FROM_TEXT if getattr(settings, name) == getattr(default, name)]
    return [name for name in unset if _would_change(name, getattr(default, name))]


def _would_change(name: str, value: object) -> bool:
    text = os.environ.get(PREFIX + name.upper(), "")
    try:
        return bool(text.strip()) and _FROM_TEXT[name](text) != value
    except ValueError:
        return True


def unknown_setting(name: str) -> str:
    """The message about an unknown setting."""
    if name in Policy.__dataclass_fields__:
        return f"{name!r} is an option of a task: write Settings(policies={{'*': Policy({name}=…)}}) or @task({name}=…)"
    return f"unknown setting {name!r}; {name_hint(name, [each.name for each in fields(Settings)])}"


def unknown_argument(name: str) -> str:
    """The message about an argument that the middleware does not take."""
    if name in Settings.__dataclass_fields__:
        return f"{name!r} is a setting, not an argument of AftertaskMiddleware; write settings=Settings({name}=…)"
    return f"AftertaskMiddleware takes settings= and signals=; {unknown_setting(name)}"


def disabled() -> bool:
    """Whether `AFTERTASK_DISABLED` turns the middleware off."""
    text = os.environ.get("AFTERTASK_DISABLED", "")
    try:
        return bool(text.strip()) and _flag(text)
    except ValueError as error:
        raise ValueError(f"AFTERTASK_DISABLED {error}, got {text!r}") from None


def _flag(text: str) -> bool:
    value = text.strip().lower()
    if value not in (*_ON, *_OFF):
        raise ValueError("must be 1 or 0")
    return value in _ON


def _optional_text(text: str) -> str | None:
    return None if text.strip().lower() in ("none", "null") else text.strip()


def _converted(text: str, kind: type[N], what: str) -> N:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"must be {what}") from None


def _optional(text: str, kind: type[N], what: str) -> N | None:
    return None if _optional_text(text) is None else _converted(text, kind, f"{what}, or none")


def _optional_name(text: str, what: str) -> str | None:
    if text.strip().lower() in (*_ON, *_OFF):
        raise ValueError(f"must be {what}, or none")
    return _optional_text(text)


def _paths(text: str) -> tuple[str, ...]:
    # A path may hold a semicolon, but hardly one at its end or before a slash.
    if re.search(r"[^,\s][;\s]\s*/|;\s*(,|$)", text):
        raise ValueError("the paths must be separated by commas: /health,/internal/*")
    return tuple(part.strip() for part in text.split(",") if part.strip())


_seconds = partial(_optional, kind=float, what="a number of seconds")

_FROM_TEXT: dict[str, Callable[[str], Any]] = {
    "metrics_path": _optional_text,
    "trace": str.strip,
    "on_failure": str.strip,
    "run_after": str.strip,
    "max_waiting": partial(_optional, kind=int, what="a whole number"),
    "thread_limit": partial(_converted, kind=int, what="a whole number"),
    "drain_timeout": _seconds,
    "shutdown_report": _flag,
    "block_threshold": _seconds,
    "context": str.strip,
    "success_log_rate": partial(_optional, kind=float, what="a number of lines per second"),
    "journal": partial(_optional_name, what="the path of a file, such as tasks.db"),
    "run_ids_header": partial(_optional_name, what="the name of a header, such as X-Run-Ids"),
    "exclude": _paths,
    "alerts": urls_in,
    "trace_url": _optional_text,
    "runbook_url": _optional_text,
}


def _warn_unknown(name: str) -> None:
    # Kubernetes gives every container variables for a Service of its namespace, and one may be called aftertask.
    if re.fullmatch(r"AFTERTASK_(SERVICE_(HOST|PORT).*|PORT(_.*)?)", name):
        return
    setting, known = name.removeprefix(PREFIX).lower(), [PREFIX + each.upper() for each in (*_FROM_TEXT, "disabled")]
    hint = unknown_setting(setting) if setting in Policy.__dataclass_fields__ else name_hint(name, known, PREFIX)
    if setting in Settings.__dataclass_fields__:
        hint = f"write it in code: Settings.from_env({setting}=…)"
    warnings.warn(f"unknown environment variable {name}; {hint}", stacklevel=4)


def _number(name: str, value: object, rule: str, holds: Callable[[float], bool]) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not holds(value)):
        raise ValueError(f"Settings.{name} must be {rule}, or None, got {value!r}{number_hint(value)}")


def _policies(policies: object, *, has_journal: bool) -> Mapping[str, Policy]:
    if not isinstance(policies, Mapping):
        raise TypeError(
            f"Settings.policies must map task names or patterns to Policy, got {type(policies).__name__}; "
            "write policies={'mail.*': Policy(timeout=20)}"
        )
    for name, policy in policies.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"Settings.policies: a key must be a task's name or a pattern, got {name!r}")
        if not isinstance(policy, Policy):
            options = (
                ", ".join(f"{key}={value!r}" for key, value in policy.items()) if isinstance(policy, dict) else "…"
            )
            raise TypeError(f"Settings.policies[{name!r}] must be a Policy, got {policy!r}; write Policy({options})")
        if policy.name is not None and is_pattern(name):
            raise ValueError(
                f"Settings.policies[{name!r}] has name={policy.name!r}, which all tasks that match would share; "
                "write @task(name=…) on each, or the exact name of one task as the key"
            )
        if policy.key is not None:
            raise ValueError(f"Settings.policies[{name!r}]: key belongs to one call; use options(func, key=…)")
        if not has_journal and (policy.durable or policy.keep_result):
            what = "durable" if policy.durable else "keep_result"
            raise ValueError(f"Settings.policies[{name!r}]: {what}=True needs Settings.journal, which is not set")
    limits: dict[str, Limit] = {}
    for policy in policies.values():
        if isinstance(policy.limit, Limit) and limits.setdefault(policy.limit.name, policy.limit) is not policy.limit:
            raise ValueError(f"Settings.policies: two limits are called {policy.limit.name!r}; share one Limit object")
    return MappingProxyType(dict(policies))


def _engines(engines: object) -> Mapping[str, Engine]:
    if not isinstance(engines, Mapping):
        raise TypeError(f"Settings.engines must map names to engines, got {engines!r}")
    for name, engine in engines.items():
        if not isinstance(name, str) or not name or name in (*EXECUTORS, JOURNAL, LOCAL):
            raise ValueError(f"Settings.engines: {name!r} cannot be an engine's name; use another, such as 'celery'")
        if not isinstance(engine, Engine):
            raise TypeError(f"Settings.engines[{name!r}] must be an engine, such as CeleryEngine(app), got {engine!r}")
    return MappingProxyType(dict(engines))


def _exclude(paths: object) -> tuple[str, ...]:
    if isinstance(paths, str) or not isinstance(paths, (list, tuple, set, frozenset)):
        hint = f"; write exclude=[{paths!r}]" if isinstance(paths, str) else ""
        raise TypeError(f"Settings.exclude must be a list of paths, got {paths!r}{hint}")
    for path in paths:
        if not isinstance(path, str) or not path.startswith("/"):
            raise ValueError(f"Settings.exclude: a path must begin with a slash, got {path!r}")
    return tuple(paths)
