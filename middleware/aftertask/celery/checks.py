"""Settings of Celery that can lose or repeat runs, found when a worker starts and by `aftertask check`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from celery import Celery

from ..engines import Risk
from ..policies import Policy

#: Seconds after which a broker delivers an unacknowledged message again (Redis), or closes the channel (RabbitMQ).
VISIBILITY_TIMEOUT = 3600.0
CONSUMER_TIMEOUT = 1800.0


def risks(app: Celery, ours: Mapping[str, Policy], *, system: str, pool: str) -> Iterator[Risk]:
    """
    Return what is wrong or risky in a worker's settings.

    Args:
        app: The Celery app, with all its tasks.
        ours: The policies of its tasks that are registered with `@task`.
        system: The broker, as `messaging.system`.
        pool: The worker's pool.
    """
    conf, options = app.conf, app.conf.broker_transport_options
    if conf.task_acks_late:
        advice = "a run whose worker dies is executed again: set it for idempotent tasks only (@task: idempotent=)"
        yield Risk("task_acks_late", True, advice)
    for name, task in app.tasks.items():
        theirs = not name.startswith("celery.") and name not in ours
        if theirs and task.acks_late and not task.reject_on_worker_lost:
            advice = "with acks_late alone a run whose process is killed is lost all the same: set both or neither"
            yield Risk(f"{name}.reject_on_worker_lost", False, advice)
    longest_s = max(map(_longest, ours.values()), default=0.0)
    if system == "redis":
        visible_s = float(options.get("visibility_timeout", VISIBILITY_TIMEOUT))
        if longest_s >= visible_s:
            advice = f"a run may take {longest_s:g} s with its back-off, and Redis delivers it again earlier: raise it"
            yield Risk("broker_transport_options.visibility_timeout", visible_s, advice)
        if "socket_timeout" not in options:
            advice = "a connection to a Redis that hangs never fails: set it, for example to 30"
            yield Risk("broker_transport_options.socket_timeout", None, advice)
    elif system == "rabbitmq":
        if longest_s >= CONSUMER_TIMEOUT:
            advice = (
                f"a run may take {longest_s:g} s, and RabbitMQ closes a channel whose message is not acknowledged for "
                f"longer than its consumer_timeout (1800 s if not set): raise it in rabbitmq.conf"
            )
            yield Risk("consumer_timeout", CONSUMER_TIMEOUT, advice)
        if not options.get("confirm_publish"):
            advice = "what RabbitMQ does not take counts as sent (not by CeleryEngine, which confirms): set it to True"
            yield Risk("broker_transport_options.confirm_publish", False, advice)
    if unsafe := sorted(set(conf.accept_content) - {"json", "application/json"}):
        yield Risk("accept_content", unsafe, "a message can run its sender's code: accept only json")
    if conf.worker_prefetch_multiplier != 1 and ours:
        advice = "a process reserves messages while others are idle, and a long run holds them up: set it to 1"
        yield Risk("worker_prefetch_multiplier", conf.worker_prefetch_multiplier, advice)
    if pool != "prefork" and (limited := [name for name, policy in ours.items() if policy.timeout is not None]):
        yield Risk("worker_pool", pool, f"only prefork ends runs at their timeout, which {limited[0]} has")


def _longest(policy: Policy) -> float:
    """Seconds for which a message of a task may stay unacknowledged: a worker holds it for a back-off, then runs it."""
    return (policy.timeout or 0.0) + (0.0 if policy.retry is None else policy.retry.wait_max)
