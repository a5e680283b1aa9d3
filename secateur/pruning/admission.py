"""A recipe against the model it names: all that can be known to go wrong before a job is queued. Torch-free."""

from __future__ import annotations

import re

from secateur.problems import ProblemError, at
from secateur.pruning.datasets import known_bytes
from secateur.pruning.families import Family, block_count, family_of
from secateur.pruning.headers import FLOATS, ModelHeaders
from secateur.pruning.registry import calibration_of
from secateur.recipes import PruneRecipe, Recipe

_INDEX = re.compile(r"0|[1-9][0-9]{0,9}")


def check(recipe: Recipe, model: ModelHeaders) -> None:
    """Raise a ProblemError, with a pointer into the recipe, if `recipe` cannot be run on `model`.

    Of a GGUF model only the texts can be checked; the run checks the rest once it is converted.
    """
    _check_texts(recipe)
    if isinstance(recipe, PruneRecipe):
        _check_samples(recipe)
    if model.format == "gguf":
        return
    family = family_of(model)
    if model.config.get("quantization_config"):
        raise at(
            "/model/id",
            "model_quantized",
            "The model's config.json has a quantization_config: its weights are packed and cannot be read as they are.",
            hint="Give the model it was quantised from.",
        )
    _check_tensors(model, family)
    if isinstance(recipe, PruneRecipe):
        _check_pattern(recipe, model, family)
    _check_positions(recipe, model)


def _check_samples(recipe: PruneRecipe) -> None:
    """The guard holds out whole sequences, and leaves one to observe."""
    if recipe.method.guarded and recipe.calibration.samples < 2:
        raise at(
            "/calibration/samples",
            "calibration_too_small",
            "The method's guard holds a calibration sequence out; there is one sample only.",
            hint="Ask for two samples or more, or set guard to false.",
        )


def _check_texts(recipe: Recipe) -> None:
    """A token is at least a byte of text, so a text with fewer bytes than tokens wanted is too short for certain."""
    calibration, perplexity = calibration_of(recipe), recipe.evaluation.perplexity
    if calibration:
        there = known_bytes(calibration.dataset, "calibration")
        wanted = calibration.samples * calibration.sequence_length
        if there is not None and there < wanted:
            raise at(
                "/calibration/samples",
                "calibration_text_too_short",
                f"{calibration.samples} x {calibration.sequence_length} tokens were asked for; the calibration text of "
                f"'{calibration.dataset}' has {there} bytes.",
                hint="Ask for fewer samples or shorter sequences, or use a larger set.",
            )
    if perplexity:
        there = known_bytes(perplexity.dataset, "evaluation")
        if there is not None and there < perplexity.sequence_length:
            raise at(
                "/evaluation/perplexity/sequence_length",
                "calibration_text_too_short",
                f"One window has {perplexity.sequence_length} tokens; the evaluation text of '{perplexity.dataset}' has "
                f"{there} bytes.",
                hint="Ask for shorter windows, or use a larger set.",
            )


def _check_tensors(model: ModelHeaders, family: Family) -> None:
    """Every block has its linears and norms; there is an embedding and what follows the blocks, and no other block."""
    _check_blocks(model, family)
    outside = [family.embedding] if model.config.get("tie_word_embeddings", False) else [family.embedding, family.head]
    _require(model, outside, rank=2)
    _require(model, [family.norm], rank=1)
    for index in range(block_count(model)):  # stops at the first that is missing: the config may claim a billion
        _require(model, family.weights(index), rank=2)
        _require(model, family.norm_weights(index), rank=1)


def _require(model: ModelHeaders, names: list[str], *, rank: int) -> None:
    for name in names:
        tensor = model.tensors.get(name)
        if tensor is None:
            raise ProblemError(
                "model_file_corrupt", f"The tensor '{name}' is missing, which a {model.architecture} of this config has."
            )
        if len(tensor.shape) != rank or 0 in tensor.shape or tensor.dtype not in FLOATS:
            kind = "matrix" if rank == 2 else "vector"
            raise ProblemError(
                "model_file_corrupt",
                f"The tensor '{name}' is {tensor.dtype} {tensor.shape}, where a {kind} of floats is needed.",
            )


def _check_blocks(model: ModelHeaders, family: Family) -> None:
    """A tensor below the blocks belongs to one that config.json counts."""
    prefix, count = f"{family.blocks}.", block_count(model)
    for name in model.tensors:
        if not name.startswith(prefix):
            continue
        index = name[len(prefix) :].partition(".")[0]
        if not (_INDEX.fullmatch(index) and int(index) < count):
            raise ProblemError(
                "model_config_invalid", f"config.json counts {count} blocks; '{name[:120]}' is of none of them."
            )


def _check_pattern(recipe: PruneRecipe, model: ModelHeaders, family: Family) -> None:
    group = recipe.sparsity.group
    if group is None:
        return
    for index in range(block_count(model)):
        for name in family.weights(index):
            in_features = model.tensors[name].shape[1]
            if in_features % group[1]:
                raise at(
                    "/sparsity/pattern",
                    "pattern_does_not_divide",
                    f"'{name}' has {in_features} inputs, which groups of {group[1]} do not divide.",
                )


def _check_positions(recipe: Recipe, model: ModelHeaders) -> None:
    positions = int(model.config["max_position_embeddings"])
    lengths = {}
    if calibration := calibration_of(recipe):
        lengths["/calibration/sequence_length"] = calibration.sequence_length
    if recipe.evaluation.perplexity:
        lengths["/evaluation/perplexity/sequence_length"] = recipe.evaluation.perplexity.sequence_length
    for pointer, length in lengths.items():
        if length > positions:
            raise at(
                pointer,
                "sequence_too_long",
                f"Sequences of {length} tokens were asked for; the model has {positions} positions.",
                hint=f"Ask for at most {positions}.",
            )
