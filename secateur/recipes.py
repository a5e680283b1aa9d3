"""What to do with which model: to prune it, how, how much and on which data; or to evaluate it.

A recipe is one pydantic class for each kind of job: HTTP validates it, the database stores it, the engine runs it, the
client types it and OpenAPI publishes it. Unknown fields are refused everywhere, so a misspelt parameter is an error and no
default.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# A hub repository's name: no '--' and no '..', neither '-' nor '.' at an end (huggingface_hub's own rule).
RepositoryName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]([.\-]?[A-Za-z0-9_])*$", max_length=96)]


_MODEL_ID = r"^([A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)*|models:/[A-Za-z0-9][\w.\-]*(/[1-9][0-9]*|@[A-Za-z][\w\-]*))$"


class Model(_Part):
    """A job's model: a folder under the models root (`local`), a repository of the hub (`hub`), a version in the registry of
    the installation's MLflow server (`mlflow`), or what an earlier job made (`artifact`)."""

    source: Literal["local", "hub", "mlflow", "artifact"]
    id: Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=_MODEL_ID)] = Field(
        description="A folder below the models root; `owner/name`; `models:/name/version` or `models:/name@alias`; the id "
        "of a job that made a model, or that model's `repository`.",
        examples=["smollm2-135m"],
    )
    revision: Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=r"^[\w.\-/]+$")] | None = Field(
        default=None,
        description="Hub: a branch, tag or commit, resolved to a commit when the job is accepted. Artifact: the job that "
        "made it, by default the repository's newest. MLflow: filled in.",
    )

    @model_validator(mode="after")
    def _fits_its_source(self) -> Self:
        if self.source == "local" and self.revision is not None:
            raise PydanticCustomError("model_revision", "a local model has no revision; leave it out")
        if self.source == "artifact" and "/" not in self.id and self.revision is not None:
            raise PydanticCustomError("model_revision", "a model that is named by its job has no revision; leave it out")
        if (self.source == "mlflow") != self.id.startswith("models:/"):
            raise PydanticCustomError("model_id", "a model of mlflow, and no other, is 'models:/name/version'")
        return self


ALPHAS = (0.0, 0.25, 0.5, 1.0)  # among which `alpha: auto` chooses
Clamp = tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(ge=1)]]


class NoCompensation(_Part):
    """Leave the weights that stay as the method leaves them."""

    name: Literal["none"] = "none"


class Correction(_Part):
    guard: bool = Field(
        default=True,
        description="Compare the block's output error with and without it on held-out calibration sequences, for each group "
        "of linears with the same input, and refuse it where it does not lower the error. Takes two samples or more.",
    )
    on_updated_weights: bool = Field(
        default=False, description="Say that it is wanted after a method that has updated the weights itself."
    )


class EnergyCompensation(Correction):
    """Give columns, then rows, the spread they had before (arXiv 2602.07375). Looks at no data but the guard's."""

    name: Literal["energy"]
    epsilon: float = Field(default=1e-8, ge=0, lt=1, description="Keeps the quotient finite; relative to the energy before.")
    clamp: Clamp = Field(default=(0.8, 1.5), description="Least and largest factor.")


class VarianceMatching(Correction):
    """Scale each row so that its output has the second moment that it had before."""

    name: Literal["variance_matching"]
    tokens: float = Field(
        default=1 / 32, gt=0, le=0.125, description="Share of the calibration tokens that moments are from."
    )
    clamp: Clamp = Field(default=(0.5, 2.0), description="Least and largest factor.")


class LeastSquares(Correction):
    """Scale each row so that its output has the least squared error."""

    name: Literal["least_squares"]
    tokens: float = Field(
        default=1 / 32, gt=0, le=0.125, description="Share of the calibration tokens that moments are from."
    )
    clamp: Clamp = Field(default=(0.5, 2.0), description="Least and largest factor.")


