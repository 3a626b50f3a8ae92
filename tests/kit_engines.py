"""An engine in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from aftertask import Policy
from aftertask.engines import Handover, Health, OnUnavailable, Risk
from aftertask.errors import NotSerializable


class Memory:
    """An engine whose queue is a list. It can be closed, and it can hang; it sends nothing that was given up."""

    def __init__(self, *, on_unavailable: OnUnavailable = "raise", deadline: float = 5.0) -> None:
        self.on_unavailable: OnUnavailable = on_unavailable
        self.deadline = deadline
        self.asked: list[Handover] = []
        self.taken: list[Handover] = []
        self.threads: set[int] = set()
        self.is_closed = False
        self.goes_on = threading.Event()
        self.goes_on.set()

    def encode(
        self, task: str, function: Callable[..., object], args: tuple[Any, ...], kwargs: Mapping[str, object]
    ) -> object:
        """Anything but an exception can travel."""
        if any(isinstance(value, Exception) for value in args):
            raise NotSerializable(f"task {task}: an exception cannot travel")
        return args

    def submit(self, handover: Handover) -> str:
        """Keep it."""
        self.threads.add(threading.get_ident())
        self.goes_on.wait(20)
        self.asked.append(handover)
        if handover.given_up.is_set():
            raise TimeoutError("given up")
        if self.is_closed:
            raise OSError("refused")
        self.taken.append(handover)
        return "memory"

    def health(self) -> Health:
        """Whether it is open."""
        return Health(ok=not self.is_closed, detail="in memory")

    def risks(self, policies: Mapping[str, Policy]) -> list[Risk]:
        """Its queue is a list, which does not survive."""
        return [Risk("queue", "list", f"{name} is lost with the process") for name in policies]
