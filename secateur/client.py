"""The client of a Secateur service: `Client`, and `AsyncClient` for an event loop. Both can do the same.

with Client() as client:
    job = client.jobs.create(recipe)
    job = client.jobs.wait(job.id)
    client.jobs.download(job.id, "pruned")
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import update_wrapper
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from secateur import _calls
from secateur._download import download
from secateur._drivers import AsyncDriver, Driver
from secateur._http import Call, Stream
from secateur.connection import find

F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")
T = TypeVar("T")


class _Blocking:
    def __init__(self, driver: Driver) -> None:
        self._driver = driver


class _Async:
    def __init__(self, driver: AsyncDriver) -> None:
        self._driver = driver


def _told_as(call: Callable[..., Any]) -> Callable[[F], F]:
    """`functools.wraps` for a method made of a function: it has the function's parameters behind `self`."""

    def tell(method: F) -> F:
        told = inspect.signature(call)
        itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        update_wrapper(method, call)
        parameters = [itself, *told.parameters.values()]
        method.__dict__["__signature__"] = told.replace(parameters=parameters, return_annotation=told.empty)
        return method

    return tell


def _blocking(call: Callable[P, Call[T]]) -> Callable[Concatenate[_Blocking, P], T]:
    @_told_as(call)
    def method(self: _Blocking, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._driver.run(call(*args, **kwargs))

    return method


def _blocking_loop(stream: Callable[P, Stream[T]]) -> Callable[Concatenate[_Blocking, P], Iterator[T]]:
    @_told_as(stream)
    def method(self: _Blocking, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return self._driver.iterate(stream(*args, **kwargs))

    return method


def _async(call: Callable[P, Call[T]]) -> Callable[Concatenate[_Async, P], Awaitable[T]]:
    @_told_as(call)
    async def method(self: _Async, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._driver.run(call(*args, **kwargs))

    return method


def _async_loop(stream: Callable[P, Stream[T]]) -> Callable[Concatenate[_Async, P], AsyncIterator[T]]:
    @_told_as(stream)
    def method(self: _Async, /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
        return self._driver.iterate(stream(*args, **kwargs))

    return method


class Jobs(_Blocking):
    """Submit jobs, follow them, and bring home what they made."""

    create = _blocking(_calls.create_job)
    estimate = _blocking(_calls.estimate_job)
    get = _blocking(_calls.get_job)
    list = _blocking_loop(_calls.list_jobs)
    cancel = _blocking(_calls.cancel_job)
    delete = _blocking(_calls.delete_job)
    retry = _blocking(_calls.retry_job)
    retry_integrations = _blocking(_calls.retry_integrations)
    events = _blocking_loop(_calls.events_of_job)
    stream_events = _blocking_loop(_calls.stream_events)
    watch = _blocking_loop(_calls.watch_job)
    wait = _blocking(_calls.wait_for_job)
    report = _blocking(_calls.report_of_job)
    artifacts = _blocking(_calls.artifacts_of_job)
    attempts = _blocking(_calls.attempts_of_job)
    download = _blocking(download)


class AsyncJobs(_Async):
    """Submit jobs, follow them, and bring home what they made."""

    create = _async(_calls.create_job)
    estimate = _async(_calls.estimate_job)
    get = _async(_calls.get_job)
    list = _async_loop(_calls.list_jobs)
    cancel = _async(_calls.cancel_job)
    delete = _async(_calls.delete_job)
    retry = _async(_calls.retry_job)
    retry_integrations = _async(_calls.retry_integrations)
    events = _async_loop(_calls.events_of_job)
    stream_events = _async_loop(_calls.stream_events)
    watch = _async_loop(_calls.watch_job)
    wait = _async(_calls.wait_for_job)
    report = _async(_calls.report_of_job)
    artifacts = _async(_calls.artifacts_of_job)
    attempts = _async(_calls.attempts_of_job)
    download = _async(download)


class Sweeps(_Blocking):
    """One model pruned by several methods to several sparsities, a job each."""

    create = _blocking(_calls.create_sweep)
    get = _blocking(_calls.get_sweep)
    list = _blocking_loop(_calls.list_sweeps)
    watch = _blocking_loop(_calls.watch_sweep)
    cancel = _blocking(_calls.cancel_sweep)
    delete = _blocking(_calls.delete_sweep)


class AsyncSweeps(_Async):
    """One model pruned by several methods to several sparsities, a job each."""

    create = _async(_calls.create_sweep)
    get = _async(_calls.get_sweep)
    list = _async_loop(_calls.list_sweeps)
    watch = _async_loop(_calls.watch_sweep)
    cancel = _async(_calls.cancel_sweep)
    delete = _async(_calls.delete_sweep)


class Webhooks(_Blocking):
    """Addresses that are told what happens to jobs."""

    create = _blocking(_calls.create_webhook)
    list = _blocking_loop(_calls.list_webhooks)
    delete = _blocking(_calls.delete_webhook)
    ping = _blocking(_calls.ping_webhook)
    deliveries = _blocking_loop(_calls.deliveries_to_webhook)


class AsyncWebhooks(_Async):
    """Addresses that are told what happens to jobs."""

    create = _async(_calls.create_webhook)
    list = _async_loop(_calls.list_webhooks)
    delete = _async(_calls.delete_webhook)
    ping = _async(_calls.ping_webhook)
    deliveries = _async_loop(_calls.deliveries_to_webhook)


class Client(_Blocking):
    """A service, spoken to by blocking calls."""

    methods = _blocking(_calls.list_methods)
    models = _blocking_loop(_calls.list_models)
    materialize = _blocking(_calls.materialize_model)
    set_hub_token = _blocking(_calls.set_hub_token)
    forget_hub_token = _blocking(_calls.forget_hub_token)
    set_secret = _blocking(_calls.set_secret)
    forget_secret = _blocking(_calls.forget_secret)

    def __init__(self, base_url: str | None = None, api_key: str | None = None, *, timeout: float = 30) -> None:
        """Raises NotConfiguredError if the address or the key is neither given nor found (see `secateur.connection`)."""
        super().__init__(Driver(find(base_url, api_key), timeout))
        self.jobs = Jobs(self._driver)
        self.sweeps = Sweeps(self._driver)
        self.webhooks = Webhooks(self._driver)

    def close(self) -> None:
        self._driver.http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient(_Async):
    """A service, spoken to on an event loop."""

    methods = _async(_calls.list_methods)
    models = _async_loop(_calls.list_models)
    materialize = _async(_calls.materialize_model)
    set_hub_token = _async(_calls.set_hub_token)
    forget_hub_token = _async(_calls.forget_hub_token)
    set_secret = _async(_calls.set_secret)
    forget_secret = _async(_calls.forget_secret)

    def __init__(self, base_url: str | None = None, api_key: str | None = None, *, timeout: float = 30) -> None:
        """Raises NotConfiguredError if the address or the key is neither given nor found (see `secateur.connection`)."""
        super().__init__(AsyncDriver(find(base_url, api_key), timeout))
        self.jobs = AsyncJobs(self._driver)
        self.sweeps = AsyncSweeps(self._driver)
        self.webhooks = AsyncWebhooks(self._driver)

    async def close(self) -> None:
        await self._driver.http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
