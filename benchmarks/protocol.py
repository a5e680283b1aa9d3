"""What all benchmarks share: the recipe, the tokens, and the yardstick of quality."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from torch import Tensor, no_grad

from secateur.pruning.calibration import calibration_set, evaluation_set, tokenise
from secateur.pruning.checkpoint import DTYPES, Checkpoint
from secateur.pruning.datasets import Role, read_text
from secateur.pruning.device import best_device
from secateur.pruning.discovery import family_of
from secateur.pruning.evaluation import measure
from secateur.pruning.headers import read_model
from secateur.pruning.streaming import StreamedModel
from secateur.recipes import Perplexity, PruneRecipe

ROOT = Path(__file__).parents[1]
SAMPLES, LENGTH = 32, 512
EVALUATION = Perplexity(sequence_length=1024, max_windows=32)
ALL_ARTICLES = Perplexity(sequence_length=1024)


def recipe(method: str, samples: int = SAMPLES, length: int = LENGTH, seed: int = 0) -> PruneRecipe:
    """50 % unstructured, bfloat16, on wikitext2-sample's calibration articles."""
    return PruneRecipe.model_validate(
        {
            "kind": "prune",
            "model": {"source": "local", "id": "smollm2-135m"},
            "method": {"name": method},
            "sparsity": {"target": 0.5},
            "calibration": {"samples": samples, "sequence_length": length, "seed": seed},
        }
    )


def token_ids(folder: Path, seed: int = 0) -> Tensor:
    """The calibration set, (samples, length), with the tokenizer in `folder`."""
    calibration = recipe("wanda", seed=seed).calibration
    return calibration_set(_tokens(folder, "calibration"), calibration).tokens


def perplexity(folder: Path, dataset: str = "wikitext2-sample", wanted: Perplexity | None = None) -> float:
    """Perplexity on the evaluation text of `dataset`, measured by Secateur, whoever wrote the model; over the windows of
    EVALUATION if none are `wanted`."""
    headers = read_model(folder)
    with Checkpoint(folder, headers) as source, no_grad():
        model = StreamedModel(source, family_of(headers), DTYPES["bfloat16"], best_device())
        return measure(
            model, evaluation_set(_tokens(folder, "evaluation", dataset), wanted or EVALUATION).tokens, lambda _: None
        ).perplexity


def _tokens(folder: Path, role: Role, dataset: str = "wikitext2-sample") -> Tensor:
    headers = read_model(folder)
    return tokenise(folder, read_text(dataset, role), headers.tensors[family_of(headers).embedding].shape[0])


if __name__ == "__main__":
    if sys.argv[1] == "tokens":
        print(json.dumps(token_ids(Path(sys.argv[2]), seed=int(sys.argv[3])).tolist()))
    else:
        print(json.dumps([perplexity(Path(folder), wanted=ALL_ARTICLES) for folder in sys.argv[2:]]))
