"""An app as `check` looks at it: its middleware and settings, its routes, its tasks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from .._core.route import endpoints_of, routes_of, with_included
from .._mistakes import collected
from ..engines import Risk
from ..policies import Policy, PolicyBook
from ..settings import Settings
from ..tasks import code_name, registered_tasks, registration, unwrap
from ._source import Module, Source

#: The middleware that a rule is about, also as bases of others.
_MIDDLEWARE = ("AftertaskMiddleware", "OpenTelemetryMiddleware", "BaseHTTPMiddleware")

#: Apps within apps, or middleware around an app, are followed no deeper than this: they may contain themselves.
_DEEPEST = 100


class Subject:
    """
    An app that is not run.

    Args:
        app: The ASGI app.
        workers: How many processes will serve it.
        build: Creates its middleware with the arguments that it was added with, and returns its settings; raises if
            they are wrong.

    Attributes:
        app: The same.
        mistake: Why the middleware refuses its arguments or the environment; None if it accepts them.
        settings: None if there is a mistake or no middleware.
        functions: Each task that is registered or added, by its name; not an endpoint that is only registered.
        built: The mistakes of all middlewares that were built, also of other apps in the module.
        tasks: The names of all tasks that are found, or that `Settings.policies` names, sorted.
    """

    def __init__(self, app: object, workers: int, build: Callable[..., Settings]) -> None:
        self.app, self.workers, self.source = app, workers, Source()
        self.routes = list(_routes(app))
        self.layers = list(_layers(app))
        self.settings: Settings | None = None
        self.mistake: str | None = None
        ours = [(args, kwargs) for kind, args, kwargs in self.layers if kind == "AftertaskMiddleware"]
        if ours:
            try:
                args, kwargs = ours[-1]
                self.settings = build(*args, **kwargs)
            except (TypeError, ValueError, ModuleNotFoundError) as error:
                self.mistake = str(error)
        self.built = collected.get() or []
        self.added = [one for module in self.modules() for one in module.added()]
        self._book = PolicyBook(self.settings.policies if self.settings is not None else {})
        endpoints = {id(endpoint) for endpoint in endpoints_of(app)}
        names = [each for module in self.modules() for each in module.names.values()]
        registered = [each for each in names if registration(each) and id(each) not in endpoints]
        self.functions: dict[str, Any] = {}
        for func in (*(one.func for one in self.added if one.func is not None), *registered):
            self.functions.setdefault(self.name(func), func)
        self.tasks = sorted({*(entry.name for entry in registered_tasks()), *self.functions, *self._book.named})

    def name(self, func: object) -> str:
        """A task's name."""
        entry = registration(unwrap(func)[0])
        return entry.name if entry is not None else code_name(func)

    def policy(self, name: str) -> Policy:
        """What is in force for a task."""
        declared = next((entry.policy for entry in registered_tasks() if entry.name == name), None)
        return self._book.policy(name, None, declared)

    def risks(self) -> Iterator[tuple[str, Risk]]:
        """Settings of each engine that lose or repeat runs of the tasks that are handed to it."""
        for name, engine in {} if self.settings is None else self.settings.engines.items():
            policies = {task: self.policy(task) for task in self.tasks}
            for risk in engine.risks({task: each for task, each in policies.items() if each.executor == name}):
                yield name, risk

    def modules(self) -> list[Module]:
        """The app's own modules."""
        found = [self.source.module(name) for name in list(sys.modules)]
        return [module for module in found if module is not None]


def _routes(app: object, depth: int = 0) -> Iterator[Any]:
    """Every route, below mounts and inside of middleware too."""
    for route in with_included(routes_of(app)):
        yield route
        if depth < 10:  # FastAPI wraps each route to give it its whole path
            yield from _routes(getattr(route, "route", route), depth + 1)


def _layers(app: Any) -> Iterator[tuple[str, tuple[object, ...], dict[str, Any]]]:
    """The middleware around an app, outermost first: its class's name, or a base's that counts, and its arguments."""
    for _ in range(_DEEPEST):
        if type(app).__name__ == "AftertaskMiddleware":
            yield "AftertaskMiddleware", (), {"settings": getattr(app, "settings", None)}
        for layer in getattr(app, "user_middleware", ()):
            cls = getattr(layer, "cls", None)
            if isinstance(cls, type):
                names = [base.__name__ for base in cls.__mro__]
                kind = next((name for name in _MIDDLEWARE if name in names), cls.__name__)
                yield kind, getattr(layer, "args", ()), dict(getattr(layer, "kwargs", getattr(layer, "options", {})))
        app = getattr(app, "app", None)
