"""An elastic model, made by one job and materialised at many sparsities, on real processes."""

from __future__ import annotations

import time

import pytest

from secateur import Client
from secateur.errors import SecateurError
from secateur.schemas.jobs import Job
from tests.service.conftest import Service, recipe, weights_of

EVALUATION = {"perplexity": {"sequence_length": 64, "max_windows": 4}}


@pytest.fixture(scope="module")
def elastic(service: Service) -> Job:
    """A small elastic model, with its curve."""
    body = recipe(kind="elastic", method="epts", evaluation=EVALUATION | {"sparsities": [0.4, 0.63]})
    del body["sparsity"]
    return service.finish(service.client.jobs.create(body).id)


def made_at(service: Service, elastic: Job, sparsity: float) -> Job:
    return service.finish(service.client.materialize(str(elastic.repository), sparsity).id)


def test_an_elastic_job_leaves_an_artifact_and_a_curve(service: Service, elastic: Job) -> None:
    assert elastic.status == "succeeded", elastic.error
    assert elastic.repository == "default/tiny-epts"
    assert {"elastic.json", "elastic.safetensors", "model.safetensors"} <= {file.name for file in elastic.artifacts}
    assert elastic.metrics is not None
    assert elastic.metrics.curve is not None
    assert [point.sparsity for point in elastic.metrics.curve] == [0.4, 0.63]
    assert "default/tiny-epts" in [model.id for model in service.client.models()]


def test_sparsities_come_from_one_model_each_of_its_own(service: Service, elastic: Job) -> None:
    rates = [0.25, 0.63, 0.9]  # ten of them, without a service around, are in tests/engine/test_elastic_runs.py
    asked = [service.client.materialize(elastic.id, rate) for rate in rates]
    jobs = [service.finish(job.id) for job in asked]
    assert [job.status for job in jobs] == ["succeeded"] * 3
    for rate, job in zip(rates, jobs, strict=True):
        assert job.metrics is not None
        assert job.metrics.sparsity == pytest.approx(rate, abs=0.01)
    assert len({str(weights_of(job)) for job in jobs}) == 3


def test_who_asks_for_the_same_again_gets_the_same_job_at_once(service: Service, elastic: Job) -> None:
    first = made_at(service, elastic, 0.63)
    began = time.monotonic()
    again = service.client.materialize(elastic.id, 0.63)
    assert (again.id, again.status) == (first.id, "succeeded")
    assert time.monotonic() - began < 5
    other = service.client.materialize(elastic.id, 0.63, allocation={"name": "per_block", "ratios": [1, 2]})
    assert other.id != first.id
    assert service.finish(other.id).status == "succeeded"


def test_a_materialised_sparsity_is_a_revision(service: Service, elastic: Job) -> None:
    made = made_at(service, elastic, 0.63)
    source = {"source": "artifact", "id": elastic.repository, "revision": "sparsity-0.63"}
    job = service.finish(service.client.jobs.create({"kind": "evaluate", "model": source, "evaluation": EVALUATION}).id)
    assert job.status == "succeeded", job.error
    assert job.recipe.model.revision == made.id
    assert job.metrics is not None
    assert job.metrics.perplexity is not None
    assert elastic.metrics is not None
    assert elastic.metrics.curve is not None
    assert job.metrics.perplexity.value == pytest.approx(elastic.metrics.curve[1].perplexity["epts"])


@pytest.mark.parametrize(
    ("model", "sparsity", "code"),
    [
        ("default/absent", 0.5, "model_not_found"),
        ("no such", 0.5, "not_found"),
        ("default/tiny-epts", 0.95, "validation_error"),
    ],
)
def test_what_cannot_be_materialised_is_told(service: Service, elastic: Job, model: str, sparsity: float, code: str) -> None:
    with pytest.raises(SecateurError) as refused:
        service.client.materialize(model, sparsity)
    assert getattr(refused.value, "code", None) == code


def test_a_pruned_model_is_not_elastic(service: Service) -> None:
    pruned = service.finish(service.client.jobs.create(recipe()).id)
    with pytest.raises(SecateurError) as refused:
        service.client.materialize(pruned.id, 0.5)
    assert getattr(refused.value, "code", None) == "model_not_elastic"


def test_another_tenants_key_does_not_see_it(service: Service, elastic: Job) -> None:
    with Client(service.url, api_key="sct_wrong") as stranger, pytest.raises(SecateurError):
        stranger.materialize(elastic.id, 0.5)
