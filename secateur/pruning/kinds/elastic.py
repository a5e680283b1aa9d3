"""Optimise an elastic model: its blocks are trained one after the other, then it is evaluated over a grid of sparsities."""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any

from secateur.pruning import report
from secateur.pruning.blocks import write_outside_blocks
from secateur.pruning.calibration import TokenSet
from secateur.pruning.checkpoint import Checkpoint, gather, merge
from secateur.pruning.dense import dense_perplexity
from secateur.pruning.device import best_device
from secateur.pruning.elastic.artifact import TENSORS, is_elastic, read_elastic, write_base, write_header
from secateur.pruning.elastic.bands import bands_of
from secateur.pruning.elastic.card import write_report_and_card
from secateur.pruning.elastic.rated import RatedModel
from secateur.pruning.elastic.safeguard import LOW_BAND_OFF
from secateur.pruning.elastic.walk import optimise_blocks
from secateur.pruning.evaluation import measure, protocol
from secateur.pruning.events import Narrator
from secateur.pruning.headers import read_model
from secateur.pruning.job import Job, Outcome
from secateur.pruning.kinds.finishing import begin
from secateur.pruning.kinds.prune import prune
from secateur.pruning.linears import linears_of
from secateur.pruning.memory import give_back
from secateur.pruning.resume import Attempt
from secateur.pruning.verify import verify
from secateur.recipes import ElasticRecipe, Evaluation, Method, PruneRecipe, Sparsity


def elastic(job: Job[ElasticRecipe]) -> Outcome:
    """Fill the job's output with an elastic artifact, its report and card."""
    job.narrator.stage("calibrating")
    calibration, evaluation = job.calibration_tokens(), job.evaluation_tokens()
    if calibration is None:
        raise ValueError("an elastic model is trained on a calibration set")
    give_back()
    attempt = begin(job, calibration)
    job.narrator.stage("pruning")
    seconds = optimise_blocks(
        job.recipe, job.source, job.family, tokens=calibration.tokens, attempt=attempt, narrator=job.narrator
    )
    _write_artifact(job, attempt)
    metrics: dict[str, Any] = {"seconds": {"prune": seconds}}
    if evaluation:
        curve, pace = _evaluate(job, evaluation)
        metrics |= curve | {"forward_multiple": seconds / (pace * calibration.tokens.numel())}
    job.narrator.stage("packaging")
    base = read_model(job.output).bytes
    metrics["artifact"] = {"bytes": base + (job.output / TENSORS).stat().st_size, "base_bytes": base}
    document = write_report_and_card(job, attempt.finished, calibration, metrics)
    return Outcome(metrics, document)


def _write_artifact(job: Job[ElasticRecipe], attempt: Attempt) -> None:
    """Base, config, companions, chains and norms; and the header when the base has been verified."""
    blocks = linears_of(job.source.headers, job.family)
    write_outside_blocks(job.source, job.family, job.dtype, attempt)
    gather([attempt.outside, *write_base(job.source, job.family, blocks, attempt)], job.output)
    merge([attempt.shard(facts.block) for facts in attempt.finished], job.output / TENSORS, is_elastic)
    report.write_config(job.source.headers.config, job.recipe.output.dtype, job.output)
    report.copy_companions(job.source.folder, job.output)
    trained = [linear.name for linears in blocks for linear in linears] if job.recipe.method.train_base else []
    verify(job.output, job.source, job.family, dict.fromkeys(trained, 0), job.recipe)
    low_band_off = [facts.block for facts in attempt.finished if LOW_BAND_OFF in facts.fallbacks]
    with Checkpoint(job.output, read_model(job.output)) as base:
        write_header(base, bands_of(job.recipe.method), low_band_off, base_trained=job.recipe.method.train_base)


def _evaluate(job: Job[ElasticRecipe], evaluation: TokenSet) -> tuple[dict[str, Any], float]:
    """The dense perplexity and, at each sparsity of the grid, the elastic model's and those of the methods beside it; and
    the seconds that the blocks took per token."""
    job.narrator.stage("evaluating")
    wanted = job.recipe.evaluation
    dense, before = dense_perplexity(job, evaluation, more=len(wanted.sparsities))
    curve: list[dict[str, Any]] = []
    pace = 0.0
    with Checkpoint(job.output, read_model(job.output)) as base:
        blocks = linears_of(base.headers, job.family)
        total = before + len(blocks) * len(wanted.sparsities)
        made = read_elastic(base, blocks)
        with made.tensors:
            for rate in wanted.sparsities:
                model = RatedModel(base, job.family, job.dtype, best_device(), elastic=made, rate=rate)
                done = before + len(blocks) * len(curve)
                found = measure(model, evaluation.tokens, partial(_tell, job.narrator, done, total))
                curve.append({"sparsity": rate, "perplexity": {"epts": found.perplexity}})
                pace = found.block_seconds_per_token
    for method in wanted.beside:
        for point in curve:
            point["perplexity"][method.name] = _beside(job, method, point["sparsity"])
    return {"perplexity": {"dense": dense, "protocol": protocol(evaluation, job.recipe.output.dtype)}, "curve": curve}, pace


def _tell(narrator: Narrator, before: int, total: int, blocks: int) -> None:
    narrator.progress(before + blocks, total)


def _beside(job: Job[ElasticRecipe], method: Method, sparsity: float) -> float:
    """The perplexity of what a method makes at one sparsity, on the same calibration and evaluation sets."""
    job.narrator.log(f"Running {method.name} at {sparsity:g} beside it.")
    recipe = PruneRecipe(
        kind="prune",
        model=job.recipe.model,
        method=method,
        sparsity=Sparsity(target=sparsity),
        calibration=job.recipe.calibration,
        evaluation=Evaluation(perplexity=job.recipe.evaluation.perplexity),
        output=job.recipe.output,
    )
    output = job.scratch / "beside"
    alone = Job(recipe, job.source, job.family, output, job.cache, job.texts, Narrator(lambda _: None), ())
    try:
        alone.scratch.mkdir(parents=True)
        return float(prune(alone).metrics["perplexity"]["pruned"])
    finally:
        shutil.rmtree(output, ignore_errors=True)
