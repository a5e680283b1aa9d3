"""Make an ordinary model of an elastic one, at a sparsity or at one for each block: nothing is run, only written."""

from __future__ import annotations

import time

from secateur.pruning.elastic.artifact import read_elastic
from secateur.pruning.elastic.materialise import Materialiser, targets_of
from secateur.pruning.job import Job, Outcome
from secateur.pruning.kinds.finishing import begin, finish
from secateur.pruning.linears import linears_of
from secateur.recipes import ExportRecipe


def export(job: Job[ExportRecipe]) -> Outcome:
    """Fill the job's output with a verified checkpoint, its report and card."""
    evaluation = job.evaluation_tokens()
    job.narrator.stage("pruning")
    began = time.monotonic()
    blocks = linears_of(job.source.headers, job.family)
    elastic = read_elastic(job.source, blocks)
    attempt = begin(job, None)
    spent = sum(facts.seconds for facts in attempt.finished)
    with elastic.tensors:
        targets, scores = targets_of(job.recipe.sparsity, elastic, job.source, blocks)
        materialiser = Materialiser(elastic, job.source, targets, scores, job.dtype)
        for index in range(len(attempt.finished), len(blocks)):
            materialiser.write(index, f"{job.family.block(index)}.", blocks[index], attempt)
            job.narrator.progress(index + 1, len(blocks))
    return finish(job, attempt, evaluation, calibration=None, seconds=spent + time.monotonic() - began)
