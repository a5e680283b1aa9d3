"""`secateur methods` and `secateur models`: what there is to choose from."""

from __future__ import annotations

from secateur import Client
from secateur.cli.output import AsJson, print_json, print_table, size
from secateur.schemas.models import LocalModel, Model


def methods(as_json: AsJson = False) -> None:
    """List the methods that can prune."""
    with Client() as client:
        found = client.methods()
    if as_json:
        print_json(found)
    else:
        rows = ((one.name, one.summary, ", ".join(one.patterns), one.paper or "") for one in found)
        print_table(("method", "what it does", "patterns", "paper"), rows, nothing="There are no methods.")


def models(as_json: AsJson = False) -> None:
    """List the local models that can be pruned, and the pruned models."""
    with Client() as client:
        found = list(client.models())
    if as_json:
        print_json(found)
    else:
        print_table(("model", "source", "size", "what it is"), map(_row, found), nothing="There are no models yet.")


def _row(model: Model) -> tuple[str, ...]:
    weight = size(model.bytes) if model.bytes is not None else ""
    if not isinstance(model, LocalModel):
        amount = "any sparsity" if model.sparsity is None else f"sparsity {model.sparsity:.4g}"
        made = f"{model.base.id}, {model.method} {model.pattern}, {amount} ({model.job_id})"
        return model.id, "pruned", weight, made
    if model.problem:
        return model.id, "local", weight, f"cannot be pruned: {model.problem.detail}"
    known = f", {model.parameters / 1e6:.4g} M parameters" if model.parameters else ""
    return model.id, "local", weight, f"{model.architecture or model.format}{known}"