class MeanCorrection(Correction):
    """Add to each bias what the mean output lost. Linears get a bias where the architecture's config can say so (Llama's
    `attention_bias` and `mlp_bias`, for example); the config of the output says it."""

    name: Literal["mean_correction"]


Compensation = Annotated[
    NoCompensation | EnergyCompensation | VarianceMatching | LeastSquares | MeanCorrection, Field(discriminator="name")
]


Initialisation = Literal["data", "rms", "one"]


class SparsityInduction(_Part):
    """Before a block is pruned, learn a scale for each input by which its weights count (arXiv 2602.21652). What weighs
    inputs itself gets the scale as a factor of its scores; Magnitude gets it folded into the weights, which keeps the
    model's function. The model has no more parameters afterwards than before."""

    name: Literal["sparsity_induction"]
    epochs: int = Field(
        default=1, ge=0, le=5, description="Times that each block sees the calibration set (the paper's 1 to 5). 0: none."
    )
    initialisation: Initialisation | None = Field(
        default=None,
        description="Where scales begin: `data`, (median - mean)^2 of each input (the paper's equation 5, floored); `rms`, "
        "its root mean square; `one`. By default `rms` before Magnitude and `one` before other methods.",
    )
    learning_rate: float = Field(default=0.03, gt=0, le=1, description="Adam's, of the scales' logarithms (ours).")
    refresh_every: int = Field(
        default=4,
        ge=1,
        le=1000,
        description="Steps, each of a sequence, after which masks are made anew of the scales as they are (ours).",
    )
    temperature: tuple[Annotated[float, Field(gt=0, le=10)], Annotated[float, Field(gt=0, le=10)]] = Field(
        default=(0.1, 0.05),
        description="Width of the sigmoid that stands for the mask in the gradient, in units of a score's logarithm: at "
        "first and at last (ours).",
    )
    spectral_weight: float = Field(
        default=0.01,
        ge=0,
        le=100,
        description="Of the term of spectral norms: lambda, which the paper does not say. 0: none.",
    )
    spectral_alpha: float = Field(
        default=1.0, gt=0, le=100, description="Its exponent, for norms relative to what they are at scales of one (ours)."
    )
    guard: bool = Field(
        default=True,
        description="Leave a block's scales at one where they do not lower its output error on held-out calibration "
        "sequences. Takes two samples or more.",
    )


class _Method(_Part):
    """What every method has beside its own parameters."""

    updates_weights: ClassVar[bool] = False  # also those that it keeps
    inducible: ClassVar[bool] = False  # whether sparsity can be induced before it

    compensation: Compensation = Field(
        default=NoCompensation(), description="How to make up for what was removed, with the mask as it is."
    )
    induction: SparsityInduction | None = Field(
        default=None, description="What to do to a block before it is pruned. By default nothing."
    )

    @model_validator(mode="before")
    @classmethod
    def _compares_rows_once_induced(cls, body: object) -> object:
        """A row's scores are what the scales are learned on; across rows they would explode."""
        if isinstance(body, dict) and body.get("induction") is not None and "comparison" in cls.model_fields:
            return {"comparison": "row"} | body
        return body

    @model_validator(mode="after")
    def _can_be_induced(self) -> Self:
        if self.induction and not self.inducible:
            raise PydanticCustomError(
                "induction_unavailable",
                "sparsity can be induced before magnitude, wanda, ria, sparsegpt, statistical_correction, not {method}",
                {"method": getattr(self, "name", "this method")},
            )
        if self.induction and getattr(self, "comparison", "row") == "layer":
            raise PydanticCustomError(
                "induction_comparison",
                "scales are learned for weights that compete within a row; with induction, leave comparison out or say row",
            )
        if self.induction and getattr(self, "alpha", None) == "auto":
            raise PydanticCustomError(
                "induction_alpha", "scales are learned on the scores of one alpha; with induction, give a number"
            )
        return self

    @model_validator(mode="after")
    def _compensated_knowingly(self) -> Self:
        wanted = self.compensation
        if self.updates_weights and isinstance(wanted, Correction) and not wanted.on_updated_weights:
            raise PydanticCustomError(
                "compensation_after_update",
                "this method already updates the weights that stay; to compensate on top of that, set "
                "compensation.on_updated_weights",
            )
        return self

    @property
    def alternatives(self) -> Mapping[str, Self]:
        """The methods among which held-out sequences choose, by what tells them apart; one if there is no choice."""
        return {"": self}

    @property
    def guarded(self) -> bool:
        """Whether calibration sequences are held out to choose on."""
        compared = isinstance(self.compensation, Correction) and self.compensation.guard
        return len(self.alternatives) > 1 or compared or (self.induction is not None and self.induction.guard)


