"""What every step of a run needs, whatever its kind, and what comes out of one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from secateur.pruning.calibration import TokenSet, calibration_set, evaluation_set, tokenise
from secateur.pruning.checkpoint import DTYPES, Checkpoint
from secateur.pruning.datasets import Role, read_text
from secateur.pruning.events import Narrator
from secateur.pruning.families import Family
from secateur.pruning.registry import calibration_of
from secateur.recipes import Recipe

SCRATCH = ".scratch"  # in the output folder, while the run is on

R_co = TypeVar("R_co", bound=Recipe, covariant=True)


@dataclass(frozen=True, slots=True)
class Job(Generic[R_co]):
    """A run's recipe, the model it reads and the folders it works in, as `pipeline.run` has them.

    `earlier`: the scratch folders of earlier attempts.
    """

    recipe: R_co
    source: Checkpoint
    family: Family
    output: Path
    cache: Path
    texts: Path | None
    narrator: Narrator
    earlier: tuple[Path, ...]

    @property
    def dtype(self) -> torch.dtype:
        """What the model is computed in."""
        return DTYPES[self.recipe.compute_dtype]

    @property
    def scratch(self) -> Path:
        """For what only this run and later attempts read; removed at the end."""
        return self.output / SCRATCH

    def calibration_tokens(self) -> TokenSet | None:
        """The calibration set, if the recipe needs one."""
        wanted = calibration_of(self.recipe)
        return calibration_set(self._tokens(wanted.dataset, "calibration"), wanted) if wanted else None

    def evaluation_tokens(self) -> TokenSet | None:
        """The evaluation set, if the recipe wants a perplexity."""
        wanted = self.recipe.evaluation.perplexity
        return evaluation_set(self._tokens(wanted.dataset, "evaluation"), wanted) if wanted else None

    def _tokens(self, dataset: str, role: Role) -> torch.Tensor:
        vocabulary = self.source.headers.tensors[self.family.embedding].shape[0]
        return tokenise(self.source.folder, read_text(dataset, role, self.texts), vocabulary)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a kind of run tells of its work: `metrics` as the job shows them, and the `report`, which also has seconds."""

    metrics: dict[str, Any]
    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file of the result: its name in the output folder, size in bytes, and sha256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class RunResult(Outcome):
    """The outcome, and the `files` of the output folder."""

    files: list[OutputFile]
