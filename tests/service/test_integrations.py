"""Finished models are taken to MLflow and to a hub, by the whole service; what goes wrong there never fails a job."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient, set_tracking_uri, transformers
from mlflow.entities import Run
from standardwebhooks.webhooks import Webhook

from secateur.errors import ProblemResponseError
from secateur.schemas.jobs import Job, JobIntegration, Status
from tests.hub_server import HubServer, serve_hub
from tests.mlflow_server import PROGRAM, serve_mlflow
from tests.receiver import serve_receiver
from tests.servers import free_port
from tests.service.conftest import Service, recipe, up

TOKEN = "hf_of_the_tenant"
needs_mlflow = pytest.mark.skipif(not PROGRAM.exists(), reason=f"there is no MLflow server at {PROGRAM}: `make mlflow`")


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with serve_hub() as server:
        server.tokens, server.writers = {TOKEN, "hf_that_only_reads"}, {TOKEN}
        yield server


@pytest.fixture(scope="module")
def mlflow_state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture(scope="module")
def mlflow_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def service(hub: HubServer, mlflow_port: int, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    environment = {
        "SECATEUR_HUB_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "SECATEUR_MLFLOW_URL": f"http://127.0.0.1:{mlflow_port}",
        "SECATEUR_INTEGRATIONS_ROUND_SECONDS": "0.3",
        "SECATEUR_INTEGRATIONS_RETRY_SECONDS": json.dumps([0.5] * 60),
        "SECATEUR_WEBHOOKS_ROUND_SECONDS": "0.2",
        "SECATEUR_WEBHOOKS_ALLOW_HTTP": "true",
        "SECATEUR_WEBHOOKS_ALLOW_NETWORKS": '["127.0.0.0/8"]',
    }
    with up(tmp_path_factory.mktemp("state"), models, **environment) as running:
        yield running


def taken(service: Service, job_id: str, until: Callable[[JobIntegration], bool], seconds: float = 90) -> JobIntegration:
    """The job's one integration, once `until` holds for it."""
    deadline = time.monotonic() + seconds
    while not until(one := service.client.jobs.get(job_id).integrations[0]):
        assert time.monotonic() < deadline, one
        time.sleep(0.1)
    return one


def ended(one: JobIntegration) -> bool:
    return one.status in {"succeeded", "failed", "skipped"}


def create(service: Service, *integrations: dict[str, Any], **more: Any) -> Job:
    return service.finish(service.client.jobs.create(recipe(integrations=list(integrations), **more)).id)


def tried(attempts: int, one: JobIntegration) -> bool:
    return one.attempts == attempts and ended(one)


# The hub


def test_a_model_is_pushed_with_its_card_and_again_without_a_second_commit(service: Service, hub: HubServer) -> None:
    service.client.set_hub_token(TOKEN)
    job = create(service, {"name": "hub_push", "repository": "acme/tiny-pruned"})
    pushed = taken(service, job.id, ended)
    assert (job.status, pushed.status, pushed.error) == (Status.SUCCEEDED, "succeeded", None)
    repository = hub.repositories["acme/tiny-pruned"]
    assert repository.private
    assert pushed.url == f"{hub.url}/acme/tiny-pruned/tree/{repository.commit}"
    assert set(repository.files) == {artifact.name for artifact in job.artifacts}
    assert repository.files["README.md"].startswith(b"---\nlibrary_name: transformers")
    for name in ("model.safetensors", "compression_report.json"):
        (artifact,) = (one for one in job.artifacts if one.name == name)
        assert len(repository.files[name]) == artifact.size
    commits = [entry for entry in hub.asked if "/commit/" in entry.path]
    again = create(service, {"name": "hub_push", "repository": "acme/tiny-pruned"})
    assert taken(service, again.id, ended).url == pushed.url
    assert [entry for entry in hub.asked if "/commit/" in entry.path] == commits


def test_a_wrong_token_is_a_problem_on_the_job_and_not_a_failed_job(service: Service) -> None:
    service.client.forget_hub_token()
    job = create(service, {"name": "hub_push", "repository": "acme/other"})
    for attempts, token in enumerate([None, "hf_nobody_knows", "hf_that_only_reads"], start=1):
        if token:
            service.client.set_hub_token(token)
            service.client.jobs.retry_integrations(job.id)
        refused = taken(service, job.id, partial(tried, attempts))
        assert (service.client.jobs.get(job.id).status, refused.status) == (Status.SUCCEEDED, "failed")
        assert refused.error is not None
        assert refused.error.code == "integration_refused"
        assert refused.error.hint
        assert not token or token not in refused.error.model_dump_json()
    service.client.set_hub_token(TOKEN)
    service.client.jobs.retry_integrations(job.id)
    assert taken(service, job.id, lambda one: one.status == "succeeded").attempts == 4


def test_a_failed_job_takes_nothing_anywhere(service: Service) -> None:
    job = create(service, {"name": "hub_push", "repository": "acme/never"}, model="broken")
    assert job.status == Status.FAILED
    assert [(one.status, one.attempts) for one in job.integrations] == [("skipped", 0)]


