"""Which texts a job looks at."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from secateur.recipes.part import Part

Dataset = Literal["wikitext2-sample", "sotu-sample", "wikitext2", "c4"]


class Calibration(Part):
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


class Perplexity(Part):
    """exp of the mean negative log-likelihood per token, over consecutive windows that do not overlap."""

    dataset: Dataset = "wikitext2-sample"
    sequence_length: int = Field(default=2048, ge=8, le=32768, description="Tokens in a window.")
    max_windows: int | None = Field(default=None, ge=1, le=100_000, description="Stop after so many windows.")


class Evaluation(Part):
    """What to measure before and after."""

    perplexity: Perplexity | None = None
