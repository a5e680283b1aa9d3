"""The perplexity of a run's source model: computed once for each model and protocol, however many runs ask for it."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Any

from secateur.pruning.calibration import TokenSet
from secateur.pruning.device import best_device
from secateur.pruning.evaluation import PerplexityCache, measure, protocol
from secateur.pruning.job import Job
from secateur.pruning.streaming import StreamedModel


def dense_perplexity(job: Job[Any], evaluation: TokenSet, *, more: int = 0) -> tuple[float, int]:
    """The source's perplexity on `evaluation`, and the blocks that it was run through: none if it is known from before.

    If another run is just measuring it, that one is waited for. Progress is told as if the same blocks came `more` times
    again. Raises ProblemError `nonfinite_activation`.
    """
    known = PerplexityCache(job.cache, job.source.sha256, protocol(evaluation, job.recipe.compute_dtype))
    with ExitStack() as held:
        if (value := known.get()) is None:
            with suppress(OSError):  # where no lock can be made, nothing can be kept either: that is told below
                held.enter_context(known.alone(lambda: job.narrator.log("Waiting for a job that measures the dense model.")))
            value = known.get()
        if value is not None:
            return value, 0
        model = StreamedModel(job.source, job.family, job.dtype, best_device())
        total = model.count * (1 + more)
        value = measure(model, evaluation.tokens, lambda done: job.narrator.progress(done, total)).perplexity
        try:
            known.put(value)
        except OSError as error:  # the next job measures again; this one has what it needs
            job.narrator.log(f"The dense perplexity could not be kept: {error.strerror}.", "warning")
    return value, model.count