@pytest.mark.parametrize(
    ("wish", "pointer"),
    [
        ({"name": "carrier_pigeon"}, "/integrations/0/name"),
        ({"name": "hub_push"}, "/integrations/0/repository"),
        ({"name": "hub_push", "repository": "no-owner"}, "/integrations/0/repository"),
        ({"name": "hub_push", "repository": "a/b", "colour": "red"}, "/integrations/0/colour"),
    ],
)
def test_a_wrong_wish_is_refused_before_the_job(service: Service, wish: dict[str, Any], pointer: str) -> None:
    with pytest.raises(ProblemResponseError) as refused:
        service.client.jobs.create(recipe(integrations=[wish]))
    assert [fault.pointer for fault in refused.value.problem.errors] == [pointer]


def test_an_endpoint_is_told_the_life_of_a_job(service: Service) -> None:
    with serve_receiver() as receiver:
        endpoint = service.client.webhooks.create(receiver.url)
        job = create(service)
        deadline = time.monotonic() + 20
        while len(receiver.received) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert endpoint.secret is not None
        payloads = [Webhook(endpoint.secret).verify(sent.body, sent.headers) for sent in receiver.received]
        assert {payload["type"] for payload in payloads} == {"job.queued", "job.running", "job.succeeded"}
        assert {payload["data"]["id"] for payload in payloads} == {job.id}
        service.client.webhooks.delete(endpoint.id)


# MLflow


def run_of(client: MlflowClient, job: Job) -> Run:
    experiment = client.get_experiment_by_name("secateur")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`secateur.job_id` = '{job.id}'")
    return run


@needs_mlflow
@pytest.mark.timeout(300)
def test_mlflow_gets_run_model_and_version_when_it_is_back_and_gives_the_model_to_the_next_job(
    service: Service, mlflow_state: Path, mlflow_port: int, tmp_path: Path
) -> None:
    evaluation = {"perplexity": {"sequence_length": 64, "max_windows": 4}}
    job = create(service, {"name": "mlflow"}, evaluation=evaluation, metadata={"team": "search"})
    assert job.status == Status.SUCCEEDED
    # The server is down: the job has succeeded, and logging is tried again and again.
    waiting = taken(service, job.id, lambda one: one.attempts >= 2 and one.error is not None)
    assert waiting.error is not None
    assert (waiting.error.code, waiting.error.retryable) == ("integration_failed", True)

    with serve_mlflow(mlflow_state, mlflow_port) as url:
        logged = taken(service, job.id, ended, seconds=120)
        assert logged.status == "succeeded", logged.error
        client = MlflowClient(tracking_uri=url, registry_uri=url)
        run = run_of(client, job)
        assert logged.url is not None
        assert run.info.run_id in logged.url
        assert run.info.status == "FINISHED"
        assert job.metrics is not None
        assert run.data.metrics["sparsity"] == job.metrics.sparsity
        assert run.data.metrics["perplexity.pruned"] > 0
        assert (run.data.params["method.name"], run.data.params["sparsity.target"]) == ("wanda", "0.5")
        assert run.data.tags["label.team"] == "search"
        assert [entry.step for entry in client.get_metric_history(run.info.run_id, "block.sparsity")] == [0, 1]
        assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {"compression_report.json", "README.md"}

        version = client.get_model_version_by_alias("tiny-wanda-50", "challenger")
        assert version.run_id == run.info.run_id
        assert version.tags["secateur.base_model.id"] == "tiny"
        assert len(version.tags["secateur.base_model.sha256"]) == 64

        # Its URI prunes.
        wanted = recipe() | {"model": {"source": "mlflow", "id": "models:/tiny-wanda-50@challenger"}}
        second = service.client.jobs.create(wanted)
        assert second.recipe.model.id == "models:/tiny-wanda-50/1"
        assert second.repository == "default/tiny-wanda-50-wanda-50"
        assert service.finish(second.id).status == Status.SUCCEEDED
        weights = [{one.name: one.sha256 for one in each.artifacts} for each in (job, service.client.jobs.get(second.id))]
        assert weights[0].keys() == weights[1].keys()
        with pytest.raises(ProblemResponseError) as refused:
            service.client.jobs.create(recipe() | {"model": {"source": "mlflow", "id": "models:/nobody/1"}})
        assert refused.value.code == "model_not_found"
        _refuse_foreign_sources(service, client, tmp_path)
        _loads_by_mlflows_own_flavour(url, "models:/tiny-wanda-50/1", tmp_path)


def _refuse_foreign_sources(service: Service, client: MlflowClient, tmp_path: Path) -> None:
    """A version whose source is not an artifact that the server serves is not followed."""
    client.create_registered_model("foreign")
    version = client.create_model_version("foreign", "s3://somebody/else")
    with pytest.raises(ProblemResponseError) as refused:
        service.client.jobs.create(recipe() | {"model": {"source": "mlflow", "id": f"models:/foreign/{version.version}"}})
    assert refused.value.code == "model_not_found"
    assert "not served" in refused.value.problem.detail


def _loads_by_mlflows_own_flavour(url: str, uri: str, tmp_path: Path) -> None:
    """What was logged without being loaded is a whole model of MLflow's transformers flavour."""
    set_tracking_uri(url)
    loaded = transformers.load_model(uri, return_type="components", dst_path=str(tmp_path))
    assert type(loaded["model"]).__name__ == "LlamaForCausalLM"
    assert loaded["tokenizer"]("abc")["input_ids"]
