"""Prune a model: the weights are walked through block by block, then evaluated, verified and described."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import transformers

from secateur import __version__
from secateur.pruning import report
from secateur.pruning.biases import with_biases
from secateur.pruning.blocks import best_device, prune_blocks, write_outside_blocks
from secateur.pruning.calibration import TokenSet
from secateur.pruning.checkpoint import Checkpoint, gather
from secateur.pruning.dense import dense_perplexity
from secateur.pruning.evaluation import Measured, measure, protocol
from secateur.pruning.headers import read_model
from secateur.pruning.job import Job, Outcome
from secateur.pruning.memory import give_back
from secateur.pruning.resume import Attempt
from secateur.pruning.streaming import StreamedModel
from secateur.pruning.verify import verify
from secateur.recipes import MeanCorrection, PruneRecipe


def prune(job: Job[PruneRecipe]) -> Outcome:
    """Fill the job's output with a verified checkpoint, its report and card."""
    if not isinstance(job.recipe.method.compensation, MeanCorrection):
        return _prune(job)
    with Checkpoint(job.source.folder, with_biases(job.source.headers, job.family)) as source:
        return _prune(replace(job, source=source))


def _prune(job: Job[PruneRecipe]) -> Outcome:
    job.narrator.stage("calibrating")
    calibration, evaluation = job.calibration_tokens(), job.evaluation_tokens()
    give_back()
    attempt = Attempt(job.scratch, _fingerprint(job, calibration))
    attempt.take_over(job.earlier)
    if attempt.finished:
        job.narrator.log(f"An earlier attempt finished {len(attempt.finished)} blocks; they are taken over.")
    job.narrator.stage("pruning")
    tokens = calibration.tokens if calibration else None
    pruning = prune_blocks(job.recipe, job.source, job.family, tokens=tokens, attempt=attempt, narrator=job.narrator)
    _write_model(job, attempt)
    perplexities, measured = _evaluate(job, evaluation) if evaluation else (None, None)
    job.narrator.stage("packaging")
    removed = {linear.name: linear.removed for block in attempt.finished for linear in block.linears}
    facts = verify(job.output, job.source, job.family, removed, job.recipe)
    document = report.compression_report(
        job.recipe, job.source.sha256, facts, blocks=attempt.finished, calibration=calibration, perplexity=perplexities
    )
    report.write_report_and_card(job.output, job.source.folder, job.recipe, document, facts)

    seconds = {"prune": pruning}
    metrics: dict[str, Any] = {"sparsity": facts.sparsity, "seconds": seconds}
    if perplexities:
        metrics["perplexity"] = perplexities
    if measured:
        seconds["evaluate"] = measured.seconds
        if tokens is not None:
            metrics["forward_multiple"] = pruning / (measured.block_seconds_per_token * tokens.numel())
    return Outcome(metrics, document)


def _fingerprint(job: Job[PruneRecipe], calibration: TokenSet | None) -> dict[str, Any]:
    """All that a finished block depends on; what only comes after it is left out."""
    return {
        "recipe": job.recipe.model_dump(mode="json", exclude={"metadata": True, "evaluation": True, "output": {"name"}}),
        "model": job.source.sha256,
        "tokens": calibration.sha256 if calibration else None,
        "versions": [__version__, torch.__version__, transformers.__version__],
        "device": best_device().type,
    }


def _write_model(job: Job[PruneRecipe], attempt: Attempt) -> None:
    """Weights, config and companions: from here on the output is a model that loads."""
    write_outside_blocks(job.source, job.family, job.dtype, attempt)
    gather([attempt.outside, *(attempt.shard(facts.block) for facts in attempt.finished)], job.output)
    report.write_config(job.source.headers.config, job.recipe.output.dtype, job.output)
    report.copy_companions(job.source.folder, job.output)


def _evaluate(job: Job[PruneRecipe], evaluation: TokenSet) -> tuple[dict[str, Any], Measured]:
    """Perplexities of the source (from the cache if it is known) and of the written model; how the latter was measured."""
    job.narrator.stage("evaluating")
    dense, blocks_done = dense_perplexity(job, evaluation, more=1)
    with Checkpoint(job.output, read_model(job.output)) as written:
        model = StreamedModel(written, job.family, job.dtype, best_device())
        total = blocks_done + model.count
        pruned = measure(model, evaluation.tokens, lambda done: job.narrator.progress(blocks_done + done, total))
    stated = protocol(evaluation, job.recipe.compute_dtype)
    return {"dense": dense, "pruned": pruned.perplexity, "protocol": stated}, pruned