class Magnitude(_Method):
    """Remove the weights that are smallest in absolute value."""

    inducible: ClassVar[bool] = True

    name: Literal["magnitude"]
    comparison: Literal["row", "layer"] = Field(
        default="layer", description="Which weights compete: those of one output row, or those of the whole linear."
    )


class Wanda(_Method):
    """Remove the weights with the smallest |weight| x input norm (arXiv 2306.11695)."""

    inducible: ClassVar[bool] = True

    name: Literal["wanda"]
    comparison: Literal["row", "layer"] = Field(
        default="row", description="Which weights compete: those of one output row (the paper's), or the whole linear's."
    )


class SparseGPT(_Method):
    """Remove weights by the optimal brain surgeon's saliency and update those that stay (arXiv 2301.00774)."""

    updates_weights: ClassVar[bool] = True
    inducible: ClassVar[bool] = True

    name: Literal["sparsegpt"]
    damping: float = Field(
        default=0.01, gt=0, le=1, description="Added to the Gram's diagonal, as a fraction of its mean (the paper's 0.01)."
    )
    block_size: int = Field(
        default=128, ge=1, le=4096, description="Columns that choose their mask together (the paper's 128)."
    )


class RIA(_Method):
    """Remove the weights with the smallest share of their row and column, times a power of the input norm (ICLR 2024,
    OpenReview Tr0lPx9woF)."""

    inducible: ClassVar[bool] = True

    name: Literal["ria"]
    power: float = Field(default=0.5, ge=0, le=4, description="Of the input norm (the paper's a = 0.5).")
    comparison: Literal["row", "layer"] = Field(
        default="layer",
        description="Which weights compete: those of the whole linear (as the authors' code), or of one row.",
    )


class DSnoT(_Method):
    """Refine the mask of another method: swap removed and kept weights so that the expected output is kept (arXiv
    2310.08915)."""

    name: Literal["dsnot"]
    initial: Literal["wanda", "magnitude", "ria"] = Field(
        default="wanda", description="Whose mask is refined; weights compete within an output row."
    )
    cycles: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="Swaps in a row at most. By default the authors' 50 for rows of 4096 inputs, and in proportion.",
    )
    threshold: float = Field(
        default=0.1,
        ge=0,
        description="A row is done when the sum of 2048 expected outputs is off by at most this (the authors' 0.1).",
    )
    skip: Annotated[list[Annotated[str, StringConstraints(min_length=1, max_length=64)]], Field(max_length=32)] = Field(
        default=["mlp"],
        description="Linears that keep their initial mask: with one of these in their dotted name (the authors' `mlp`).",
    )


class ALPS(_Method):
    """Find the support by ADMM and the weights on it by conjugate gradients (arXiv 2406.07831)."""

    updates_weights: ClassVar[bool] = True

    name: Literal["alps"]
    damping: float = Field(
        default=0.01, gt=0, le=1, description="Added to the Gram's diagonal, as a fraction of its mean (the authors' 0.01)."
    )
    iterations: int = Field(default=300, ge=3, le=10_000, description="Of ADMM, at most (the authors' 300).")
    cg_iterations: int = Field(default=10, ge=0, le=1000, description="Of conjugate gradients, at most (the authors' 10).")


