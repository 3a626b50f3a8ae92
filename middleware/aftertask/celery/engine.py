"""`CeleryEngine`: hands runs to Celery, each as an ordinary message of its protocol 2."""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from celery import Celery
from opentelemetry.trace import TracerProvider

from .._encoding import encode
from .._text import error_type
from ..engines import Handover, Health, OnUnavailable, Risk
from ..errors import NotSerializable
from ..policies import Policy
from ..tasks import registration, unwrap, without_options
from .checks import risks
from .header import NAME, Header, fingerprint
from .publishing import REDACTED, connect, observe_publishing, system_of

#: Seconds that a task has for its cleanup after its timeout, before Celery kills its process.
GRACE = 10.0


class Encoded(NamedTuple):
    """The task's name on the worker, its arguments as JSON, and the fingerprint of its parameters."""

    name: str
    arguments: dict[str, object]
    signature: str


class CeleryEngine:
    """
    Runs tasks on Celery: `Settings(engines={"celery": CeleryEngine(app)})` and `@task(executor="celery")`.

    Args:
        app: The Celery app, with a broker.
        queues: The queue of all runs, or queues by priority: `{0: "default", 10: "bulk"}` sends a run to the entry with
            the largest key that is not above its priority. None means that Celery's own routing decides.
        on_unavailable: What happens to a run that could not be handed over: its attempt fails with `EngineUnavailable`
            (`"raise"`), or it runs in this process (`"local"`).
        deadline: Seconds within which a run must be handed over.
        tracer_provider: Where the PRODUCER spans go; None means the global provider.

    Raises:
        TypeError, ValueError: An argument is invalid.
    """

    def __init__(
        self,
        app: Celery,
        *,
        queues: str | Mapping[int, str] | None = None,
        on_unavailable: OnUnavailable = "raise",
        deadline: float = 2.0,
        tracer_provider: TracerProvider | None = None,
    ) -> None:
        if not isinstance(app, Celery):
            raise TypeError(f"CeleryEngine takes a Celery app, got {app!r}")
        if on_unavailable not in ("raise", "local"):
            raise ValueError(f"CeleryEngine.on_unavailable must be 'raise' or 'local', got {on_unavailable!r}")
        if not deadline > 0:
            raise ValueError(f"CeleryEngine.deadline must be more than 0 seconds, got {deadline!r}")
        if isinstance(queues, Mapping) and not queues:
            raise ValueError("CeleryEngine.queues is empty; name a queue, or pass None for Celery's own routing")
        self.on_unavailable: OnUnavailable = on_unavailable
        self.deadline = deadline
        self._app, self._queues, self._system = app, queues, system_of(app)
        self._publishing = observe_publishing(app, tracer_provider)
        self._here = threading.local()

    def encode(
        self, task: str, function: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> Encoded:
        """The parts of a call that the message needs; a policy may give the task another name than the worker's."""
        found, _ = unwrap(function)
        entry = registration(found)
        if entry is None or inspect.ismethod(found):
            raise NotSerializable(
                f"task {task} has executor='celery', but a worker finds only functions of a module with @task; mark it"
            )
        arguments = json.loads(encode(without_options(function), args, kwargs))
        if _is_rebuilt(arguments):
            names = [f"the argument {name!r}" for name, value in arguments.items() if _is_rebuilt(value)]
            raise NotSerializable(
                f"task {task}: {names[0] if names else 'its parameters'} cannot be sent: a worker reads a mapping of "
                f"just '__type__' and '__value__' as another type; rename a key, or send it as a string"
            )
        return Encoded(entry.name, arguments, fingerprint(found))

    def submit(self, handover: Handover) -> str:
        """Send the message and return its queue, or Celery's default queue if Celery's routing decides."""
        run = handover.run
        encoded = handover.arguments
        assert isinstance(encoded, Encoded)
        header = Header(
            scheduled_at=run.timestamp,
            http_route=run.http_route,
            http_method=run.http_method,
            request_id=run.request_id,
            signature=encoded.signature,
        )
        timeout, queue = run.info.timeout, self._queue(run.info.priority)
        producer = kept = getattr(self._here, "producer", None)
        if producer is None:
            connection = connect(self._app, self._system, self.deadline)
            producer = self._here.producer = self._app.amqp.Producer(connection, auto_declare=False)
        if handover.given_up.is_set():
            raise TimeoutError("the connection took longer than the deadline")
        try:
            self._app.send_task(
                encoded.name,
                kwargs=encoded.arguments,
                task_id=run.id,
                queue=queue,
                expires=handover.expires_s,
                soft_time_limit=timeout,
                time_limit=None if timeout is None else timeout + GRACE,
                headers={NAME: header.plain()},
                serializer="json",
                ignore_result=True,
                retry=False,
                confirm_timeout=self.deadline,
                producer=producer,
                **REDACTED,
            )
        except Exception as error:
            self._publishing.sending.end(failed=True, error_type=error_type(error))
            self._here.producer = None
            producer.connection.collect()
            if kept is None or handover.given_up.is_set():
                raise  # the run has failed, or runs elsewhere: it must not be sent any more
            return self.submit(handover)  # a kept connection may have been broken for long: once more, on a new one
        return queue or str(self._app.conf.task_default_queue)

    def health(self) -> Health:
        """Whether the broker responds, and a worker responds through it (`app.control.ping`)."""
        try:
            with connect(self._app, self._system, self.deadline) as connection:
                names = [next(iter(each)) for each in self._app.control.ping(timeout=1.0, connection=connection)]
        except Exception as error:
            return Health(ok=False, detail=f"the broker does not respond: {error_type(error)}")
        return Health(ok=bool(names), detail=f"workers: {', '.join(sorted(names)) or 'none responds'}")

    def risks(self, policies: Mapping[str, Policy]) -> Iterator[Risk]:
        """The findings of `checks`, for the pool in Celery's settings."""
        return risks(self._app, policies, system=self._system, pool=str(self._app.conf.worker_pool))

    def _queue(self, priority: int) -> str | None:
        if self._queues is None or isinstance(self._queues, str):
            return self._queues
        return self._queues[max((key for key in self._queues if key <= priority), default=min(self._queues))]


def _is_rebuilt(value: object) -> bool:
    """Whether JSON has, at any depth, a mapping that kombu decodes into another type (`kombu.utils.json`)."""
    if isinstance(value, dict):
        return value.keys() == {"__type__", "__value__"} or any(map(_is_rebuilt, value.values()))
    return isinstance(value, list) and any(map(_is_rebuilt, value))
