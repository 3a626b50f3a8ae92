"""`CeleryEngine` without a broker: what it refuses, how it encodes, and which settings of Celery it warns of."""

from __future__ import annotations

import re
import threading
from dataclasses import replace
from typing import Any

import pytest
from celery import Celery
from celery.app.task import Context

from aftertask import NotSerializable, Policy, Retry, options, task
from aftertask._core.emit import Emitter
from aftertask.celery import CeleryEngine
from aftertask.celery.tasks import register
from aftertask.engines import Handover
from aftertask.events import RequestInfo, TaskInfo, TaskRun
from aftertask.policies import PolicyBook

REDIS, RABBITMQ = "redis://127.0.0.1:1/0", "amqp://127.0.0.1:1//"
#: What each broker is always asked for here, so that a test sees only its own.
SAFE: dict[str, dict[str, object]] = {REDIS: {"socket_timeout": 30}, RABBITMQ: {"confirm_publish": True}}


def risks(broker: str, policy: Policy | None = None, options: dict[str, object] | None = None, **conf: Any) -> str:
    """What the engine warns of, one sentence a line."""
    app = Celery("shop", broker=broker, set_as_current=False)
    app.conf.update({"broker_transport_options": SAFE[broker], "worker_prefetch_multiplier": 1, **conf})
    if options is not None:
        app.conf.broker_transport_options = options
    return "\n".join(risk.text() for risk in CeleryEngine(app).risks({"mail": policy or Policy()}))


@pytest.mark.parametrize("broker", [REDIS, RABBITMQ])
def test_safe_settings_are_no_risk(broker: str) -> None:
    """Nothing is said."""
    assert risks(broker, Policy(timeout=60, retry=Retry(wait_max=600), idempotent=True)) == ""


@pytest.mark.parametrize(
    ("broker", "given", "message"),
    [
        (REDIS, {"task_acks_late": True}, "task_acks_late is True: a run whose worker dies is executed again"),
        (REDIS, {"accept_content": ["json", "pickle"]}, r"accept_content is \['pickle'\]: .* accept only json"),
        (REDIS, {"worker_prefetch_multiplier": 4}, "worker_prefetch_multiplier is 4: .* set it to 1"),
        (REDIS, {"options": {}}, "socket_timeout is None: a connection to a Redis that hangs never fails"),
        (REDIS, {"policy": Policy(timeout=7200)}, "visibility_timeout is 3600.0: a run may take 7200 s"),
        (REDIS, {"policy": Policy(retry=Retry(wait_max=4000))}, "visibility_timeout is 3600.0: a run may take 4000 s"),
        (
            REDIS,
            {"policy": Policy(timeout=3000, retry=Retry(wait_max=900))},
            "timeout is 3600.0: a run may take 3900 s",
        ),
        (RABBITMQ, {"policy": Policy(timeout=1900)}, "consumer_timeout is 1800.0: a run may take 1900 s"),
        (RABBITMQ, {"options": {}}, "confirm_publish is False: what RabbitMQ does not take counts as sent"),
        (REDIS, {"worker_pool": "threads", "policy": Policy(timeout=9)}, "worker_pool is 'threads': only prefork ends"),
    ],
)
def test_each_setting_that_loses_or_repeats_runs_is_named(broker: str, given: dict[str, Any], message: str) -> None:
    """With the value found and the remedy, and alone."""
    found = risks(broker, **given)
    assert re.search(message, found) and "\n" not in found


def test_a_celery_task_that_only_acknowledges_late_is_named() -> None:
    """With `acks_late` alone a killed run is lost all the same."""
    app = Celery("shop", broker=REDIS, set_as_current=False, broker_transport_options=SAFE[REDIS])

    @app.task(name="theirs", acks_late=True, shared=False)  # type: ignore[misc, untyped-decorator]
    def theirs() -> None: ...

    (risk,) = CeleryEngine(app).risks({})
    assert risk.text().startswith("theirs.reject_on_worker_lost is False: with acks_late alone")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"app": object()}, "takes a Celery app"),
        ({"on_unavailable": "journal"}, "must be 'raise' or 'local', got 'journal'"),
        ({"deadline": 0}, "must be more than 0 seconds, got 0"),
        ({"queues": {}}, "queues is empty"),
    ],
)
def test_a_wrong_argument_is_refused(given: dict[str, Any], message: str) -> None:
    """With the value and the way out."""
    with pytest.raises((TypeError, ValueError), match=message):
        CeleryEngine(**{"app": Celery("shop", broker=REDIS, set_as_current=False), **given})