class StatisticalCorrection(_Method):
    """Remove the weights with the lowest |weight| x input statistic x column factor, and compensate (arXiv 2602.07375).

    `secateur`: Wanda's input norm, and variance matching behind the guard. `paper`: the fourth root of the input's variance,
    and energy compensation without a guard.
    """

    inducible: ClassVar[bool] = True

    name: Literal["statistical_correction"]
    variant: Literal["secateur", "paper"] = "secateur"
    alpha: Annotated[float, Field(ge=0, le=4)] | Literal["auto"] = Field(
        default=0.25,
        description="A column whose weights have the variance v gets the factor v^(-alpha/2). `auto` chooses 0, 0.25, 0.5 "
        "or 1 for each group of linears with the same input by the block's output error on held-out sequences.",
    )
    epsilon: float = Field(default=1e-8, gt=0, lt=1, description="Added to v; relative to the columns' mean variance.")
    comparison: Literal["row", "layer"] = Field(
        default="row", description="Which weights compete: those of one output row, or those of the whole linear."
    )
    compensation: Compensation = Field(
        default=VarianceMatching(name="variance_matching"),
        description="How to make up for what was removed. By default the variant's.",
    )

    @model_validator(mode="before")
    @classmethod
    def _compensation_of_the_paper(cls, body: object) -> object:
        if isinstance(body, dict) and body.get("variant") == "paper":
            return {"compensation": {"name": "energy", "guard": False}} | body
        return body

    @property
    def alternatives(self) -> Mapping[str, Self]:
        if self.alpha != "auto":
            return {"": self}
        return {f"alpha={alpha:g}": self.model_copy(update={"alpha": alpha}) for alpha in ALPHAS}


Method = Annotated[Magnitude | Wanda | SparseGPT | RIA | DSnoT | ALPS | StatisticalCorrection, Field(discriminator="name")]

_N_OF_M = re.compile(r"(\d{1,2}):(\d{1,2})")
MAX_GROUP = 32


class _Allocation(_Part):
    looks_at: ClassVar[Literal["nothing", "weights", "inputs"]] = "nothing"  # of the dense model, before anything is pruned


class UniformAllocation(_Allocation):
    """The same sparsity in every pruned linear."""

    name: Literal["uniform"] = "uniform"


def _zero_or_so(ratio: float) -> float:
    if 0 < ratio < 0.001:
        raise PydanticCustomError("ratio", "a ratio is 0 or at least 0.001")
    return ratio


Ratio = Annotated[float, Field(ge=0, le=1000), AfterValidator(_zero_or_so)]
LinearName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][\w.]{0,99}$")]


class PerBlockAllocation(_Allocation):
    """Sparsities of blocks in given proportions."""

    name: Literal["per_block"]
    ratios: Annotated[list[Ratio], Field(min_length=1, max_length=1000)] = Field(
        description="One for each block, the first block's first: sparsities in these proportions meet the target together."
    )


class PerLinearAllocation(_Allocation):
    """Sparsities of linears in given proportions."""

    name: Literal["per_linear"]
    ratios: Annotated[dict[LinearName, Ratio], Field(min_length=1, max_length=100)] = Field(
        description="By what is in a linear's dotted name (`q_proj`, `mlp`, `mlp.down_proj`), of which the longest counts; "
        "1 for others. Sparsities in these proportions meet the target together.",
        examples=[{"down_proj": 0.8}],
    )


class OWLAllocation(_Allocation):
    """Blocks with more outliers lose less (arXiv 2310.05175). Takes one forward of the dense model beforehand."""

    looks_at = "inputs"
    name: Literal["owl"]
    limit: float = Field(
        default=0.08, ge=0, le=0.5, description="How far a block's sparsity is from the target at most, or so (lambda)."
    )
    outlier: float = Field(
        default=5.0, gt=0, le=1000, description="An outlier's score, in means of its block's scores (the paper's M)."
    )


