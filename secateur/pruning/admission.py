"""A recipe against the model it names: all that can be known to go wrong before a job is queued. Torch-free."""

from __future__ import annotations

from secateur.problems import at
from secateur.pruning.allocation import allocate, blocks_of
from secateur.pruning.biases import bias_of, with_biases
from secateur.pruning.datasets import known_bytes
from secateur.pruning.discovery import family_of
from secateur.pruning.families import Family, is_tied, positions_of
from secateur.pruning.headers import ModelHeaders
from secateur.pruning.induction.pairs import pairs_of
from secateur.pruning.linears import Linear, linears_of, require
from secateur.pruning.registry import calibration_of
from secateur.recipes import Magnitude, MeanCorrection, PruneRecipe, Recipe


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
    _check_outside(model, family)
    linears = linears_of(model, family)
    if isinstance(recipe, PruneRecipe):
        _check_pattern(recipe, linears)
        if recipe.sparsity.allocation.looks_at == "nothing":
            allocate(recipe.sparsity, blocks_of(linears))
        _check_biases(recipe, model, family, linears)
        _check_pairs(recipe, model, family)
    _check_positions(recipe, positions_of(model, family))


def _check_samples(recipe: PruneRecipe) -> None:
    """The guard holds out whole sequences, and leaves one to observe."""
    if recipe.method.guarded and recipe.calibration.samples < 2:
        raise at(
            "/calibration/samples",
            "calibration_too_small",
            "The method's guard holds a calibration sequence out; there is one sample only.",
            hint="Ask for two samples or more, or set guard to false.",
        )


def _check_biases(recipe: PruneRecipe, model: ModelHeaders, family: Family, linears: list[list[Linear]]) -> None:
    """Mean correction needs a bias somewhere, or a config that can give one."""
    if isinstance(recipe.method.compensation, MeanCorrection):
        tensors = with_biases(model, family).tensors
        if not any(bias_of(linear) in tensors for block in linears for linear in block):
            raise at(
                "/method/compensation",
                "compensation_unavailable",
                f"No linear of a {model.architecture} can have a bias, which mean correction changes.",
                hint="Choose another compensation, such as variance_matching.",
            )


def _check_pairs(recipe: PruneRecipe, model: ModelHeaders, family: Family) -> None:
    """To a method that looks at weights alone, induction is what is folded into them."""
    if not (recipe.method.induction and isinstance(recipe.method, Magnitude)):
        return
    pairs = pairs_of(model, family)
    if not any(pair.consumers for block in pairs for pair in block.allowed):
        reasons = "; ".join(sorted({refusal.reason for block in pairs for refusal in block.refused}))
        raise at(
            "/method/induction",
            "induction_unavailable",
            f"No scale can be folded into a {model.architecture[:100]}: {reasons}.",
            hint="Before a method that looks at inputs, such as wanda, induction needs no fold.",
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


def _check_outside(model: ModelHeaders, family: Family) -> None:
    """There is an embedding, and what follows the blocks."""
    for name in [family.embedding] if is_tied(model, family) else [family.embedding, family.head]:
        require(model.tensors.get(name), name, rank=2)
    if family.norm:
        require(model.tensors.get(family.norm), family.norm, rank=1)


def _check_pattern(recipe: PruneRecipe, blocks: list[list[Linear]]) -> None:
    group = recipe.sparsity.group
    if group is None:
        return
    for linear in (linear for block in blocks for linear in block):
        if linear.in_features % group[1]:
            raise at(
                "/sparsity/pattern",
                "pattern_does_not_divide",
                f"'{linear.name}' has {linear.in_features} inputs, which groups of {group[1]} do not divide.",
            )


def _check_positions(recipe: Recipe, positions: int | None) -> None:
    if positions is None:
        return
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
