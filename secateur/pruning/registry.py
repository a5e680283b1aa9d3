"""Which methods there are, what each declares, and where its code is. The code itself is loaded when it is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from pydantic import BaseModel

from secateur import recipes
from secateur.recipes import Calibration, ElasticRecipe, EvaluateRecipe, ExportRecipe, PruneRecipe, Recipe

# What a method needs to know of a linear's inputs: nothing, a vector of norms, mean and variance, or the Gram matrix.
Observes = Literal["nothing", "norms", "moments", "gram"]


@dataclass(frozen=True, slots=True)
class MethodCard:
    """A method as `GET /v1/methods` lists it; `kind` is that of the jobs that take it, and `target` the
    `module:object` of a `methods.Method`, or of what runs the kind."""

    name: str
    summary: str
    paper: str | None
    patterns: tuple[str, ...]
    cost: str
    observes: Observes
    parameters: type[BaseModel]
    target: str
    kind: str = "prune"

    def parameters_schema(self) -> dict[str, Any]:
        """JSON Schema of the parameters that stand beside `name` in a recipe."""
        schema = self.parameters.model_json_schema()
        schema.get("properties", {}).pop("name", None)
        schema["required"] = [field for field in schema.get("required", []) if field != "name"]
        return schema

    def load(self) -> Any:
        """The class that implements the method; imports torch."""
        module, _, name = self.target.partition(":")
        return getattr(import_module(module), name)


_BOTH = ("unstructured", "N:M")

METHODS: Mapping[str, MethodCard] = {
    card.name: card
    for card in (
        MethodCard(
            name="magnitude",
            summary="Removes the weights that are smallest in absolute value. Looks at no data.",
            paper=None,
            patterns=_BOTH,
            cost="No forward pass: reads and writes the checkpoint once.",
            observes="nothing",
            parameters=recipes.Magnitude,
            target="secateur.pruning.methods.magnitude:MagnitudeMethod",
        ),
        MethodCard(
            name="wanda",
            summary="Removes the weights with the smallest |weight| x input norm. Changes no other weight.",
            paper="https://arxiv.org/abs/2306.11695",
            patterns=_BOTH,
            cost="About one forward pass of the calibration tokens.",
            observes="norms",
            parameters=recipes.Wanda,
            target="secateur.pruning.methods.wanda:WandaMethod",
        ),
        MethodCard(
            name="sparsegpt",
            summary="Removes weights by their effect on the linear's output and updates those that stay to make up for it.",
            paper="https://arxiv.org/abs/2301.00774",
            patterns=_BOTH,
            cost="One forward pass, a Gram matrix for each distinct input, and one factorisation of each.",
            observes="gram",
            parameters=recipes.SparseGPT,
            target="secateur.pruning.methods.sparsegpt:SparseGPTMethod",
        ),
        MethodCard(
            name="ria",
            summary="Removes the weights with the smallest share of their row and column, times the root of the input norm.",
            paper="https://openreview.net/forum?id=Tr0lPx9woF",
            patterns=_BOTH,
            cost="About one forward pass of the calibration tokens.",
            observes="norms",
            parameters=recipes.RIA,
            target="secateur.pruning.methods.ria:RIAMethod",
        ),
        MethodCard(
            name="dsnot",
            summary="Swaps weights of another method's mask so that expected outputs stay. Changes no other weight.",
            paper="https://arxiv.org/abs/2310.08915",
            patterns=_BOTH,
            cost="About one forward pass of the calibration tokens.",
            observes="moments",
            parameters=recipes.DSnoT,
            target="secateur.pruning.methods.dsnot:DSnoTMethod",
        ),
        MethodCard(
            name="alps",
            summary="Finds by ADMM which weights to keep, and by conjugate gradients what they become.",
            paper="https://arxiv.org/abs/2406.07831",
            patterns=_BOTH,
            cost="One forward pass, an eigendecomposition for each distinct input, and up to 300 products with each linear.",
            observes="gram",
            parameters=recipes.ALPS,
            target="secateur.pruning.methods.alps:ALPSMethod",
        ),
        MethodCard(
            name="statistical_correction",
            summary="Removes the weights with the smallest |weight| x input norm x column factor and scales the others.",
            paper="https://arxiv.org/abs/2602.07375",
            patterns=_BOTH,
            cost="About one forward pass of the calibration tokens, and a third of one for compensation and its guard.",
            observes="moments",
            parameters=recipes.StatisticalCorrection,
            target="secateur.pruning.methods.statistical_correction:StatisticalCorrectionMethod",
        ),
    )
}


EPTS = MethodCard(
    name="epts",
    summary="Trains one elastic model, from which a model of any sparsity is materialised in seconds.",
    paper="https://arxiv.org/abs/2606.25285",
    patterns=("unstructured",),
    cost="Some fifty forward passes of the calibration tokens; materialising takes none.",
    observes="norms",
    parameters=recipes.Epts,
    target="secateur.pruning.kinds.elastic:elastic",
    kind="elastic",
)


def methods() -> list[MethodCard]:
    """Every method, in the order they are shown."""
    return [*METHODS.values(), EPTS]


def card_of(recipe: PruneRecipe | ExportRecipe) -> MethodCard:
    """The card of the method by which a model was pruned."""
    return EPTS if isinstance(recipe, ExportRecipe) else METHODS[recipe.method.name]


def sampled_share(method: recipes.Method) -> float:
    """The share of the calibration tokens whose inputs are kept for a recipe's compensation."""
    wanted = method.compensation
    return wanted.tokens if isinstance(wanted, recipes.VarianceMatching | recipes.LeastSquares) else 0.0


def observes(method: recipes.Method) -> Observes:
    """What has to be observed for a recipe's method: what it declares, or the norms if it looks at nothing but its
    compensation or the guard does."""
    declared = METHODS[method.name].observes
    if isinstance(method, recipes.StatisticalCorrection) and method.variant == "secateur":
        declared = "norms"  # only the paper's score has the variance
    looks = (
        method.guarded
        or method.induction is not None
        or sampled_share(method) > 0
        or isinstance(method.compensation, recipes.MeanCorrection)
    )
    return "norms" if declared == "nothing" and looks else declared


def calibration_of(recipe: Recipe) -> Calibration | None:
    """The token set that a run of `recipe` observes the model on; None if it looks at no data."""
    match recipe:
        case ElasticRecipe():
            return recipe.calibration
        case PruneRecipe():
            looked_at = observes(recipe.method) != "nothing" or recipe.sparsity.allocation.looks_at == "inputs"
            return recipe.calibration if looked_at else None
        case EvaluateRecipe() | ExportRecipe():
            return None
