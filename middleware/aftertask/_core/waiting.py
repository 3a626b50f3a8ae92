"""The runs of a request that wait for their turn, found by the object that the framework will call."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

from .run import Run


class Waiting:
    """Runs in the order of scheduling. A task object that is listed twice waits twice."""

    def __init__(self) -> None:
        # By identity: user's task classes may define equality. A waiting run keeps its target alive.
        self._runs: dict[int, list[Run]] = {}

    def __bool__(self) -> bool:
        return bool(self._runs)

    def __contains__(self, target: object) -> bool:
        return id(target) in self._runs

    def add(self, run: Run) -> None:
        """The run waits behind those of the same target."""
        self._runs.setdefault(id(run.target), []).append(run)

    def put_back(self, run: Run) -> None:
        """A run whose turn was cancelled waits again, before those of the same target."""
        self._runs.setdefault(id(run.target), []).insert(0, run)

    def first(self, target: object) -> Run | None:
        """The next run of this target, which stays."""
        runs = self._runs.get(id(target))
        return runs[0] if runs else None

    def take(self, target: object) -> Run | None:
        """The next run of this target; None if none waits."""
        runs = self._runs.get(id(target))
        if not runs:
            return None
        run = runs.pop(0)
        if not runs:
            del self._runs[id(target)]
        return run

    def remove(self, run: Run) -> bool:
        """Take this very run; False if it does not wait."""
        runs = self._runs.get(id(run.target), [])
        if run not in runs:
            return False
        runs.remove(run)
        if not runs:
            del self._runs[id(run.target)]
        return True

    def count(self, target: object) -> int:
        """How many runs of this target wait."""
        return len(self._runs.get(id(target), ()))

    def all(self) -> list[Run]:
        """Every run that waits."""
        return list(itertools.chain.from_iterable(self._runs.values()))

    def of(self, background: object) -> list[Run]:
        """Every run of one background."""
        return [run for run in self.all() if run.background is background]

    def take_all(self, background: object = None) -> list[Run]:
        """Take every run, or every run of one background."""
        runs = self.all() if background is None else self.of(background)
        for run in runs:
            self.take(run.target)
        return runs


class Owed:
    """
    Compensating runs that wait for the error response.

    The response may be sent by a middleware around ours, after our call has returned. If the scope that holds them is
    freed without one, they end as dropped.

    Args:
        runs: The runs, in any order.
        end: Ends those that will not run.
    """

    def __init__(self, runs: Iterable[Run], end: Callable[[Sequence[Run]], None]) -> None:
        self.runs = sorted(runs, key=lambda run: run.info.priority)
        self._end = end

    def give_up(self) -> None:
        """End the runs that have not run."""
        runs, self.runs = self.runs, []
        self._end(runs)

    def __del__(self) -> None:
        self.give_up()
