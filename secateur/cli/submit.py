"""`secateur submit`: from flags, or from a file, to a job."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur import Client
from secateur.cli.output import AsJson, print_json, stdout
from secateur.cli.watch import follow

_CALIBRATION, _EVALUATION, _OUTPUT, _SCHEDULE = "Calibration", "Evaluation", "Output", "Schedule"


def submit(
    model: Annotated[
        str | None, typer.Argument(help="A folder below the models root, or owner/name with --source hub.")
    ] = None,
    *,
    source: Annotated[str | None, typer.Option(help="Where it is: local, hub or mlflow.", show_default="local")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    method: Annotated[str | None, typer.Option(help="How to prune; see `secateur methods`.", show_default="wanda")] = None,
    param: Annotated[
        list[str] | None, typer.Option(help="A parameter of the method; may be repeated.", metavar="NAME=VALUE")
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction of zeros.", show_default="0.5, or what the pattern implies")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="unstructured, or N:M such as 2:4.", show_default="unstructured")
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(help="How blocks share it: uniform, owl or alphapruning; more with --recipe.", show_default="uniform"),
    ] = None,
    calibration: Annotated[str | None, typer.Option(help="Data set.", rich_help_panel=_CALIBRATION)] = None,
    samples: Annotated[int | None, typer.Option(help="Number of sequences.", rich_help_panel=_CALIBRATION)] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens in each.", rich_help_panel=_CALIBRATION)] = None,
    seed: Annotated[int | None, typer.Option(help="Which sequences are drawn.", rich_help_panel=_CALIBRATION)] = None,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Measure perplexity before and after.", rich_help_panel=_EVALUATION)
    ] = False,
    evaluation: Annotated[
        str | None, typer.Option(help="Data set; implies --evaluate.", rich_help_panel=_EVALUATION)
    ] = None,
    window_length: Annotated[int | None, typer.Option(help="Tokens in a window.", rich_help_panel=_EVALUATION)] = None,
    max_windows: Annotated[int | None, typer.Option(help="Stop after so many.", rich_help_panel=_EVALUATION)] = None,
    name: Annotated[str | None, typer.Option(help="Name of the pruned model.", rich_help_panel=_OUTPUT)] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float32.", rich_help_panel=_OUTPUT)] = None,
    priority: Annotated[
        int | None, typer.Option(help="-10 to 10; the highest of a queue runs first.", rich_help_panel=_SCHEDULE)
    ] = None,
    start_deadline: Annotated[
        int | None, typer.Option(help="Seconds; not begun by then, the job expires.", rich_help_panel=_SCHEDULE)
    ] = None,
    max_runtime: Annotated[int | None, typer.Option(help="Seconds that it may run.", rich_help_panel=_SCHEDULE)] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(help="A label; may be repeated.", metavar="NAME=VALUE", rich_help_panel=_OUTPUT)
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(help="Push it to this hub repository.", metavar="OWNER/NAME", rich_help_panel=_OUTPUT),
    ] = None,
    mlflow: Annotated[bool, typer.Option("--mlflow", help="Log it to MLflow.", rich_help_panel=_OUTPUT)] = False,
    recipe: Annotated[
        Path | None, typer.Option(help="Instead of all above: a file with the whole recipe as JSON, `-` for the input.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job to its end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Submit a job: prune MODEL."""
    perplexity = _given({"dataset": evaluation, "sequence_length": window_length, "max_windows": max_windows})
    given = _given({
        "model": {"id": model, "source": source, "revision": revision},
        "method": {"name": method, **_parameters(param)},
        "sparsity": {"target": sparsity, "pattern": pattern, "allocation": {"name": allocation}},
        "calibration": {"dataset": calibration, "samples": samples, "sequence_length": sequence_length, "seed": seed},
        "evaluation": {"perplexity": perplexity},
        "output": {"name": name, "dtype": dtype},
        "schedule": {"priority": priority, "start_deadline": start_deadline, "max_runtime": max_runtime},
        "metadata": _pairs(metadata, "--metadata"),
        "integrations": _integrations(push, mlflow=mlflow),
    })  # fmt: skip
    if evaluate:
        given["evaluation"] = {"perplexity": perplexity}
    body = _whole(given) if recipe is None else _read(recipe, given)
    with Client() as client:
        job = client.jobs.create(body)
        if watch:
            follow(client, job.id, as_json=as_json)
        elif as_json:
            print_json(job)
        else:
            stdout.print(f"{job.id} is {job.status}; follow it with: secateur watch {job.id}")


def _whole(given: dict[str, Any]) -> dict[str, Any]:
    """The recipe of what was given. Of what was not, only this is the command line's choice, and the rest the service's."""
    if "id" not in given.get("model", {}):
        raise typer.BadParameter("give the model, or a recipe with --recipe")
    return {
        **given,
        "kind": "prune",
        "model": {"source": "local", **given["model"]},
        "method": {"name": "wanda", **given.get("method", {})},
        "sparsity": given.get("sparsity", {"target": 0.5}),
    }


def _given(document: dict[str, Any]) -> dict[str, Any]:
    """Without what was not given: the service fills in its own defaults."""
    inner = {key: _given(value) if isinstance(value, dict) else value for key, value in document.items()}
    return {key: value for key, value in inner.items() if value is not None and value != {}}


def _read(file: Path, given: dict[str, Any]) -> dict[str, Any]:
    if given:
        raise typer.BadParameter(f"--recipe is the whole recipe; leave out what else was given of its {', '.join(given)}")
    try:
        document = json.loads(sys.stdin.read() if str(file) == "-" else file.read_text())
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"--recipe cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise typer.BadParameter("--recipe holds no JSON object")
    return document


def _integrations(push: str | None, *, mlflow: bool) -> list[dict[str, Any]] | None:
    """Where to take the output; None, which leaves it to the service, if nothing was said."""
    wanted: list[dict[str, Any]] = [{"name": "hub_push", "repository": push}] if push else []
    return [*wanted, {"name": "mlflow"}] if mlflow else wanted or None


def _pairs(given: list[str] | None, option: str) -> dict[str, str]:
    pairs = {}
    for pair in given or []:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise typer.BadParameter(f"{option} is NAME=VALUE, not {pair!r}")
        pairs[key] = value
    return pairs


def _parameters(given: list[str] | None) -> dict[str, Any]:
    """Values that read as JSON are taken for it, so that numbers are numbers; others are text."""
    return {key: _value(text) for key, text in _pairs(given, "--param").items()}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
