"""The output of one job as the input of the next, on real processes."""

from __future__ import annotations

import pytest

from tests.service.conftest import Service, recipe

EVALUATION = {"perplexity": {"sequence_length": 64, "max_windows": 4}}


def test_what_a_job_made_is_evaluated_and_pruned_further(service: Service) -> None:
    first = service.finish(service.client.jobs.create(recipe(evaluation=EVALUATION)).id)
    source = {"source": "artifact", "id": first.id}
    asked = {"kind": "evaluate", "model": source, "evaluation": EVALUATION}
    evaluated = service.finish(service.client.jobs.create(asked).id)
    further = recipe(evaluation=EVALUATION) | {"model": source, "sparsity": {"target": 0.75}}
    pruned = service.finish(service.client.jobs.create(further).id)
    for job in (first, evaluated, pruned):
        assert job.status == "succeeded", job.error
    assert first.metrics is not None
    assert first.metrics.perplexity is not None
    assert evaluated.metrics is not None
    assert evaluated.metrics.perplexity is not None
    assert evaluated.metrics.perplexity.value == pytest.approx(first.metrics.perplexity.pruned)
    assert (evaluated.artifacts, evaluated.repository) == ([], None)
    assert pruned.metrics is not None
    assert pruned.metrics.perplexity is not None
    assert pruned.metrics.perplexity.dense == evaluated.metrics.perplexity.value
    assert pruned.metrics.sparsity == pytest.approx(0.75, abs=0.001)
    report = service.client.jobs.report(pruned.id)
    assert report["recipe"]["model"] == {"source": "artifact", "id": "default/tiny-wanda-50", "revision": first.id}
    (parent,) = (file for file in first.artifacts if file.name == "compression_report.json")
    assert report["provenance"]["base_report_sha256"] == parent.sha256
