"""Prune a model: the weights are walked through block by block, then evaluated, verified and described."""

from __future__ import annotations

from dataclasses import replace

from secateur.pruning.biases import with_biases
from secateur.pruning.blocks import prune_blocks
from secateur.pruning.checkpoint import Checkpoint
from secateur.pruning.job import Job, Outcome
from secateur.pruning.kinds.finishing import begin, finish
from secateur.pruning.memory import give_back
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
    attempt = begin(job, calibration)
    job.narrator.stage("pruning")
    tokens = calibration.tokens if calibration else None
    seconds = prune_blocks(job.recipe, job.source, job.family, tokens=tokens, attempt=attempt, narrator=job.narrator)
    return finish(job, attempt, evaluation, calibration=calibration, seconds=seconds)
