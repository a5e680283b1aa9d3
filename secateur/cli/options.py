"""The options that say what a job is: shared by the commands that submit, estimate and sweep."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec

import typer

P = ParamSpec("P")
Body = dict[str, Any]

_CALIBRATION, _EVALUATION, _OUTPUT, _SCHEDULE = "Calibration", "Evaluation", "Output", "Schedule"


def takes_settings(command: Callable[Concatenate[Body, P], None]) -> Callable[..., None]:
    """A command with all options of `settings` before its own; `command` is handed the body that those made."""
    return _extended(command, settings)


def takes_recipe(command: Callable[Concatenate[Body, P], None]) -> Callable[..., None]:
    """The same for one job: with a method and its sparsity, or a file with the whole recipe."""

    def body(
        *,
        method: Annotated[
            str | None, typer.Option(help="How to prune; see `secateur methods`.", show_default="wanda")
        ] = None,
        param: Annotated[
            list[str] | None, typer.Option(help="A parameter of the method; may be repeated.", metavar="NAME=VALUE")
        ] = None,
        sparsity: Annotated[
            float | None, typer.Option(help="Fraction of zeros.", show_default="0.5, or what the pattern implies")
        ] = None,
        pattern: Annotated[
            str | None, typer.Option(help="unstructured, or N:M such as 2:4.", show_default="unstructured")
        ] = None,
        recipe: Annotated[
            Path | None,
            typer.Option(help="Instead of all other options: a file with the whole recipe as JSON, `-` for the input."),
        ] = None,
        **given: Any,
    ) -> Body:
        rest = settings(**given)
        chosen = given_only({
            "method": {"name": method, **_parameters(param)},
            "sparsity": {"target": sparsity, "pattern": pattern},
        })  # fmt: skip
        return _whole(rest | chosen) if recipe is None else _read(recipe, rest | chosen)

    _sign(body, settings, body)
    return _extended(command, body)


def settings(
    model: Annotated[
        str | None, typer.Argument(help="A folder below the models root, owner/name with --source hub, or a job's id.")
    ] = None,
    *,
    source: Annotated[
        str | None, typer.Option(help="Where it is: local, hub, mlflow or artifact.", show_default="local")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
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
) -> Body:
    """What was given of a body, but for method and sparsity; what was not given is left to the service."""
    perplexity = given_only({"dataset": evaluation, "sequence_length": window_length, "max_windows": max_windows})
    given = given_only({
        "model": {"id": model, "source": source, "revision": revision},
        "calibration": {"dataset": calibration, "samples": samples, "sequence_length": sequence_length, "seed": seed},
        "evaluation": {"perplexity": perplexity},
        "output": {"name": name, "dtype": dtype},
        "schedule": {"priority": priority, "start_deadline": start_deadline, "max_runtime": max_runtime},
        "metadata": _pairs(metadata, "--metadata"),
        "integrations": _integrations(push, mlflow=mlflow),
    })  # fmt: skip
    if evaluate:
        given["evaluation"] = {"perplexity": perplexity}
    return given


def model_of(given: Body) -> Body:
    """The model that was given; where it is, is `local` unless that was said, and a job's id is an artifact's."""
    model = given.get("model", {})
    if "id" not in model:
        raise typer.BadParameter("give the model, or a recipe with --recipe")
    return {"source": "artifact" if model["id"].startswith("job_") else "local", **model}


def given_only(document: Body) -> Body:
    """Without what was not given: the service fills in its own defaults."""
    inner = {key: given_only(value) if isinstance(value, dict) else value for key, value in document.items()}
    return {key: value for key, value in inner.items() if value is not None and value != {}}


def _whole(given: Body) -> Body:
    """The recipe of what was given. Of what was not, only this is the command line's choice, and the rest the service's."""
    return {
        **given,
        "kind": "prune",
        "model": model_of(given),
        "method": {"name": "wanda", **given.get("method", {})},
        "sparsity": given.get("sparsity", {"target": 0.5}),
    }


def _read(file: Path, given: Body) -> Body:
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


def _extended(command: Callable[Concatenate[Body, P], None], body: Callable[..., Body]) -> Callable[..., None]:
    own = set(inspect.signature(command).parameters)

    @wraps(command)
    def run(**given: Any) -> None:
        mine = {name: given.pop(name) for name in list(given) if name in own}
        command(body(**given), **mine)  # type: ignore[call-arg]  # the rest of a ParamSpec, by name

    _sign(run, body, command)
    return run


def _sign(function: Callable[..., Any], *parts: Callable[..., Any]) -> None:
    """Give `function` the parameters of all `parts`, but for bodies and collections of others, as typer reads them."""
    left_out = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    found = [one for part in parts for one in inspect.signature(part, eval_str=True).parameters.values()]
    parameters = [one for one in found if one.kind not in left_out and one.annotation is not Body]
    first = [one.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for one in parameters if one.name == "model"]
    rest = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters if one.name != "model"]
    function.__signature__ = inspect.Signature([*first, *rest])  # type: ignore[attr-defined]
    function.__annotations__ = {one.name: one.annotation for one in [*first, *rest]}
    function.__dict__.pop("__wrapped__", None)