class AlphaPruningAllocation(_Allocation):
    """Blocks whose weights have heavier-tailed spectra lose less (arXiv 2410.10912). Looks at no data."""

    looks_at = "weights"
    name: Literal["alphapruning"]
    spread: float = Field(
        default=0.3, ge=0, lt=1, description="Before scaling, ratios lie between 1 - spread and 1 + spread (epsilon)."
    )


Allocation = Annotated[
    UniformAllocation | PerBlockAllocation | PerLinearAllocation | OWLAllocation | AlphaPruningAllocation,
    Field(discriminator="name"),
]


class Sparsity(_Part):
    """How much to remove, and in which pattern."""

    pattern: str = Field(
        default="unstructured",
        description="`unstructured`, or `N:M`: of every M consecutive inputs of a row the mask keeps N (1 <= N < M <= 32).",
        examples=["unstructured", "2:4"],
    )
    target: float = Field(
        default_factory=lambda: None,
        validate_default=True,
        gt=0,
        lt=1,
        description="Fraction of zeros over the pruned linears. An N:M pattern implies it: 1 - N/M.",
        examples=[0.5],
    )
    allocation: Allocation = Field(
        default=UniformAllocation(), description="How blocks and linears share the target; N:M goes with `uniform` alone."
    )

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, pattern: str) -> str:
        return known_pattern(pattern)

    @field_validator("target", mode="before")
    @classmethod
    def _filled_from_pattern(cls, target: object, info: ValidationInfo) -> object:
        if "pattern" not in info.data:  # the pattern is wrong already: one complaint is enough
            return target or 0.5
        group = _group_of(info.data["pattern"])
        if target is None and group is None:
            raise PydanticCustomError("target_missing", "an unstructured pattern needs a target between 0 and 1")
        return 1 - group[0] / group[1] if target is None and group else target

    @field_validator("target")
    @classmethod
    def _agrees_with_pattern(cls, target: float, info: ValidationInfo) -> float:
        group = _group_of(info.data.get("pattern", "unstructured"))
        if group and abs(target - (1 - group[0] / group[1])) > 1e-6:
            raise PydanticCustomError(
                "target_conflict",
                "the pattern {pattern} implies a target of {implied}; leave the target out or give that",
                {"pattern": info.data["pattern"], "implied": f"{1 - group[0] / group[1]:g}"},
            )
        return target

    @field_validator("allocation")
    @classmethod
    def _goes_with_pattern(cls, allocation: Allocation, info: ValidationInfo) -> Allocation:
        if allocation.name != "uniform" and _group_of(info.data.get("pattern", "unstructured")):
            raise PydanticCustomError(
                "allocation_conflict",
                "the pattern {pattern} is the same everywhere: leave the allocation out, or prune unstructured",
                {"pattern": info.data["pattern"]},
            )
        return allocation

    @property
    def group(self) -> tuple[int, int] | None:
        """(N, M) of an N:M pattern, None for an unstructured one."""
        return _group_of(self.pattern)


def known_pattern(pattern: str) -> str:
    """`unstructured`, or N:M in its shortest form. Raises pydantic's error for anything else."""
    if pattern == "unstructured":
        return pattern
    match = _N_OF_M.fullmatch(pattern)
    if match is None:
        raise PydanticCustomError("pattern", "the pattern is 'unstructured' or 'N:M', such as '2:4'")
    kept, group = int(match[1]), int(match[2])
    if not 1 <= kept < group <= MAX_GROUP:
        raise PydanticCustomError(
            "pattern",
            "'{pattern}' is no pattern: in N:M, 1 <= N < M <= {limit}",
            {"limit": MAX_GROUP, "pattern": pattern},
        )
    return f"{kept}:{group}"


def _group_of(pattern: str) -> tuple[int, int] | None:
    match = _N_OF_M.fullmatch(pattern)
    return (int(match[1]), int(match[2])) if match else None


Dataset = Literal["wikitext2-sample", "sotu-sample", "wikitext2", "c4"]


