"""What holds for each task: its policy put together once, and the gates of its limits."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any

from starlette.background import BackgroundTask

from . import _intercept
from ._gates import Gate
from ._log import emit
from ._run import Plan
from .policies import (
    STUCK_AFTER,
    Limit,
    Policy,
    PolicyBook,
    code_name,
    executor_of,
    is_async,
    registered_tasks,
    registration,
    unwrap,
)

if TYPE_CHECKING:
    from .settings import Settings

#: The gates of limits that several tasks share, of whatever app.
_shared_gates: weakref.WeakKeyDictionary[Limit, Gate] = weakref.WeakKeyDictionary()

# Two requests may schedule a task's first run at once, in threads: they must find one gate.
_making = threading.RLock()


def _after_fork() -> None:
    global _making
    _making = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

#: With one of these a run is more than a call.
_GOVERNS = ("timeout", "retry", "limit", "expires", "on_error")

#: Functions made on the fly must not be kept for ever.
_PLANS = 2000


class Plans:
    """
    The plans of one app's tasks.

    Args:
        settings: The app's settings.
        threads: The gate of aftertask's own threads.
        on_plan: Told of each new plan.
        watch: Told of each gate, to show its numbers.
        know_timeout: Told of each task's time limit.
    """

    def __init__(
        self,
        settings: Settings,
        threads: Gate,
        on_plan: Callable[[Plan], None],
        watch: Sequence[Callable[..., None]],
        know_timeout: Sequence[Callable[[str, float], None]],
    ) -> None:
        self._settings, self._threads, self._on_plan = settings, threads, on_plan
        self._watch, self._know_timeout = watch, know_timeout
        self._policies = PolicyBook(settings.policies)
        self._gates: dict[str, Gate] = {}
        self._plans: dict[object, Plan] = {}
        self._functions: dict[FunctionType, Plan] = {}
        self._know_registered()

    def _know_registered(self) -> None:
        """What is known before the first run: limits and time limits of registered tasks."""
        for task, policy in self._registered():
            if policy.limit is not None:
                self._gate(policy.limit, task)
            if policy.timeout is not None:
                self._know(task, policy.timeout)

    def _registered(self) -> Iterator[tuple[str, Policy]]:
        """Each task that is known by name, and its policy put together."""
        declared = {entry.name: entry.policy for entry in registered_tasks()}
        for task in sorted({*declared, *self._policies.named}):
            yield task, self._policies.policy(task, None, declared.get(task))

    def _know(self, task: str, timeout: float) -> None:
        for know in self._know_timeout:
            know(task, timeout)

    def tell(self) -> None:
        """Say in the log which policies are in force, where there are any."""
        told = {task: said for task, policy in self._registered() if (said := policy.told())}
        patterns = {pattern: policy.told() for pattern, policy in self._policies.patterns}
        default = self._settings.on_failure
        if told or patterns or default != "stop":
            emit("info", "lifecycle.policies", on_failure=default, policies=told, patterns=patterns or None)

    def forget(self) -> None:
        """Put every plan together anew, from the next run on."""
        self._plans.clear()
        self._functions.clear()

    def of(self, target: Any, *, inside: bool = False) -> Plan:
        """
        What holds for a task: its name and its policy, put together once for each function.

        Args:
            target: A `BackgroundTask`, or anything else that was given as a background.
            inside: The function of a task class that calls it itself, not the class.
        """
        if type(target) is BackgroundTask:
            func = target.func
            plan = self._functions.get(func) if type(func) is FunctionType else None
            return plan or self._plan(func, False)
        whole = not inside and (not isinstance(target, BackgroundTask) or _intercept.is_whole(target))
        return self._plan(
            (type(target) if isinstance(target, BackgroundTask) else target) if whole else target.func, whole
        )

    def _plan(self, func: Any, whole: bool) -> Plan:
        if type(func) is FunctionType:
            key: object = (func.__module__, func.__qualname__, registration(func), whole, func.__code__.co_flags)
        else:
            inner, call = unwrap(func)
            key = (code_name(inner), registration(inner), call, whole, is_async(func))
        plan = self._plans.get(key)
        if plan is None:
            with _making:
                plan = self._plans.get(key) or self._make_plan(func, whole)
                if len(self._plans) >= _PLANS:
                    self._plans.clear()
                self._plans[key] = plan
        if (
            type(func) is FunctionType
            and not whole
            and func.__closure__ is None
            and "<locals>" not in func.__qualname__
        ):
            if len(self._functions) >= _PLANS:
                self._functions.clear()
            self._functions[func] = plan  # as good as for ever anyway: it belongs to its module
        return plan

    def _make_plan(self, func: Any, whole: bool) -> Plan:
        inner, call = unwrap(func)
        entry, code = registration(inner), code_name(inner)
        task = entry.name if entry is not None else code
        policy = self._policies.policy(task, call, entry.policy if entry is not None else None)
        executor = "inline" if whole else executor_of(func, policy)
        own_thread = executor == "thread" and policy.executor == "thread"
        on_failure = policy.on_failure or self._settings.on_failure
        if own_thread:
            for watch in self._watch:
                watch(self._threads, threads=True)
        if policy.timeout is not None and call is None:
            self._know(policy.name or task, policy.timeout)
        governed = own_thread or executor == "process" or any(getattr(policy, field) is not None for field in _GOVERNS)
        plan = Plan(
            task=policy.name or task,
            registered=entry is not None or self._policies.names(task),
            code=code,
            executor=executor,
            own_thread=own_thread,
            whole=whole,
            observe=policy.observe is not False,
            owner=policy.owner,
            expected=policy.classes,
            trace=policy.trace,
            timeout=policy.timeout,
            retry=None if whole else policy.retry,
            gate=None if policy.limit is None else self._gate(policy.limit, policy.name or task),
            max_waiting=self._max_waiting(policy.limit),
            priority=policy.priority or 0,
            on_failure=on_failure,
            expires=policy.expires,
            run_on_error=policy.run_on_error is True,
            idempotent=policy.idempotent is True,
            on_error=policy.on_error,
            alert=policy.alert is not False,
            severity=policy.severity,
            alert_after=policy.alert_after or 1,
            slow_after=policy.slow_after,
            stuck_after=policy.stuck_after or (2 * policy.timeout if policy.timeout else STUCK_AFTER),
            governed=governed,
            plain=not (governed or policy.priority) and on_failure == "stop",
        )
        if plan.observe:
            self._on_plan(plan)
        return plan

    def _gate(self, limit: int | Limit, task: str) -> Gate:
        """The gate of a limit: a number's belongs to this app's task, a `Limit`'s to all that share it."""
        if isinstance(limit, Limit):
            gate = _shared_gates.get(limit)
            if gate is None:
                gate = _shared_gates[limit] = Gate(limit.name, limit.size)
        else:
            gate = self._own_gate(task, limit)
            if gate.size != limit:  # options(limit=…) says another number: that is a gate of its own
                gate = self._own_gate(f"{task}:{limit}", limit)
        for watch in self._watch:
            watch(gate, threads=False)
        return gate

    def _own_gate(self, name: str, size: int) -> Gate:
        gate = self._gates.get(name)
        if gate is None:
            gate = self._gates[name] = Gate(name, size)
        return gate

    def _max_waiting(self, limit: int | Limit | None) -> int | None:
        own = limit.max_waiting if isinstance(limit, Limit) else None
        return self._settings.max_waiting if own is None else own
