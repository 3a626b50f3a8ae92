"""What keeps durable runs beyond the process, as the core sees it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from .._taskrun import RequestInfo
from .run import Run


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class StoredCall:
    """
    A call that the keeper has, to be run here.

    Attributes:
        id: Id of the run.
        origin: `journal` or `dead_letter`.
        timestamp: When the run was scheduled, in seconds since the Unix epoch.
        func, args, kwargs: The call.
        request: What is known of the request that scheduled it.
    """

    id: str
    origin: str
    timestamp: float
    func: Callable[..., object]
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    request: RequestInfo


#: Starts a stored call in the background.
Start: TypeAlias = Callable[[StoredCall], None]


class Keeper(Protocol):
    """
    Keeps durable runs. As a signal it writes their intents in `admit`; the events show what became of them.
    """

    def accept(self, run: Run) -> None:
        """
        A run that it has to keep was scheduled; from any thread.

        Raises:
            NotSerializable, DuplicateKey, JournalError: The run is not accepted.
        """
        ...

    def confirm(self, runs: Sequence[Run]) -> None:
        """The request of these runs has ended well: they may run."""
        ...

    async def claim(self, run: Run) -> bool:
        """Note that a run starts now, before it does; False if it must not, because it belongs to another worker."""
        ...

    async def watch(self, start: Start, waiting: Callable[[], Collection[str]]) -> None:
        """
        While the app runs: find what workers that are gone have left, and start what is ready.

        Args:
            start: Starts a run here.
            waiting: Names of the tasks whose runs cannot start at the moment.
        """
        ...
