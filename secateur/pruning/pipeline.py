"""A run: a recipe and a model folder in, a verified checkpoint with its report and card out."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from secateur import __version__
from secateur.pruning import admission, report
from secateur.pruning.blocks import best_device, prune_blocks, write_outside_blocks
from secateur.pruning.calibration import TokenSet, calibration_set, evaluation_set, tokenise
from secateur.pruning.checkpoint import DTYPES, Checkpoint, gather, sha256_of
from secateur.pruning.datasets import read_text
from secateur.pruning.evaluation import Measured, PerplexityCache, measure, protocol
from secateur.pruning.events import Narrator, OnEvent
from secateur.pruning.explain import explained
from secateur.pruning.families import Family, block_count, family_of
from secateur.pruning.gguf import convert
from secateur.pruning.headers import ModelHeaders, read_model
from secateur.pruning.memory import give_back, keep_what_is_freed, peak
from secateur.pruning.registry import METHODS
from secateur.pruning.resume import Attempt
from secateur.pruning.streaming import StreamedModel, require_fit
from secateur.pruning.verify import verify
from secateur.recipes import PruneRecipe

SCRATCH = ".scratch"  # in the output folder, while the run is on


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
    earlier: Sequence[Path] = (),
) -> RunResult:
    """Prune the model in the folder `source` as `recipe` says and fill the folder `output`, which is empty or absent.

    `cache`: a folder for what is worth keeping between runs (dense perplexities). `texts`: the folder that
    `datasets.fetch_texts` filled, for datasets of the hub. `on_event` is told stages, progress and log lines. `earlier`:
    output folders that killed runs of the same job left, on the same file system; blocks that they finished are taken over,
    whatever else is in them is ignored. If the run fails `output` is left empty, and what is raised is a ProblemError
    wherever the user can do something about it.
    """
    started, narrator = time.monotonic(), Narrator(on_event)
    scratch = output / SCRATCH
    keep_what_is_freed()
    try:
        with explained(), torch.no_grad():
            scratch.mkdir(parents=True)
            folder, headers = _as_safetensors(source, scratch, narrator)
            admission.check(recipe, headers)
            with Checkpoint(folder, headers) as checkpoint:
                require_fit(checkpoint)
                job = _Job(recipe, checkpoint, family_of(headers), output, cache, texts, narrator)
                return _run(job, [folder / SCRATCH for folder in earlier], started)
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True, exist_ok=True)
        raise


@dataclass(frozen=True, slots=True)
class _Job:
    """What every step of a run needs."""

    recipe: PruneRecipe
    source: Checkpoint
    family: Family
    output: Path
    cache: Path
    texts: Path | None
    narrator: Narrator

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.recipe.output.dtype]


def _run(job: _Job, earlier: list[Path], started: float) -> RunResult:
    job.narrator.stage("calibrating")
    calibration, evaluation = _token_sets(job)
    give_back()
    attempt = Attempt(job.output / SCRATCH, _fingerprint(job, calibration))
    attempt.take_over(earlier)
    if attempt.finished:
        job.narrator.log(f"An earlier attempt finished {len(attempt.finished)} blocks; they are taken over.")
    job.narrator.stage("pruning")
    tokens = calibration.tokens if calibration else None
    pruning = prune_blocks(job.recipe, job.source, job.family, tokens=tokens, attempt=attempt, narrator=job.narrator)
    _write_model(job, attempt)
    perplexities, measured = _evaluate(job, evaluation) if evaluation else (None, None)
    job.narrator.stage("packaging")
    removed = {linear.name: linear.removed for block in attempt.finished for linear in block.linears}
    facts = verify(job.output, job.source, removed, job.recipe)
    document = report.compression_report(
        job.recipe, job.source.sha256, facts, blocks=attempt.finished, calibration=calibration, perplexity=perplexities
    )
    report.write_report_and_card(job.output, job.source.folder, job.recipe, document, facts)
    shutil.rmtree(attempt.folder)

    seconds = {"prune": pruning}
    metrics: dict[str, Any] = {"sparsity": facts.sparsity, "seconds": seconds, "peak_memory_bytes": peak()}
    if perplexities:
        metrics["perplexity"] = perplexities
    if measured:
        seconds["evaluate"] = measured.seconds
        if tokens is not None:
            metrics["forward_multiple"] = pruning / (measured.block_seconds_per_token * tokens.numel())
    files = [OutputFile(path.name, path.stat().st_size, sha256_of(path)) for path in sorted(job.output.iterdir())]
    seconds["total"] = time.monotonic() - started
    return RunResult(metrics, files, document)


def _fingerprint(job: _Job, calibration: TokenSet | None) -> dict[str, Any]:
    """All that a finished block depends on; what only comes after it is left out."""
    return {
        "recipe": job.recipe.model_dump(mode="json", exclude={"metadata": True, "evaluation": True, "output": {"name"}}),
        "model": job.source.sha256,
        "tokens": calibration.sha256 if calibration else None,
        "versions": [__version__, torch.__version__, transformers.__version__],
        "device": best_device().type,
    }


def _as_safetensors(source: Path, scratch: Path, narrator: Narrator) -> tuple[Path, ModelHeaders]:
    headers = read_model(source)
    if headers.gguf_file is None:
        return source, headers
    narrator.log(f"Converting {headers.gguf_file} to safetensors.")
    convert(source / headers.gguf_file, scratch / "converted")
    return scratch / "converted", read_model(scratch / "converted")


def _token_sets(job: _Job) -> tuple[TokenSet | None, TokenSet | None]:
    """The calibration set and the evaluation set, each None where the recipe needs none."""
    recipe, folder = job.recipe, job.source.folder
    vocabulary = job.source.headers.tensors[job.family.embedding].shape[0]
    calibration = evaluation = None
    if METHODS[recipe.method.name].calibrated:
        text = read_text(recipe.calibration.dataset, "calibration", job.texts)
        calibration = calibration_set(tokenise(folder, text, vocabulary), recipe.calibration)
    if wanted := recipe.evaluation.perplexity:
        text = read_text(wanted.dataset, "evaluation", job.texts)
        evaluation = evaluation_set(tokenise(folder, text, vocabulary), wanted)
    return calibration, evaluation


def _write_model(job: _Job, attempt: Attempt) -> None:
    """Weights, config and companions: from here on the output is a model that loads."""
    write_outside_blocks(job.source, job.family, job.dtype, attempt)
    gather([attempt.outside, *(attempt.shard(facts.block) for facts in attempt.finished)], job.output)
    report.write_config(job.source.headers.config, job.recipe.output.dtype, job.output)
    report.copy_companions(job.source.folder, job.output)


def _evaluate(job: _Job, evaluation: TokenSet) -> tuple[dict[str, Any], Measured]:
    """Perplexities of the source (from the cache if it is known) and of the written model; how the latter was measured."""
    job.narrator.stage("evaluating")
    stated = protocol(evaluation, job.recipe.output.dtype)
    known = PerplexityCache(job.cache, job.source.sha256, stated)
    dense, blocks = known.get(), block_count(job.source.headers)
    before, total = (0, blocks) if dense is not None else (blocks, 2 * blocks)

    def measured(checkpoint: Checkpoint, offset: int) -> Measured:
        model = StreamedModel(checkpoint, job.family, job.dtype, best_device())
        return measure(model, evaluation.tokens, lambda done: job.narrator.progress(offset + done, total))

    if dense is None:
        dense = measured(job.source, 0).perplexity
        try:
            known.put(dense)
        except OSError as error:  # the next job measures again; this one has what it needs
            job.narrator.log(f"The dense perplexity could not be kept: {error.strerror}.", "warning")
    with Checkpoint(job.output, read_model(job.output)) as written:
        pruned = measured(written, before)
    return {"dense": dense, "pruned": pruned.perplexity, "protocol": stated}, pruned
