"""What is written beside the weights: config, report and model card. Nothing here depends on the clock or the machine."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from secateur import __version__
from secateur.pruning.calibration import TokenSet
from secateur.pruning.checkpoint import sha256_of
from secateur.pruning.facts import BlockFacts
from secateur.pruning.headers import CONFIG, companions
from secateur.pruning.provenance import CARD, licence_of, provenance_of, tensors_of
from secateur.pruning.registry import card_of
from secateur.pruning.verify import Facts
from secateur.recipes import EvaluateRecipe, ExportRecipe, PruneRecipe

REPORT = "compression_report.json"

_DROPPED_FROM_CONFIG = ("_name_or_path", "auto_map", "quantization_config", "torch_dtype")


def write_config(config: Mapping[str, Any], dtype: str, into: Path) -> None:
    """The source's config.json with the dtype that was written and nothing that asks for code or another format."""
    kept = {key: value for key, value in config.items() if key not in _DROPPED_FROM_CONFIG}
    write_json(into / CONFIG, kept | {"dtype": dtype})


def copy_companions(source: Path, into: Path) -> None:
    """Copy tokenizer, chat template and generation config. Raises the problems of `headers.companions`."""
    for file in companions(source):
        (into / file.name).write_bytes(file.read_bytes())


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Pretty JSON with a final newline."""
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def compression_report(
    recipe: PruneRecipe | ExportRecipe,
    model_sha256: str,
    facts: Facts,
    *,
    blocks: list[BlockFacts],
    calibration: TokenSet | None,
    perplexity: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What was asked (without the owner's metadata and integrations), and what was done and measured, with seconds."""
    asked = recipe.model_dump(mode="json", exclude={"metadata", "integrations"})
    told: dict[str, Any] = {
        "schema_version": 1,
        "made_by": f"secateur {__version__}",
        "recipe": asked,
        "base_model_sha256": model_sha256,
        "verification": {
            "sparsity": facts.sparsity,
            "zeros": facts.zeros,
            "weights": facts.weights,
            "untouched_tensors_identical": True,
            "head_tied_to": facts.head_tied_to,
        },
    }
    if calibration:
        told["calibration"] = asked["calibration"] | {"token_sha256": calibration.sha256}
    if perplexity:
        told["perplexity"] = dict(perplexity)
    inputs = {
        "base_model_sha256": model_sha256,
        "calibration_token_sha256": calibration.sha256 if calibration else None,
        "evaluation_token_sha256": perplexity["protocol"]["token_sha256"] if perplexity else None,
    }
    told["provenance"] = provenance_of(asked, inputs=inputs)
    told["blocks"] = [_block(block, facts) for block in blocks]
    return told


