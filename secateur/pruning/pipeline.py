"""A run of any kind: a recipe and a model folder in; files, metrics and a report out."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from secateur.pruning import admission
from secateur.pruning.checkpoint import Checkpoint, sha256_of
from secateur.pruning.discovery import family_of
from secateur.pruning.estimate import measured_pace
from secateur.pruning.events import Narrator, OnEvent
from secateur.pruning.explain import explained
from secateur.pruning.gguf import convert
from secateur.pruning.headers import ModelHeaders, read_model
from secateur.pruning.job import SCRATCH, Job, Outcome, OutputFile, RunResult
from secateur.pruning.kinds.elastic import elastic
from secateur.pruning.kinds.evaluate import evaluate
from secateur.pruning.kinds.export import export
from secateur.pruning.kinds.prune import prune
from secateur.pruning.memory import keep_what_is_freed, only_what_is_new_collected, peak
from secateur.pruning.skeleton import require_fit
from secateur.recipes import Kind, Recipe

KINDS: Mapping[Kind, Callable[[Job[Any]], Outcome]] = {
    "prune": prune,
    "evaluate": evaluate,
    "elastic": elastic,
    "export": export,
}


def run(
    recipe: Recipe,
    *,
    source: Path,
    output: Path,
    cache: Path,
    on_event: OnEvent,
    texts: Path | None = None,
    earlier: Sequence[Path] = (),
) -> RunResult:
    """Do with the model in the folder `source` as `recipe` says and fill the folder `output`, which is empty or absent.

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
        with explained(), torch.no_grad(), only_what_is_new_collected():
            scratch.mkdir(parents=True)
            folder, headers = _as_safetensors(source, scratch, narrator)
            admission.check(recipe, headers)
            with Checkpoint(folder, headers) as checkpoint:
                family = family_of(headers)
                require_fit(checkpoint, family)
                scratches = tuple(each / SCRATCH for each in earlier)
                job = Job(recipe, checkpoint, family, output, cache, texts, narrator, scratches)
                outcome = KINDS[recipe.kind](job)
            shutil.rmtree(scratch)
            return _result(outcome, recipe, headers, output, started)
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True, exist_ok=True)
        raise


def _result(outcome: Outcome, recipe: Recipe, headers: ModelHeaders, output: Path, started: float) -> RunResult:
    metrics = {**outcome.metrics, "peak_memory_bytes": peak()}
    if pace := measured_pace(recipe, headers, outcome.metrics):
        metrics["operations_per_second"] = pace
    files = [OutputFile(path.name, path.stat().st_size, sha256_of(path)) for path in sorted(output.iterdir())]
    metrics["seconds"] = {**metrics["seconds"], "total": time.monotonic() - started}
    return RunResult(metrics, outcome.report, files)


def _as_safetensors(source: Path, scratch: Path, narrator: Narrator) -> tuple[Path, ModelHeaders]:
    headers = read_model(source)
    if headers.gguf_file is None:
        return source, headers
    narrator.log(f"Converting {headers.gguf_file} to safetensors.")
    convert(source / headers.gguf_file, scratch / "converted")
    return scratch / "converted", read_model(scratch / "converted")
