"""Logs a finished model to MLflow: a run with parameters, metrics and report, the model, and a registered version of it."""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, StringConstraints

from app.accounts.secrets import SecretName
from app.integrations.protocol import Integration, Options, Product
from app.settings import Settings
from secateur.problems import ProblemError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run
    from mlflow.entities.model_registry import ModelVersion

JOB_TAG = "secateur.job_id"
# Of the output's files, those that MLflow's transformers flavour looks for in the tokenizer's folder.
_TOKENIZER = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template")
_MAX_PARAM = 500

Name = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9][\w.\- ]*$")]


class MlflowOptions(Options):
    experiment: Name = "secateur"
    registered_model: Name | None = Field(default=None, description="By default the output's name.")
    alias: Annotated[str, StringConstraints(max_length=100, pattern=r"^[A-Za-z][\w\-]*$")] | None = Field(
        default="challenger", description="Given to the new version; null gives none."
    )


class MlflowLog(Integration[MlflowOptions]):
    name = "mlflow"
    summary = "Log the run and the model to the installation's MLflow server and register a version."
    secret = SecretName.MLFLOW_TOKEN
    options = MlflowOptions

    def unavailable(self, settings: Settings) -> str | None:
        if not settings.mlflow.url:
            return "SECATEUR_MLFLOW_URL is not set"
        if importlib.util.find_spec("mlflow") is None:
            return "the service was installed without its extra 'mlflow'"
        return None

    def deliver(self, product: Product, options: MlflowOptions, settings: Settings, secret: str | None) -> str:
        """Log what is not there yet: a run is found again by its job's id, a version by its run."""
        if (reason := self.unavailable(settings)) is not None:
            raise ProblemError("integration_unavailable", f"mlflow cannot be used: {reason}")
        url = str(settings.mlflow.url).rstrip("/")
        # The schedule of tries is ours. MLflow's own, of several minutes, would only hide that it is away.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ |= {"MLFLOW_TRACKING_TOKEN": secret} if secret else {}
        from mlflow import MlflowClient  # noqa: PLC0415 (an extra, and only this process needs it)

        with _mlflow_problems():
            client = MlflowClient(tracking_uri=url, registry_uri=url)
            run = _run_of(client, product, options)
            _log(client, run.info.run_id, product)
            version = _version_of(client, run, product, options.registered_model or product.recipe.name)
            if options.alias:
                client.set_registered_model_alias(version.name, options.alias, version.version)
            client.set_terminated(run.info.run_id, "FINISHED", _milliseconds(product.finished_at.timestamp()))
        return f"{url}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"


def _run_of(client: MlflowClient, product: Product, options: MlflowOptions) -> Run:
    experiment = client.get_experiment_by_name(options.experiment)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(options.experiment)
    found = client.search_runs([experiment_id], f"tags.`{JOB_TAG}` = '{product.job_id}'", max_results=1)
    if found:
        return found[0]
    began = _milliseconds(product.started_at.timestamp())
    return client.create_run(experiment_id, began, {JOB_TAG: product.job_id, **_lineage(product)}, product.recipe.name)


def _lineage(product: Product) -> dict[str, str]:
    model, report = product.recipe.model, product.report
    told = {
        "secateur.version": report.get("made_by"),
        "secateur.repository": product.repository,
        "secateur.base_model.source": model.source,
        "secateur.base_model.id": model.id,
        "secateur.base_model.revision": model.revision,
        "secateur.base_model.sha256": report.get("base_model_sha256"),
    }
    return {name: str(value) for name, value in told.items() if value}


def _log(client: MlflowClient, run_id: str, product: Product) -> None:
    from mlflow.entities import Param, RunTag  # noqa: PLC0415

    recipe = product.recipe.model_dump(mode="json", exclude={"metadata", "integrations", "kind", "schema_version"})
    params = [Param(name, str(value)[:_MAX_PARAM]) for name, value in _flat(recipe) if value is not None]
    tags = [RunTag(f"label.{key}", value) for key, value in product.recipe.metadata.items()]
    client.log_batch(run_id, list(_metrics(product)), params, tags)
    client.log_dict(run_id, dict(product.report), "compression_report.json")
    client.log_artifact(run_id, str(product.folder / "README.md"))


