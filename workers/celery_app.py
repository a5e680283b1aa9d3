"""Celery's configuration, and nothing else.

A message is a doorbell ("there is work on this queue"); the database knows which. So messages are acknowledged early,
carry no result, and losing or repeating one is harmless.
"""

from __future__ import annotations

import os
from typing import Any

from celery import Celery
from celery.signals import setup_logging, worker_process_init, worker_shutting_down
from kombu import Queue

from app.kit import logs
from app.settings import Settings
from workers import drain
from workers.lifeline import die_with_parent

settings = Settings()

app = Celery("secateur", broker=settings.broker.url, include=["workers.tasks"])
app.conf.update(
    accept_content=["json"],
    broker_connection_retry_on_startup=True,
    broker_transport_options={"socket_keepalive": True, "health_check_interval": 30},
    task_acks_late=False,
    task_ignore_result=True,
    task_serializer="json",
    # The doorbells that it hears are those of the queues that it claims from.
    task_queues=[Queue(name) for name in settings.worker.queues],
    task_default_queue=settings.worker.queues[0],
    # No hoarding: a message behind a job of two hours is left for a worker that is free.
    worker_prefetch_multiplier=1,
    worker_disable_prefetch=True,
    # A broker's blip must not end a job; the lease guards it.
    worker_cancel_long_running_tasks_on_connection_loss=False,
    worker_hijack_root_logger=False,
)


@setup_logging.connect
def _log_as_the_api_does(**_: Any) -> None:
    logs.configure()


@worker_process_init.connect
def _bind_pool_process(**_: Any) -> None:
    # A pool process whose parent was killed would go on renewing its lease, out of reach of everybody.
    die_with_parent(os.getppid())


@worker_shutting_down.connect
def _drain(**_: Any) -> None:
    drain.begin()