def evaluation_report(recipe: EvaluateRecipe, model_sha256: str, perplexity: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked (without the owner's metadata), and what was measured of which model."""
    asked = recipe.model_dump(mode="json", exclude={"metadata"})
    inputs = {"model_sha256": model_sha256, "evaluation_token_sha256": perplexity["protocol"]["token_sha256"]}
    return {
        "schema_version": 1,
        "made_by": f"secateur {__version__}",
        "recipe": asked,
        "model_sha256": model_sha256,
        "perplexity": dict(perplexity),
        "provenance": provenance_of(asked, inputs=inputs),
    }


def _block(block: BlockFacts, facts: Facts) -> dict[str, Any]:
    document = asdict(block)
    sizes = [math.prod(linear.shape) for linear in block.linears]
    document["target"] = sum(linear.target * size for linear, size in zip(block.linears, sizes, strict=True)) / sum(sizes)
    for linear, size in zip(document["linears"], sizes, strict=True):
        linear["zeros"] = facts.zeros_of[linear["name"]]
        linear["sparsity"] = linear["zeros"] / size
    return document


def write_report_and_card(
    into: Path, source: Path, recipe: PruneRecipe | ExportRecipe, document: dict[str, Any], facts: Facts
) -> None:
    """Add licence, tensors and the digest of its base's report, if a job made the base, to the report; write it, without
    its seconds, and the model card made from it."""
    document["licence"] = licence_of(source)
    if recipe.model.source == "artifact" and (source / REPORT).is_file():
        document["provenance"]["base_report_sha256"] = sha256_of(source / REPORT)
    document["tensors"] = tensors_of(into, recipe, facts.zeros_of)
    write_json(into / REPORT, timeless(document))
    (into / CARD).write_text(model_card(recipe, document), encoding="utf-8")


def timeless(document: Mapping[str, Any]) -> dict[str, Any]:
    """The report without its seconds: as it is written beside the weights, where the same job gives the same bytes."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key != "seconds"}
        return [strip(item) for item in value] if isinstance(value, list | tuple) else value

    stripped: dict[str, Any] = strip(document)
    return stripped


def model_card(recipe: PruneRecipe | ExportRecipe, report: Mapping[str, Any]) -> str:
    """README.md of the pruned model."""
    card, model, allocation = card_of(recipe), recipe.model, recipe.sparsity.allocation
    licence = "".join(f"{key}: {json.dumps(value)}\n" for key, value in report["licence"].items())
    base = f"base_model: {model.id}\n" if model.source == "hub" else ""
    revision = f", revision `{model.revision}`" if model.revision else ""
    paper = f" ([paper]({card.paper}))" if card.paper else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{licence}{base}tags:
- pruned
- sparse
- {card.name}
---

# {recipe.name}

`{model.id}`{revision}, pruned by [Secateur](https://secateur.dev) {__version__}.

| | |
|---|---|
| Method | {card.name}{paper}{_settings(recipe.method) if isinstance(recipe, PruneRecipe) else ""} |
| Pattern | {recipe.pattern} |
| Allocation among blocks and linears | {allocation.name}{_settings(allocation)} |
| Sparsity of the pruned linears, measured in the file | {100 * report["verification"]["sparsity"]:.2f} % |
| Weights removed | {report["verification"]["zeros"]:,} of {report["verification"]["weights"]:,} |
| Parameters, zeros included | {_parameters(report):,} |
| Data type | {recipe.output.dtype} |
| Base model's weights | sha256 `{report["base_model_sha256"][:16]}…` |
| Licence | {_licence(report)} |
{_calibration_row(report)}{_perplexity_rows(report)}
Every linear layer of the decoder blocks is pruned; embeddings, head, norms, routers and biases are the base model's,
unchanged but for the data type{_folded(report)}.
`{REPORT}` tells each layer's sparsity and error, each tensor's digest, and what went in.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

## Limits

The weights are stored densely, with zeros where weights were removed: the model loads everywhere and compresses well, but a
runtime without sparse kernels is no faster and needs no less memory than with the dense model. Pruning changes a model's
behaviour; evaluate it on your task before you rely on it.
"""


def _settings(part: BaseModel) -> str:
    """`: ratio 2, other 3` of what stands beside a name; nothing if nothing does."""
    settings = ", ".join(f"{name} {value}" for name, value in part.model_dump(exclude={"name"}).items())
    return f": {settings}" if settings else ""


def _folded(report: Mapping[str, Any]) -> str:
    """That sparsity was induced by a fold, if it was."""
    folded = sum(len(block["induction"]["folded"]) for block in report["blocks"] if block.get("induction"))
    return f", except {folded} norms and biases that scales were folded into, which keeps the function" if folded else ""


def _parameters(report: Mapping[str, Any]) -> int:
    return sum(math.prod(tensor["shape"]) for tensor in report["tensors"].values())


def _licence(report: Mapping[str, Any]) -> str:
    licence = report["licence"]
    if not licence:
        return "the base model's, whose card names none here"
    told = licence.get("license_name") or licence.get("license", "see the link")
    link = licence.get("license_link", "")
    return f"{told}, the base model's" + (f" ({link})" if link else "")


def _calibration_row(report: Mapping[str, Any]) -> str:
    calibration = report.get("calibration")
    if not calibration:
        return ""
    return (
        f"| Calibration | {calibration['dataset']}, {calibration['samples']} x {calibration['sequence_length']} tokens, "
        f"seed {calibration['seed']} |\n"
    )


def _perplexity_rows(report: Mapping[str, Any]) -> str:
    perplexity = report.get("perplexity")
    if not perplexity:
        return ""
    stated = perplexity["protocol"]
    return (
        f"| Perplexity, dense | {perplexity['dense']:.3f} |\n"
        f"| Perplexity, pruned | {perplexity['pruned']:.3f} |\n"
        f"| Perplexity's protocol | {stated['dataset']}, {stated['windows']} windows of {stated['sequence_length']} tokens, "
        f"{stated['dtype']}, tokens' sha256 `{stated['token_sha256'][:16]}…` |\n"
    )
