"""What an engine is: a place on other machines where runs execute. `aftertask.celery.CeleryEngine` is one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from ._taskrun import TaskRun
from .policies import Policy

OnUnavailable = Literal["raise", "local"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """
    Whether an engine can take runs.

    Attributes:
        ok: Whether it can: its broker answers, and so does at least one worker.
        detail: That in one sentence, for people.
    """

    ok: bool
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """
    A run that is to be handed to an engine.

    Attributes:
        run: The run; its id stays the same on the engine.
        arguments: What `Engine.encode` returned.
        expires_s: Seconds within which the run must start; None means no deadline.
        given_up: Set when its caller waits no longer, since the deadline has passed or the run was cancelled: an engine
            that looks right before it sends does not send what has failed, or run, here.
    """

    run: TaskRun
    arguments: object
    expires_s: float | None
    given_up: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class Risk:
    """
    A setting of an engine that loses or repeats runs.

    Attributes:
        setting: Its name.
        value: The value found.
        advice: What it does, and what to do.
    """

    setting: str
    value: object
    advice: str

    def text(self) -> str:
        """The risk in one sentence."""
        return f"{self.setting} is {self.value!r}: {self.advice}"


@runtime_checkable
class Engine(Protocol):
    """
    What `Settings(engines={name: engine})` takes; `@task(executor=name)` hands the runs of a task to it.

    Attributes:
        deadline: Seconds within which a run must be handed over; the run fails afterwards, or runs here.
        on_unavailable: Whether a run that could not be handed over fails (`"raise"`) or runs here (`"local"`).
    """

    @property
    def deadline(self) -> float: ...
    @property
    def on_unavailable(self) -> OnUnavailable: ...

    def encode(
        self, task: str, function: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> object:
        """
        The arguments as they will travel; called where the task is added, so it does no I/O.

        Raises:
            NotSerializable: An argument would not arrive as it is.
        """

    def submit(self, handover: Handover) -> str:
        """
        Hand a run over and return the queue it went to; called in a thread of its own, so it may block.

        Any exception means that the run was not handed over. A call that returns after the deadline has handed over a
        run that has failed, or run, here: the engine's side may then execute it a second time under the same id.
        """

    def health(self) -> Health:
        """Whether runs can be handed over now; it may block for a few seconds, and does not raise."""

    def risks(self, policies: Mapping[str, Policy]) -> Iterable[Risk]:
        """Settings that lose or repeat runs of the tasks with these policies; for `aftertask check`, so no I/O."""
