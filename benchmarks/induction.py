"""What Sparsity Induction costs: `make bench-induction`, on a machine that does nothing else.

In one run, on the demo model's calibration set: an epoch of induction before Wanda at 50 %, all in all, as a multiple of the
dense forward of the same tokens by the same walker; and the refresh of a block's scores from the cached diagonal beside
their recomputation, a forward of the tokens through the block that takes in their norms and the scores from those. Kept in
results/induction.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.ours import dense_seconds
from benchmarks.protocol import ROOT, token_ids
from benchmarks.quality import commit
from benchmarks.rows import MODEL
from benchmarks.seconds import seconds_of
from secateur.pruning.allocation import uniform
from secateur.pruning.blocks import best_device
from secateur.pruning.checkpoint import DTYPES, Checkpoint
from secateur.pruning.discovery import family_of
from secateur.pruning.group_pruner import Look
from secateur.pruning.headers import read_model
from secateur.pruning.induction.relaxation import relax
from secateur.pruning.induction.scores import log_scores
from secateur.pruning.linears import linears_of
from secateur.pruning.placed import turned
from secateur.pruning.stages import Group, groups_of, run_dense
from secateur.pruning.statistics import InputMoments, glimpse, observe
from secateur.pruning.streaming import PROBE_TOKENS, StreamedModel
from secateur.recipes import Sparsity, SparsityInduction, Wanda

RESULTS = ROOT / "benchmarks" / "results" / "induction.json"
ROUNDS, REPEATS = 3, 5
BLOCK = 15


def timed(task: Callable[[], Any], repeats: int = REPEATS) -> float:
    """The median of some runs' seconds, after one that warms up."""
    task()
    seconds = []
    for _ in range(repeats):
        began = time.monotonic()
        task()
        seconds.append(time.monotonic() - began)
    return median(seconds)


def refresh_seconds(folder: Path) -> dict[str, float]:
    """Seconds for a block's scores: by a forward of all tokens; from the cached diagonal; and that with masks and slopes."""
    headers = read_model(folder)
    with Checkpoint(folder, headers) as source, torch.no_grad():
        family, tokens = family_of(headers), token_ids(folder)
        model = StreamedModel(source, family, DTYPES["bfloat16"], best_device())
        batches, probe = model.batches(tokens, single=True), model.enter(tokens[:1, :PROBE_TOKENS])
        linears = linears_of(headers, family)[BLOCK]
        targets = uniform(Sparsity(target=0.5), [linear.module for linear in linears])
        method, tau = Wanda(name="wanda"), SparsityInduction(name="sparsity_induction").temperature[0]
        with model.block(BLOCK) as block:
            weights = {
                each.module: turned(each, block.get_submodule(each.module).get_parameter("weight")) for each in linears
            }
            groups = groups_of(block, BLOCK, list(weights), probe)

            def recomputed() -> dict[str, Tensor]:
                scores: dict[str, Tensor] = {}

                def see(group: Group, looks: list[Look]) -> None:
                    moments = seen.setdefault(group, InputMoments(looks[0].inputs.shape[-1], looks[0].inputs.device))
                    observe(moments, [look.glimpse for look in looks])

                seen: dict[Group, InputMoments] = {}
                run_dense(
                    block,
                    BLOCK,
                    batches,
                    groups,
                    look=lambda inputs: Look(inputs, glimpse("moments", inputs)),
                    observe=see,
                    lanes=model.lanes,
                    propagate=False,
                )
                for group, moments in seen.items():
                    scores |= {name: log_scores(method, weights[name], moments) for name in group}
                return scores

            cached = recomputed()
            thetas = {name: torch.randn(weight.shape[1]) / 10 for name, weight in weights.items()}
            names = list(weights)

            def score(name: str) -> Tensor:
                return cached[name] + thetas[name]

            def mask(name: str) -> object:
                return relax(weights[name], cached[name], thetas[name], targets[name], tau)

            return {
                "forward": timed(recomputed),
                "refresh": timed(lambda: model.lanes.map(score, names)),
                "refresh_with_masks": timed(lambda: model.lanes.map(mask, names)),
            }


def main() -> None:
    folder = ROOT / ".secateur" / "models" / MODEL
    contender = "wanda,induction.name=sparsity_induction"
    refresh = refresh_seconds(folder)
    dense_seconds(folder)
    rounds = [{"dense": dense_seconds(folder), "induced": seconds_of(contender, folder)} for _ in range(ROUNDS)]
    found = {
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "epoch_in_dense_forwards": median(each["induced"] / each["dense"] for each in rounds),
        "rounds": rounds,
        "refresh_seconds": refresh,
        "forward_over_refresh": refresh["forward"] / refresh["refresh"],
    }
    RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