class Calibration(_Part):
    """The token set that a method observes the model on: packed sequences without padding, drawn with a seed."""

    dataset: Dataset = "wikitext2-sample"
    samples: int = Field(
        default=64,
        ge=1,
        le=4096,
        description="Number of sequences. The papers take 128 of `c4`; `wikitext2-sample` has tokens for 64 to 92 of 2048.",
    )
    sequence_length: int = Field(default=2048, ge=8, le=32768, description="Tokens in a sequence.")
    seed: int = Field(default=0, ge=0, le=2**63 - 1)


class Perplexity(_Part):
    """exp of the mean negative log-likelihood per token, over consecutive windows that do not overlap."""

    dataset: Dataset = "wikitext2-sample"
    sequence_length: int = Field(default=2048, ge=8, le=32768, description="Tokens in a window.")
    max_windows: int | None = Field(default=None, ge=1, le=100_000, description="Stop after so many windows.")


class Evaluation(_Part):
    """What to measure before and after."""

    perplexity: Perplexity | None = None


DType = Literal["bfloat16", "float32"]


class Output(_Part):
    """What to write, and under which name."""

    name: RepositoryName | None = Field(
        default=None, description="Repository name below the tenant's. By default made from model, method and sparsity."
    )
    dtype: DType = "bfloat16"
    formats: Annotated[list[Literal["safetensors"]], Field(min_length=1, max_length=1)] = ["safetensors"]


class Schedule(_Part):
    """When a job runs, and for how long."""

    priority: int = Field(
        default=0, ge=-10, le=10, description="The highest of a queue runs first. One above 0 takes a key with `admin`."
    )
    start_deadline: int | None = Field(
        default=None, ge=1, le=31_536_000, description="Seconds from submission; not begun by then, the job expires."
    )
    max_runtime: int | None = Field(
        default=None, ge=1, le=31_536_000, description="Seconds that all attempts together may run; then the job fails."
    )


class Integration(_Part):
    """Where the output is taken after success; its options stand beside `name`, as `GET /v1/integrations` says."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    name: Annotated[str, StringConstraints(min_length=1, max_length=40, pattern=r"^[a-z][a-z0-9_]*$")] = Field(
        examples=["mlflow", "hub_push"]
    )

    @property
    def options(self) -> dict[str, Any]:
        """What stands beside the name."""
        return dict(self.model_extra or {})


# Neither NUL nor half a surrogate pair: not every database can keep them.
MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[^\x00]*$")]
MetadataValue = Annotated[str, StringConstraints(max_length=512, pattern=r"^[^\x00]*$")]


class JobRecipe(_Part):
    """What the recipes of all kinds have."""

    kind: str
    schema_version: Literal[1] = 1
    model: Model
    evaluation: Evaluation = Evaluation()
    schedule: Schedule = Schedule()
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] = {}

    @property
    def method_name(self) -> str | None:
        """The method's name; None for a kind without one."""
        return None

    @property
    def compute_dtype(self) -> DType:
        """What the model is computed in when it is evaluated."""
        raise NotImplementedError


class ModelRecipe(JobRecipe):
    """What the recipes of those kinds have that write a model."""

    output: Output = Output()
    integrations: Annotated[list[Integration], Field(max_length=8)] | None = Field(
        default=None, description="Where to take the output. By default where the operator says; an empty list is nowhere."
    )

    @property
    def name(self) -> str:
        """The output's repository name, below the tenant's: the one that was asked for, or model and `_suffix`."""
        return self.output.name or _shortened(self.model, self._suffix)

    @property
    def compute_dtype(self) -> DType:
        """The output's."""
        return self.output.dtype

    @property
    def pattern(self) -> str:
        """That of the zeros."""
        return "unstructured"

    @property
    def _suffix(self) -> str:
        """What tells this output's name from its model's, such as `-wanda-50`."""
        raise NotImplementedError


