"""A run: a recipe and a model folder in, a verified checkpoint with its report and card out."""

from __future__ import annotations

import hashlib
import resource
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.pruning import admission, report
from secateur.pruning.blocks import BlockFacts, best_device, prune_blocks, write_outside_blocks
from secateur.pruning.calibration import TokenSet, calibration_set, evaluation_set, tokenise
from secateur.pruning.checkpoint import DTYPES, Checkpoint, gather
from secateur.pruning.datasets import read_text
from secateur.pruning.evaluation import Measured, PerplexityCache, measure, protocol
from secateur.pruning.events import Narrator, OnEvent
from secateur.pruning.explain import explained
from secateur.pruning.families import Family, block_count, family_of
from secateur.pruning.gguf import convert
from secateur.pruning.headers import CONFIG, ModelHeaders, read_model
from secateur.pruning.registry import METHODS
from secateur.pruning.streaming import StreamedModel
from secateur.pruning.verify import Facts, verify
from secateur.recipes import PruneRecipe


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file of the result: its name in the output folder, size in bytes, and sha256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class RunResult:
    """`metrics` as the job shows them, the `files` of the output folder, and the `report`, which also has seconds."""

    metrics: dict[str, Any]
    files: list[OutputFile]
    report: dict[str, Any]


def run(
    recipe: PruneRecipe,
    *,
    source: Path,
    output: Path,
    cache: Path,
    on_event: OnEvent,
    texts: Path | None = None,
    within: Path | None = None,
) -> RunResult:
    """Prune the model in the folder `source` as `recipe` says and fill the folder `output`, which is empty or absent.

    `cache`: a folder for what is worth keeping between runs (dense perplexities). `texts`: the folder that
    `datasets.fetch_texts` filled, for datasets of the hub. `within`: where symbolic links in `source` may lead. `on_event`
    is told stages, progress and log lines. If it fails `output` is left empty, and what is raised is a ProblemError wherever
    the user can do something about it.
    """
    started, narrator = time.monotonic(), Narrator(on_event)
    scratch = output / ".scratch"
    try:
        with explained(), torch.no_grad():
            scratch.mkdir(parents=True)
            folder, headers = _as_safetensors(source, scratch, within, narrator)
            admission.check(recipe, headers)
            with Checkpoint(folder, headers) as checkpoint:
                return _run(recipe, checkpoint, output, scratch, cache, texts, narrator, started)
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True, exist_ok=True)
        raise


def _run(
    recipe: PruneRecipe,
    source: Checkpoint,
    output: Path,
    scratch: Path,
    cache: Path,
    texts: Path | None,
    narrator: Narrator,
    started: float,
) -> RunResult:
    family = family_of(source.headers)
    narrator.stage("calibrating")
    calibration, evaluation = _token_sets(recipe, source, family, texts)
    narrator.stage("pruning")
    pruning_began = time.monotonic()
    blocks = prune_blocks(recipe, source, family, calibration.tokens if calibration else None, scratch, narrator)
    _write_model(recipe, source, family, output, scratch)
    seconds = {"prune": round(time.monotonic() - pruning_began, 2)}
    perplexities, measured = _evaluate(recipe, source, family, output, evaluation, cache, narrator)
    if measured:
        seconds["evaluate"] = round(measured.seconds, 2)

    narrator.stage("packaging")
    removed = {linear.name: linear.removed for block in blocks for linear in block.linears}
    facts = verify(output, source, removed, recipe)
    document = _report(recipe, source, calibration, perplexities, blocks, facts)
    report.write_json(output / report.REPORT, report.timeless(document))
    (output / report.CARD).write_text(report.model_card(recipe, document), encoding="utf-8")
    files = [_described(path, output) for path in sorted(output.iterdir()) if path.is_file()]

    seconds["total"] = round(time.monotonic() - started, 2)
    metrics: dict[str, Any] = {"sparsity": facts.sparsity, "seconds": seconds, "peak_memory_bytes": peak_memory()}
    if perplexities:
        metrics["perplexity"] = perplexities
    if calibration and measured:
        metrics["forward_multiple"] = round(
            seconds["prune"] / (measured.block_seconds_per_token * calibration.tokens.numel()), 2
        )
    return RunResult(metrics, files, document)


