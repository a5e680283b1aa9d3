"""What is written beside an elastic artifact: the report, and the card that says what it is and how it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from secateur import __version__
from secateur.pruning import report
from secateur.pruning.calibration import TokenSet
from secateur.pruning.facts import BlockFacts
from secateur.pruning.job import Job
from secateur.pruning.provenance import CARD, licence_of, provenance_of, tensors_of
from secateur.recipes import ElasticRecipe


def write_report_and_card(
    job: Job[ElasticRecipe], blocks: Sequence[BlockFacts], calibration: TokenSet, metrics: Mapping[str, Any]
) -> dict[str, Any]:
    """Write both; the report, with its seconds, is also what the job shows."""
    asked = job.recipe.model_dump(mode="json", exclude={"metadata", "integrations"})
    inputs = {"base_model_sha256": job.source.sha256, "calibration_token_sha256": calibration.sha256}
    document = {
        "schema_version": 1,
        "made_by": f"secateur {__version__}",
        "recipe": asked,
        **inputs,
        "calibration": asked["calibration"] | {"token_sha256": calibration.sha256},
        **{name: metrics[name] for name in ("perplexity", "curve", "artifact") if name in metrics},
        "provenance": provenance_of(asked, inputs=inputs),
        "blocks": [_block(facts) for facts in blocks],
        "licence": licence_of(job.source.folder),
        "tensors": tensors_of(job.output, job.recipe, {}),
    }
    report.write_json(job.output / report.REPORT, report.timeless(document))
    (job.output / CARD).write_text(elastic_card(job.recipe, document), encoding="utf-8")
    return document


def _block(facts: BlockFacts) -> dict[str, Any]:
    told = asdict(facts)
    return {name: told[name] for name in ("block", "seconds", "fallbacks", "training")}


def elastic_card(recipe: ElasticRecipe, document: Mapping[str, Any]) -> str:
    """README.md of an elastic model."""
    licence = "".join(f"{key}: {value}\n" for key, value in document["licence"].items())
    base = f"base_model: {recipe.model.id}\n" if recipe.model.source == "hub" else ""
    share = document["artifact"]["bytes"] / document["artifact"]["base_bytes"]
    parameters = ", ".join(f"{name} {value}" for name, value in recipe.method.model_dump(exclude={"name"}).items())
    weights = "trained with the rest" if recipe.method.train_base else "the base model's, unchanged"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{licence}{base}tags:
- pruned
- elastic
- epts
---

# {recipe.name}

`{recipe.model.id}`, made elastic by [Secateur](https://secateur.dev) {__version__}: one model that can be
materialised at any sparsity up to 90 %, in seconds and without a GPU.

| | |
|---|---|
| Method | EPTS ([paper](https://arxiv.org/abs/2606.25285)): {parameters} |
| Size | {share:.3f} x the base checkpoint, base included |
| Base model's weights | sha256 `{document["base_model_sha256"][:16]}…` |
| Calibration | {recipe.calibration.dataset}, {recipe.calibration.samples} x {recipe.calibration.sequence_length} tokens |

## Use

```
secateur materialize {recipe.name} --sparsity 0.63
```

The weights by themselves are the dense base ({weights}); `elastic.safetensors` holds the low-rank pairs
and the norms of the inputs, `elastic.json` what they mean.
{_curve(document)}"""


def _curve(document: Mapping[str, Any]) -> str:
    if "curve" not in document:
        return ""
    stated = document["perplexity"]["protocol"]
    names = list(document["curve"][0]["perplexity"])
    rows = [
        f"| {100 * point['sparsity']:g} % | " + " | ".join(f"{point['perplexity'][name]:.2f}" for name in names) + " |"
        for point in document["curve"]
    ]
    return f"""
## Perplexity

{stated["dataset"]}, {stated["windows"]} windows of {stated["sequence_length"]} tokens, {stated["dtype"]}; dense
{document["perplexity"]["dense"]:.2f}.

| sparsity | {" | ".join(names)} |
|---|{"---|" * len(names)}
{chr(10).join(rows)}
"""
