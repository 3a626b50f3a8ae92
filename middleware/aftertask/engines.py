"""The protocol of engines, which execute runs on other machines; `aftertask.celery.CeleryEngine` is one."""

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
        ok: Whether its broker responds, and at least one worker does, too.
        detail: The same in one sentence, for people.
    """

    ok: bool
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """
    A run to be handed to an engine.

    Attributes:
        run: The run; its id stays the same on the engine.
        arguments: What `Engine.encode` returned.
        expires_s: Seconds within which the run must start; None means no deadline.
        given_up: Set when the caller no longer waits, because the deadline has passed or the run was cancelled. An
            engine that checks it right before sending does not send a run that has already failed, or run, here.
    """

    run: TaskRun
    arguments: object
    expires_s: float | None
    given_up: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class Risk:
    """
    A setting of an engine that can lose or repeat runs.

    Attributes:
        setting: Its name.
        value: The value found.
        advice: Its effect, and what to do.
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
    An engine for `Settings(engines={name: engine})`; `@task(executor=name)` hands the runs of a task to it.

    Attributes:
        deadline: Seconds within which a run must be handed over; after that the run fails, or runs in this process.
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
        Encode the arguments for sending; called where the task is added, so it must do no I/O.

        Raises:
            NotSerializable: An argument would arrive changed.
        """

    def submit(self, handover: Handover) -> str:
        """
        Hand a run over and return the queue that it went to; called in a separate thread, so it may block.

        Any exception means that the run was not handed over. If a call returns after the deadline, its run has already
        failed, or run, in this process; the engine's worker may then execute it a second time under the same id.
        """

    def health(self) -> Health:
        """Return whether runs can be handed over now; it may block for a few seconds, and must not raise."""

    def risks(self, policies: Mapping[str, Policy]) -> Iterable[Risk]:
        """Settings that can lose or repeat runs of tasks with these policies; for `aftertask check`, without I/O."""