class PruneSettings(ModelRecipe):
    """All that says how a model is pruned but the method and its sparsity: a sweep shares it among its jobs."""

    calibration: Calibration = Calibration()
    propagate: Literal["staged", "block", "none"] = Field(
        default="staged",
        description="Which inputs a linear is pruned on: those that the linears pruned before it leave it (`staged`, one "
        "forward); those of its dense block behind pruned blocks (`block`, as the papers' code, two forwards); those of "
        "the dense model (`none`, one forward).",
    )


class PruneRecipe(PruneSettings):
    """Prune a model: the body of `POST /v1/jobs` with `kind` `prune`."""

    kind: Literal["prune"]
    method: Method
    sparsity: Sparsity

    @property
    def method_name(self) -> str:
        """The method's name."""
        return self.method.name

    @property
    def pattern(self) -> str:
        """As asked."""
        return self.sparsity.pattern

    @property
    def _suffix(self) -> str:
        """`-wanda-50` or `-wanda-2-4`: method, and percent or pattern."""
        group = self.sparsity.group
        amount = f"{group[0]}-{group[1]}" if group else f"{100 * self.sparsity.target:.4g}".replace(".", "_")
        return f"-{self.method.name}-{amount}"


class EvaluateRecipe(JobRecipe):
    """Measure a model as it is: the body of `POST /v1/jobs` with `kind` `evaluate`. No model is written."""

    kind: Literal["evaluate"]
    evaluation: Evaluation = Evaluation(perplexity=Perplexity())
    dtype: DType = Field(default="bfloat16", description="What the model is computed in.")

    @field_validator("evaluation")
    @classmethod
    def _measures_something(cls, evaluation: Evaluation) -> Evaluation:
        if evaluation.perplexity is None:
            raise PydanticCustomError("evaluation_empty", "nothing is to be measured; give perplexity")
        return evaluation

    @property
    def compute_dtype(self) -> DType:
        """The one that was asked for."""
        return self.dtype


MAX_RATE = 0.9
Rate = Annotated[float, Field(gt=0, le=MAX_RATE)]


class Band(_Part):
    """A band of sparsity rates of an elastic model: up to `upper`, from where the band below ends."""

    upper: float = Field(gt=0, le=0.95, description="The highest rate of the band.")
    rank: int = Field(ge=1, le=256, description="Rank of the pair of matrices that the band adds to those below it.")
    weight: float = Field(gt=0, le=1, description="The band's share in the inputs of the next block; all add up to 1.")


Loss = Literal["squared", "norm"]


class Epts(_Part):
    """Optimise an elastic model, which can be materialised at any sparsity (arXiv 2606.25285)."""

    name: Literal["epts"]
    bands: Literal["seven", "three"] | Annotated[list[Band], Field(min_length=1, max_length=16)] = Field(
        default="seven",
        description="`seven` bands of rank 8 (the authors' code), `three` of ranks 24, 16, 16 (the paper), or a list.",
    )
    epochs: float = Field(
        default=2.5, gt=0, le=100, description="Times that each block sees the calibration set (the authors' code: 10)."
    )
    sequences_per_step: int = Field(default=2, ge=1, le=64, description="Sequences that a step is made of (theirs: 1).")
    learning_rate: float = Field(
        default=1e-2, ge=0, le=1, description="Adam's for the low-rank pairs, falling to 0 as a cosine (the authors': 1e-3)."
    )
    train_base: bool = Field(
        default=True, description="Ours: train the weights themselves too; masks follow them. The paper's way is false."
    )
    base_learning_rate: float = Field(default=7e-4, ge=0, le=1, description="Adam's for the weights, with `train_base`.")
    streams: Literal["mixed", "groups"] = Field(
        default="groups",
        description="What the next block is trained on: outputs at rates of all bands, mixed (`mixed`, the paper's); or "
        "those of low, of middle and of high rates apart, each for its own bands (`groups`, ours).",
    )
    every_band: bool = Field(
        default=False,
        description="Train all bands in each step (the authors' code); otherwise one of low, of middle and of high rates.",
    )
    loss: Loss = Field(
        default="norm",
        description="A band's squared error (`squared`, the authors'), or its root (`norm`, ours), by which the small "
        "errors of low rates count for as much as the large ones of high rates.",
    )
    self_distillation: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of the lowest band's output in what the others are to give (0.5: theirs).",
    )

    @field_validator("bands")
    @classmethod
    def _in_order(cls, bands: Any) -> Any:
        if isinstance(bands, list):
            uppers = [band.upper for band in bands]
            if any(later <= earlier for earlier, later in pairwise(uppers)):
                raise PydanticCustomError("bands", "each band's upper end lies above that of the band before it")
            if abs(sum(band.weight for band in bands) - 1) > 1e-6:
                raise PydanticCustomError("bands", "the weights of the bands add up to 1")
        return bands


