"""What a job lives through, on real processes: it succeeds, is repeated, cancelled, and outlives its worker."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from secateur.schemas.jobs import Job
from tests.service.conftest import Service, recipe


def pruning_begun(job: Job) -> bool:
    return job.stage == "pruning" and job.progress is not None and job.progress.done >= 1


def test_job_ends_in_a_verified_download(service: Service, tmp_path: Path) -> None:
    evaluation = {"perplexity": {"sequence_length": 64, "max_windows": 4}}
    job = service.finish(service.client.jobs.create(recipe(evaluation=evaluation)).id)
    assert job.status == "succeeded"
    assert job.metrics is not None
    assert job.metrics.sparsity == pytest.approx(0.5, abs=0.001)
    assert job.metrics.perplexity is not None
    assert job.metrics.perplexity.pruned is not None
    assert job.repository == "default/tiny-wanda-50"
    folder = service.client.jobs.download(job.id, tmp_path / "model")
    for artifact in job.artifacts:
        assert hashlib.sha256((folder / artifact.name).read_bytes()).hexdigest() == artifact.sha256
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        weight = file.get_tensor("model.layers.0.mlp.up_proj.weight")
    assert (weight == 0).sum(dim=1).tolist() == [weight.shape[1] // 2] * weight.shape[0]


def test_events_tell_the_story_in_order_without_gaps(service: Service) -> None:
    job = service.finish(service.client.jobs.create(recipe()).id)
    events = list(service.client.jobs.events(job.id))
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    statuses = [event.data["status"] for event in events if event.type == "status"]
    assert statuses == ["queued", "running", "succeeded"]
    stages = [event.data["stage"] for event in events if event.type == "stage"]
    assert stages[0] == "downloading"
    assert stages[-1] == "uploading"
    assert "pruning" in stages


def test_same_job_twice_gives_the_same_bytes(service: Service) -> None:
    first, second = (service.finish(service.client.jobs.create(recipe(method="sparsegpt")).id) for _ in range(2))
    assert first.id != second.id
    digests = [{artifact.name: artifact.sha256 for artifact in job.artifacts} for job in (first, second)]
    assert digests[0] == digests[1]
    assert "model.safetensors" in digests[0]


def test_cancel_ends_the_child_within_five_seconds_and_leaves_nothing(service: Service) -> None:
    job = service.client.jobs.create(recipe("slow", samples=1024))
    service.wait(job.id, pruning_begun)
    assert service.runners()
    started = time.monotonic()
    assert service.client.jobs.cancel(job.id).status == "cancelling"
    while service.runners():
        assert time.monotonic() - started < 5
        time.sleep(0.02)
    ended = service.finish(job.id)
    assert ended.status == "cancelled"
    assert ended.artifacts == []
    service.let_go(job.id)


@pytest.mark.parametrize("victim", ["celery", "pool", "runner"])
def test_job_outlives_its_killed_worker(service: Service, victim: str) -> None:
    job = service.client.jobs.create(recipe("slow", samples=256))
    service.wait(job.id, pruning_begun)
    worker = service.pid_of("workers.celery_app")
    (runner,) = service.runners()
    pids = {"celery": worker, "pool": int(Path(f"/proc/{runner}/stat").read_text().split()[3]), "runner": runner}
    os.kill(pids[victim], signal.SIGKILL)
    ended = service.finish(job.id, seconds=300)
    assert (ended.status, ended.attempt) == ("succeeded", 2)
    assert any("taken over" in event.message for event in service.client.jobs.events(job.id) if event.type == "log")
    names = [artifact.name for artifact in ended.artifacts]
    assert len(names) == len(set(names))
    service.let_go(job.id)


def test_failed_job_says_why_and_can_be_retried(service: Service) -> None:
    job = service.client.jobs.create(recipe("broken"))
    ended = service.finish(job.id)
    assert ended.status == "failed"
    assert ended.error is not None
    assert ended.error.code == "nonfinite_activation"
    assert "block 1" in ended.error.detail
    assert ended.artifacts == []
    again = service.client.jobs.retry(job.id)
    assert again.retry_of == job.id
    assert service.finish(again.id).status == "failed"
