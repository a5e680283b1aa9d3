"""Evaluate a model as it is: numbers and a report, and no file."""

from __future__ import annotations

import time

from secateur.pruning import report
from secateur.pruning.dense import dense_perplexity
from secateur.pruning.evaluation import protocol
from secateur.pruning.job import Job, Outcome
from secateur.pruning.memory import give_back
from secateur.recipes import EvaluateRecipe


def evaluate(job: Job[EvaluateRecipe]) -> Outcome:
    """The model's perplexity. One that an earlier job of the tenant measured by the same protocol is not measured again."""
    job.narrator.stage("evaluating")
    evaluation = job.evaluation_tokens()
    if evaluation is None:
        raise ValueError("a recipe of kind evaluate has something to measure")
    give_back()
    began = time.monotonic()
    value, measured_blocks = dense_perplexity(job, evaluation)
    perplexity = {"value": value, "protocol": protocol(evaluation, job.recipe.compute_dtype)}
    seconds = {"evaluate": time.monotonic() - began} if measured_blocks else {}
    document = report.evaluation_report(job.recipe, job.source.sha256, perplexity)
    return Outcome({"perplexity": perplexity, "seconds": seconds}, document)