class Curve(Evaluation):
    """What to measure of an elastic model: perplexity at several sparsities, beside it that of other methods if named."""

    sparsities: Annotated[list[Rate], Field(min_length=1, max_length=32)] = [0.3, 0.4, 0.5, 0.6, 0.7]
    beside: Annotated[list[Method], Field(max_length=8)] = Field(
        default=[], description="Methods that are run once for each of the sparsities, on the same calibration set."
    )


class ElasticRecipe(ModelRecipe):
    """Optimise an elastic model: the body of `POST /v1/jobs` with `kind` `elastic`."""

    kind: Literal["elastic"]
    method: Epts = Epts(name="epts")
    calibration: Calibration = Calibration()
    evaluation: Curve = Curve()

    @property
    def method_name(self) -> str:
        """The method's name."""
        return self.method.name

    @property
    def _suffix(self) -> str:
        return f"-{self.method.name}"


class ExportRecipe(ModelRecipe):
    """Make an ordinary model of an elastic one: the body of `POST /v1/jobs` with `kind` `export`."""

    kind: Literal["export"]
    sparsity: Sparsity

    @field_validator("sparsity")
    @classmethod
    def _within_reach(cls, sparsity: Sparsity) -> Sparsity:
        if sparsity.group or sparsity.target > MAX_RATE:
            raise PydanticCustomError(
                "sparsity", "an elastic model is materialised unstructured, at {most} at most", {"most": MAX_RATE}
            )
        return sparsity

    @property
    def method_name(self) -> str:
        """The method's name."""
        return "epts"

    @property
    def _suffix(self) -> str:
        """`-63` of a target of 0.63."""
        return f"-{100 * self.sparsity.target:.6g}".replace(".", "_")


Recipe = Annotated[PruneRecipe | EvaluateRecipe | ElasticRecipe | ExportRecipe, Field(discriminator="kind")]
Kind = Literal["prune", "evaluate", "elastic", "export"]

_RECIPE: TypeAdapter[Recipe] = TypeAdapter(Recipe)


def read_recipe(document: Any) -> Recipe:
    """The recipe of whatever kind that `document`, a JSON object, is. Raises pydantic's ValidationError."""
    return _RECIPE.validate_python(document)


def read_model_recipe(document: Any) -> ModelRecipe:
    """The recipe of a job that wrote a model. Raises TypeError if it is of another kind."""
    recipe = read_recipe(document)
    if not isinstance(recipe, ModelRecipe):
        raise TypeError(f"a job of kind {recipe.kind} writes no model")
    return recipe


def _shortened(model: Model, suffix: str) -> str:
    """The model's name with `suffix`, such as `smollm2-135m-wanda-50`, short enough for a repository."""
    # `models:/smollm2/3` is called by its name, and so is `models:/smollm2@champion`.
    last = re.sub(r"^models:/([^/@]+).*", r"\1", model.id).rsplit("/", 1)[-1]
    base = re.sub(r"[.\-]{2,}", "-", last)
    return base[: 96 - len(suffix)].rstrip("-.") + suffix