def _as_safetensors(source: Path, scratch: Path, within: Path | None, narrator: Narrator) -> tuple[Path, ModelHeaders]:
    headers = read_model(source, within=within)
    if headers.gguf_file is None:
        return source, headers
    narrator.log(f"Converting {headers.gguf_file} to safetensors.")
    convert(source / headers.gguf_file, scratch / "converted")
    return scratch / "converted", read_model(scratch / "converted")


def _token_sets(
    recipe: PruneRecipe, source: Checkpoint, family: Family, texts: Path | None
) -> tuple[TokenSet | None, TokenSet | None]:
    """The calibration set and the evaluation set, each None where the recipe needs none."""
    vocabulary = source.headers.tensors[family.embedding].shape[0]
    calibration = evaluation = None
    if METHODS[recipe.method.name].calibrated:
        text = read_text(recipe.calibration.dataset, "calibration", texts)
        calibration = calibration_set(tokenise(source.folder, text, vocabulary), recipe.calibration)
    if wanted := recipe.evaluation.perplexity:
        text = read_text(wanted.dataset, "evaluation", texts)
        evaluation = evaluation_set(tokenise(source.folder, text, vocabulary), wanted)
    return calibration, evaluation


def _write_model(recipe: PruneRecipe, source: Checkpoint, family: Family, output: Path, scratch: Path) -> None:
    """Weights, config and companions: from here on `output` is a model that loads."""
    outside = scratch / "outside-blocks.safetensors"
    write_outside_blocks(source, family, DTYPES[recipe.output.dtype], outside)
    gather([outside, *sorted(scratch.glob("block-*.safetensors"))], output)
    report.write_config(source.headers.config, recipe.output.dtype, output)
    report.copy_companions(source.folder, output)


def _evaluate(
    recipe: PruneRecipe,
    source: Checkpoint,
    family: Family,
    output: Path,
    tokens: TokenSet | None,
    cache: Path,
    narrator: Narrator,
) -> tuple[dict[str, Any] | None, Measured | None]:
    """Perplexities of the source and of the written model, and how the latter was measured; Nones if none was asked for."""
    if tokens is None:
        return None, None
    narrator.stage("evaluating")
    stated = protocol(tokens, recipe.output.dtype)
    known = PerplexityCache(cache, model_digest(source), stated)
    dense, each = known.get(), block_count(source.headers)
    before, total = (0, each) if dense is not None else (each, 2 * each)

    def measured(checkpoint: Checkpoint, offset: int) -> Measured:
        model = StreamedModel(checkpoint, family, DTYPES[recipe.output.dtype], best_device())
        return measure(model, tokens.tokens, lambda done: narrator.progress(offset + done, total))

    if dense is None:
        dense = measured(source, 0).perplexity
        known.put(dense)
    with Checkpoint(output, read_model(output)) as written:
        pruned = measured(written, before)
    return {"dense": dense, "pruned": pruned.perplexity, "protocol": stated}, pruned


def _report(
    recipe: PruneRecipe,
    source: Checkpoint,
    calibration: TokenSet | None,
    perplexities: dict[str, Any] | None,
    blocks: list[BlockFacts],
    facts: Facts,
) -> dict[str, Any]:
    document = report.compression_report(recipe, model_digest(source), facts, [block.as_dict() for block in blocks])
    if calibration:
        asked = recipe.calibration.model_dump(mode="json")
        document["calibration"] = asked | {"token_sha256": calibration.sha256}
    if perplexities:
        document["perplexity"] = perplexities
    return document


def model_digest(source: Checkpoint) -> str:
    """sha256 over the model's config.json and weight files, in order: what a dense perplexity is kept under."""
    whole = hashlib.sha256()
    for name in (CONFIG, *source.headers.files):
        with (source.folder / name).open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def peak_memory() -> int:
    """The largest resident set this process has had, in bytes; mapped files count."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _described(path: Path, folder: Path) -> OutputFile:
    with path.open("rb") as file:
        return OutputFile(
            path.relative_to(folder).as_posix(), path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
        )