def test_arguments_are_one_mapping_of_json() -> None:
    """Also those of an option; a function that no worker finds is refused."""

    @task(name="engines.mail", executor="celery")
    def mail(to: str, copies: int = 1) -> None: ...

    engine = CeleryEngine(Celery("shop", broker=REDIS, set_as_current=False))
    encoded = engine.encode("engines.mail", options(mail, timeout=3), ("a@b",), {"copies": 2})
    assert encoded.name == "engines.mail" and list(encoded.arguments.values()) == ["a@b", 2]
    with pytest.raises(NotSerializable, match=r"only functions of a module with @task"):
        engine.encode("print", print, (), {})


@pytest.mark.parametrize("kind", ["datetime", "unheard of"])
@pytest.mark.parametrize("nested", [False, True])
def test_what_a_worker_would_read_as_another_type_is_refused(kind: str, nested: bool) -> None:
    """Kombu rebuilds a value from a mapping with these two keys, or raises; with others it leaves it alone."""

    @task(name="engines.keep", executor="celery")
    def keep(data: dict[str, Any], copies: int = 1) -> None: ...

    engine = CeleryEngine(Celery("shop", broker=REDIS, set_as_current=False))
    marked = {"__type__": kind, "__value__": "2026-01-01T00:00:00"}
    with pytest.raises(NotSerializable, match=r"task engines.keep: the argument 'data' .* '__type__' and '__value__'"):
        engine.encode("engines.keep", keep, ({"in": [1, marked]} if nested else marked,), {})
    other = {**marked, "more": 1}
    assert engine.encode("engines.keep", keep, (other,), {}).arguments == {"data": other}


def test_parameters_that_a_worker_would_read_as_another_type_are_refused() -> None:
    """Their names alone make the mapping of all arguments such a one."""

    @task(name="engines.both", executor="celery")
    def both(__type__: str, __value__: str) -> None: ...

    engine = CeleryEngine(Celery("shop", broker=REDIS, set_as_current=False))
    with pytest.raises(NotSerializable, match=r"task engines.both: its parameters .* '__type__' and '__value__'"):
        engine.encode("engines.both", both, ("date", "2026-01-01"), {})


def test_a_retry_neither_expires_nor_shows_its_arguments() -> None:
    """`expires` is for the start of a run, and this one has started."""

    @task(name="engines.again", executor="celery", expires=60, retry=Retry())
    def again(secret: str) -> None: ...

    app = Celery("shop", broker="memory://", set_as_current=False)
    register(app, PolicyBook({}), Emitter([], str))
    request = Context(id="1", args=(), kwargs={"secret": "s3cr3t"}, expires="2026-01-01T00:00:00+00:00")
    retry = app.tasks["engines.again"].signature_from_request(request, retries=1)
    assert retry.options["task_id"] == "1" and retry.options["retries"] == 1
    assert (retry.options["expires"], retry.options["kwargsrepr"]) == (None, "<redacted>")


class Sender:
    """Stands for Celery's `send_task`: the first call fails, as over a connection that was dropped in silence."""

    def __init__(self, handover: Handover, *, given_up: bool) -> None:
        self.handover, self.given_up, self.names = handover, given_up, list[str]()

    def __call__(self, name: str, **_: object) -> None:
        self.names.append(name)
        if len(self.names) == 1:
            if self.given_up:  # while the socket waits for its timeout
                self.handover.given_up.set()
            raise ConnectionError("dropped")


def prepared() -> tuple[Celery, CeleryEngine, Handover]:
    """An app with a broker in memory, its engine, and a run to hand over."""

    @task(name="engines.mail", executor="celery")
    def mail() -> None: ...

    app = Celery("shop", broker="memory://", set_as_current=False)
    engine = CeleryEngine(app)
    run = TaskRun(TaskInfo("named by a policy", "engines.mail"), RequestInfo())
    return app, engine, Handover(run=run, arguments=engine.encode("engines.mail", mail, (), {}), expires_s=None)


@pytest.mark.parametrize(("given_up", "calls"), [(False, 2), (True, 1)])
def test_a_broken_connection_is_replaced_but_not_after_the_deadline(given_up: bool, calls: int) -> None:
    """By then the run has failed, or runs here: it must not be sent any more."""
    app, engine, handover = prepared()
    engine.submit(handover)  # its connection is kept
    app.send_task = sender = Sender(handover, given_up=given_up)
    if given_up:
        with pytest.raises(ConnectionError, match="dropped"):
            engine.submit(handover)
    else:
        engine.submit(handover)
    assert sender.names == ["engines.mail"] * calls


def test_a_run_that_was_given_up_while_the_engine_connected_is_not_sent() -> None:
    """Only its connection is kept, for the next one."""
    app, engine, handover = prepared()
    handover.given_up.set()
    with app.connection_for_read() as connection, connection.SimpleQueue("celery") as queue:
        queue.clear()  # of other tests
        with pytest.raises(TimeoutError, match="took longer than the deadline"):
            engine.submit(handover)
        assert queue.qsize() == 0
        engine.submit(replace(handover, given_up=threading.Event()))
        assert queue.qsize() == 1
