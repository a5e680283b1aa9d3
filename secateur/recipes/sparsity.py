"""How much is removed, in which pattern, and from where."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, StringConstraints, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from secateur.recipes.part import Part

_N_OF_M = re.compile(r"(\d{1,2}):(\d{1,2})")


MAX_GROUP = 32


class _Allocation(Part):
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


class Sparsity(Part):
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
