"""What the kinds that write a pruned model have in common when its blocks are written: the files, the proof, the report."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from secateur import __version__
from secateur.pruning import report
from secateur.pruning.blocks import write_outside_blocks
from secateur.pruning.calibration import TokenSet
from secateur.pruning.checkpoint import Checkpoint, gather
from secateur.pruning.dense import dense_perplexity
from secateur.pruning.device import best_device
from secateur.pruning.evaluation import Measured, measure, protocol
from secateur.pruning.headers import read_model
from secateur.pruning.job import Job, Outcome
from secateur.pruning.memory import give_back
from secateur.pruning.resume import Attempt
from secateur.pruning.streaming import StreamedModel
from secateur.pruning.verify import verify


def begin(job: Job[Any], calibration: TokenSet | None) -> Attempt:
    """The attempt at the job's blocks, with those that earlier ones finished."""
    attempt = Attempt(job.scratch, _fingerprint(job, calibration))
    attempt.take_over(job.earlier)
    if attempt.finished:
        job.narrator.log(f"An earlier attempt finished {len(attempt.finished)} blocks; they are taken over.")
    return attempt


def _fingerprint(job: Job[Any], calibration: TokenSet | None) -> dict[str, Any]:
    """All that a finished block depends on; what only comes after it is left out."""
    return {
        "recipe": job.recipe.model_dump(mode="json", exclude={"metadata": True, "evaluation": True, "output": {"name"}}),
        "model": job.source.sha256,
        "tokens": calibration.sha256 if calibration else None,
        "versions": [__version__, torch.__version__, transformers.__version__],
        "device": best_device().type,
    }


def finish(
    job: Job[Any], attempt: Attempt, evaluation: TokenSet | None, *, calibration: TokenSet | None, seconds: float
) -> Outcome:
    """Make an ordinary, verified checkpoint of the blocks, which took `seconds`, evaluate it, and write report and card."""
    write_model(job, attempt)
    give_back()
    perplexities, measured = _evaluate(job, evaluation) if evaluation else (None, None)
    job.narrator.stage("packaging")
    give_back()
    removed = {linear.name: linear.removed for block in attempt.finished for linear in block.linears}
    folded = [name for block in attempt.finished if block.induction for name in block.induction.folded]
    facts = verify(job.output, job.source, job.family, removed, job.recipe, folded=folded)
    document = report.compression_report(
        job.recipe, job.source.sha256, facts, blocks=attempt.finished, calibration=calibration, perplexity=perplexities
    )
    report.write_report_and_card(job.output, job.source.folder, job.recipe, document, facts)

    told = {"prune": seconds}
    metrics: dict[str, Any] = {"sparsity": facts.sparsity, "seconds": told}
    if perplexities:
        metrics["perplexity"] = perplexities
    if measured:
        told["evaluate"] = measured.seconds
        if calibration:
            metrics["forward_multiple"] = seconds / (measured.block_seconds_per_token * calibration.tokens.numel())
    return Outcome(metrics, document)


def write_model(job: Job[Any], attempt: Attempt) -> None:
    """Weights, config and companions: from here on the output is a model that loads."""
    write_outside_blocks(job.source, job.family, job.dtype, attempt)
    gather([attempt.outside, *(attempt.shard(facts.block) for facts in attempt.finished)], job.output)
    report.write_config(job.source.headers.config, job.recipe.output.dtype, job.output)
    report.copy_companions(job.source.folder, job.output)


def _evaluate(job: Job[Any], evaluation: TokenSet) -> tuple[dict[str, Any], Measured]:
    """Perplexities of the source (from the cache if it is known) and of the written model; how the latter was measured."""
    job.narrator.stage("evaluating")
    dense, blocks_done = dense_perplexity(job, evaluation, more=1)
    with Checkpoint(job.output, read_model(job.output)) as written:
        model = StreamedModel(written, job.family, job.dtype, best_device())
        total = blocks_done + model.count
        pruned = measure(model, evaluation.tokens, lambda done: job.narrator.progress(blocks_done + done, total))
    stated = protocol(evaluation, job.recipe.compute_dtype)
    return {"dense": dense, "pruned": pruned.perplexity, "protocol": stated}, pruned
