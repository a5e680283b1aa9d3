"""A job waits in the queue of the smallest GPU that it fits."""

from __future__ import annotations

import pytest

from app.jobs.routing import larger, queue_for, usable_bytes
from secateur.problems import ProblemError

GIB = 1 << 30
ALL = ("cpu", "gpu.80g", "gpu.24g")


@pytest.mark.parametrize(
    ("gib", "queues", "queue"),
    [
        (0, ALL, "gpu.24g"),
        (21, ALL, "gpu.24g"),
        (23, ALL, "gpu.80g"),  # a card of 24 GiB never has all of it
        (500, ALL, "cpu"),
        (500, ("cpu",), "cpu"),
        (1, ("gpu.80g",), "gpu.80g"),
    ],
)
def test_the_smallest_gpu_that_is_large_enough(gib: int, queues: tuple[str, ...], queue: str) -> None:
    assert queue_for(gib * GIB, queues) == queue


def test_a_job_that_no_worker_can_hold_is_refused_by_name() -> None:
    with pytest.raises(ProblemError, match=r"needs 100\.0 GiB of memory; the queues are gpu\.24g, gpu\.80g") as problem:
        queue_for(100 * GIB, ["gpu.80g", "gpu.24g"])
    assert problem.value.code == "too_large_for_workers"


def test_one_class_up() -> None:
    assert larger("gpu.24g", ALL) == "gpu.80g"
    assert larger("gpu.16g", ALL) == "gpu.24g"  # also from a class that is no more
    assert larger("gpu.80g", ALL) is None
    assert larger("cpu", ALL) is None


def test_the_usable_part_of_a_card() -> None:
    assert 0.85 * 24 * GIB < usable_bytes("gpu.24g") < 24 * GIB
    with pytest.raises(ValueError, match="not the queue of a size"):
        usable_bytes("cpu")