def _metrics(product: Product) -> Iterator[Metric]:
    """The job's numbers, and of each block, as a step, sparsity and seconds and the mean error of its linears."""
    from mlflow.entities import Metric  # noqa: PLC0415

    # A job's own time: a second try logs the very same rows, which MLflow keeps once.
    at = _milliseconds(product.finished_at.timestamp())
    for name, value in _flat(product.metrics):
        if isinstance(value, int | float) and not isinstance(value, bool) and "protocol" not in name:
            yield Metric(name, float(value), at, 0)
    for block in product.report.get("blocks", []):
        linears = block["linears"]
        told = {"block.seconds": block["seconds"]} if "seconds" in block else {}
        if linears:
            told["block.sparsity"] = sum(one["sparsity"] for one in linears) / len(linears)
            told["block.error"] = sum(one["error"] for one in linears) / len(linears)
        for name, value in told.items():
            yield Metric(name, float(value), at, int(block["block"]))


def _version_of(client: MlflowClient, run: Run, product: Product, name: str) -> ModelVersion:
    from mlflow.entities import LoggedModelOutput  # noqa: PLC0415
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    run_id = run.info.run_id
    there = [one for one in client.search_model_versions(f"run_id = '{run_id}'") if one.name == name]
    if there:
        return there[0]
    tags = {JOB_TAG: product.job_id, **_lineage(product)}
    model = client.create_logged_model(
        run.info.experiment_id, name=_model_name(product.recipe.name), source_run_id=run_id, tags=tags
    )
    with tempfile.TemporaryDirectory(dir=product.folder.parent) as scratch:
        _lay_out(product, Path(scratch), run_id=run_id, model_id=model.model_id)
        client.log_model_artifacts(model.model_id, scratch)
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"models:/{model.model_id}"
    return client.create_model_version(name, source, run_id=run_id, tags=tags, model_id=model.model_id)


def _lay_out(product: Product, into: Path, *, run_id: str, model_id: str) -> None:
    """A model folder of MLflow's transformers flavour, of links to the files: no weight is read, and torch is not needed."""
    from mlflow.models import Model  # noqa: PLC0415

    config = _config(product.folder)
    (into / "model").mkdir()
    (into / "components" / "tokenizer").mkdir(parents=True)
    tokenizer = False
    for file in filter(Path.is_file, product.folder.iterdir()):
        os.link(file, into / "model" / file.name)
        if file.name.startswith(_TOKENIZER):
            tokenizer = True
            os.link(file, into / "components" / "tokenizer" / file.name)
    described = Model(artifact_path="model", run_id=run_id, model_uuid=model_id, model_id=model_id)
    described.add_flavor(
        "transformers",
        task="text-generation",
        instance_type="TextGenerationPipeline",
        pipeline_model_type=config["architectures"][0],
        source_model_name=product.recipe.model.id,
        model_binary="model",
        torch_dtype=f"torch.{product.recipe.output.dtype}",
        components=["tokenizer"] if tokenizer else [],
        **({"tokenizer_type": "AutoTokenizer"} if tokenizer else {}),
    )
    described.save(str(into / "MLmodel"))


def _config(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return document


def _model_name(name: str) -> str:
    """MLflow's logged models may have no dots and colons in their names."""
    return name.replace(".", "_")


def _flat(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _milliseconds(seconds: float) -> int:
    return round(1000 * seconds)


def _status(error: Any) -> int:
    return int(error.get_http_status_code())  # MLflow leaves this method untyped


@contextmanager
def _mlflow_problems() -> Iterator[None]:
    from mlflow.exceptions import MlflowException, RestException  # noqa: PLC0415

    try:
        yield
    except MlflowException as error:
        status = _status(error) if isinstance(error, RestException) else None
        told = str(error.message).splitlines()[0][:300]
        if status in {401, 403}:
            hint = "Store the secret mlflow_token, then have the integration tried again."
            raise ProblemError("integration_refused", f"MLflow refused the token (status {status}).", hint=hint) from None
        if status is not None and 400 <= status < 500 and status != 429:
            raise ProblemError("integration_refused", f"MLflow refused what was asked of it: {told}") from None
        if status is not None:
            raise ProblemError("integration_failed", f"MLflow failed with status {status}: {told}") from None
        # Its text is that of the network's library, with addresses; the try's log has it.
        raise ProblemError("integration_failed", "MLflow does not answer.") from error
    except OSError as error:
        raise ProblemError("integration_failed", f"MLflow does not answer ({type(error).__name__}).") from None
