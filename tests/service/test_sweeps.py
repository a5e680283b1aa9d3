"""A sweep on real processes: two workers side by side, one dense evaluation, a table, and an end to all of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise

import pytest

from secateur.schemas.jobs import Job
from tests.service.conftest import Service, second_worker

METHODS = [{"name": "magnitude"}, {"name": "wanda"}, {"name": "sparsegpt"}]


@pytest.fixture(scope="module")
def _two_workers(service: Service) -> Iterator[None]:
    with second_worker(service):
        yield


def sweep(model: str, samples: int) -> dict[str, object]:
    """Nine jobs."""
    return {
        "model": {"source": "local", "id": model},
        "methods": METHODS,
        "sparsities": [0.5, 0.6, 0.7],
        "calibration": {"samples": samples, "sequence_length": 64},
        "evaluation": {"perplexity": {"sequence_length": 64, "max_windows": 4}},
    }


@pytest.mark.usefixtures("_two_workers")
def test_two_workers_finish_nine_jobs_and_the_table_is_what_those_measured(service: Service) -> None:
    made = service.client.sweeps.create(sweep("tiny", samples=2))
    *_, done = service.client.sweeps.watch(made.id)
    assert (done.status, done.progress.done) == ("succeeded", 9)
    jobs = {row.job_id: service.client.jobs.get(row.job_id) for row in done.table}
    for row in done.table:
        metrics = jobs[row.job_id].metrics
        assert metrics is not None
        assert metrics.perplexity is not None
        assert metrics.seconds is not None
        measured = (metrics.sparsity, metrics.perplexity.dense, metrics.perplexity.pruned, metrics.seconds.total)
        assert (row.sparsity, row.perplexity_dense, row.perplexity_pruned, row.seconds) == measured
        assert row.sparsity == pytest.approx(row.target, abs=0.005)
    cells = [(row.method["name"], row.target) for row in done.table]
    assert cells == [(method["name"], target) for method in METHODS for target in (0.5, 0.6, 0.7)]
    assert len({row.perplexity_dense for row in done.table}) == 1
    assert len(dense_evaluations(service, list(jobs))) == 1
    workers = {attempt.worker for job_id in jobs for attempt in service.client.jobs.attempts(job_id)}
    assert len(workers) == 2
    assert overlap(list(jobs.values()))


def dense_evaluations(service: Service, job_ids: list[str]) -> list[str]:
    """The jobs that measured the dense model as well: they walked through its blocks twice."""
    return [
        job_id
        for job_id in job_ids
        if any(event.data.get("total") == 4 for event in service.client.jobs.events(job_id) if event.type == "progress")
    ]


def overlap(jobs: list[Job]) -> bool:
    """Whether any two of them ran at the same time."""
    spans = sorted((job.started_at, job.finished_at) for job in jobs if job.started_at and job.finished_at)
    return any(later[0] < earlier[1] for earlier, later in pairwise(spans))


@pytest.mark.usefixtures("_two_workers")
def test_cancel_stops_all_of_it(service: Service) -> None:
    made = service.client.sweeps.create(sweep("slow", samples=512))
    deadline = time.monotonic() + 60
    while sum(row.status == "running" for row in service.client.sweeps.get(made.id).table) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    service.client.sweeps.cancel(made.id)
    *_, ended = service.client.sweeps.watch(made.id)
    assert {row.status for row in ended.table} <= {"cancelled", "succeeded"}
    assert ended.status == "cancelled"
    service.let_go(*(row.job_id for row in ended.table))
