"""What was done to a model, block by block and linear by linear: the stuff of reports."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Choice:
    """What the guard chose, and the errors of the block's output on held-out sequences that the candidates had."""

    chosen: str
    errors: dict[str, float]


@dataclass(frozen=True, slots=True)
class LinearFacts:
    """What was done to one linear: `name` is its tensor's, `target` the fraction of its weights that was to be removed; the
    rest is as in `methods.Pruned`.

    `seconds`: of those that its group took, the share that its rows have. `choices`: what the guard chose for its group.
    """

    name: str
    shape: tuple[int, ...]
    target: float
    removed: int
    error: float
    error_measure: str
    fallbacks: tuple[str, ...]
    seconds: float
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True, slots=True)
class BlockTraining:
    """How a block of an elastic model was trained.

    `band_errors`: squared error of the block's output relative to the squared output, mean over the training of each band;
    None for a band that had no turn. `safeguard`: such errors at the safeguard's rate, by what was compared.
    """

    band_errors: list[float | None]
    safeguard: dict[str, float]


@dataclass(frozen=True, slots=True)
class Induction:
    """How sparsity was induced in a block.

    `choice`: of the guard, among scales of `one`, the `initial` and the `trained` ones; without a guard it has no errors.
    `folded`: the tensors that were scaled, beside those that are pruned. `refused`: kinds of pairs that the block does not
    allow, and why.
    """

    choice: Choice
    folded: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class BlockFacts:
    """What was done to one block; linears in the order they run. `fallbacks`: what the block as a whole made necessary.

    `score`: what the allocation saw in it, percent of outliers or mean exponent; None if it did not look.
    """

    block: int
    score: float | None = None
    seconds: float = 0.0
    fallbacks: tuple[str, ...] = ()
    linears: list[LinearFacts] = field(default_factory=list)
    training: BlockTraining | None = None
    induction: Induction | None = None
