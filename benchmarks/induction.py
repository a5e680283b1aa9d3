"""What Sparsity Induction costs: `make bench-induction`, on a machine that does nothing else.

In one run, on the demo model's calibration set: an epoch of induction, alone and with the pruning behind it, in dense
forwards of the same tokens by transformers and by the walker; and the refresh of a block's scores from the cached diagonal
beside their recomputation, a forward of the tokens through the block that takes in their norms, and the scores from those.
Kept in results/induction.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.ours import dense_seconds, transformers_seconds
from benchmarks.protocol import ROOT, token_ids
from benchmarks.quality import commit
from benchmarks.rows import MODEL
from benchmarks.seconds import seconds_of
from secateur.pruning.allocation import uniform
from secateur.pruning.checkpoint import DTYPES, Checkpoint
from secateur.pruning.device import best_device
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
FOLDER = ROOT / ".secateur" / "models" / MODEL
CONTENDERS = (("wanda", "2:4"), ("wanda", "0.5"), ("magnitude", "0.5"))
REPEATS, BLOCK = 5, 15


def timed(task: Callable[[], Any], repeats: int = REPEATS) -> float:
    """The median of some runs' seconds, after one that warms up."""
    task()
    seconds = []
    for _ in range(repeats):
        began = time.monotonic()
        task()
        seconds.append(time.monotonic() - began)
    return median(seconds)


def refresh_seconds() -> dict[str, float]:
    """Seconds for a block's scores: by a forward of all tokens; from the cached diagonal; and that with masks and slopes."""
    headers = read_model(FOLDER)
    with Checkpoint(FOLDER, headers) as source, torch.no_grad():
        family, tokens = family_of(headers), token_ids(FOLDER)
        model = StreamedModel(source, family, DTYPES["bfloat16"], best_device())
        batches, probe = model.batches(tokens), model.enter(tokens[:1, :PROBE_TOKENS])
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


def dense() -> dict[str, float]:
    """Seconds of a dense forward of the calibration set: transformers' own, and the walker's; the median of three each."""
    return {
        "transformers": median(transformers_seconds(FOLDER) for _ in range(3)),
        "walker": median(dense_seconds(FOLDER) for _ in range(3)),
    }


def epochs() -> dict[str, dict[str, float]]:
    """Of each contender the seconds of a pruning with an epoch of induction and of the same without; what the epoch costs,
    which is the difference and the forward that carries the pruned stream on, which Magnitude alone does not make; and
    multiples of the dense forwards around."""
    found, before = {}, dense()
    for contender, sparsity in CONTENDERS:
        pruning = seconds_of(contender, FOLDER, sparsity)
        whole = seconds_of(f"{contender},induction.name=sparsity_induction", FOLDER, sparsity)
        after = dense()
        forward = {who: median([before[who], after[who]]) for who in before}
        epoch = whole - pruning + (forward["walker"] if contender != "magnitude" else 0.0)
        told = {"seconds": whole, "pruning_seconds": pruning, "epoch_seconds": epoch}
        for who, one in forward.items():
            told |= {f"{who}_forward_seconds": one, f"epoch_{who}_forwards": epoch / one, f"{who}_forwards": whole / one}
        found[f"{contender} {sparsity}"] = told
        before = after
    return found


def main() -> None:
    dense_seconds(FOLDER)  # the first run of a process also warms it up
    refresh = refresh_seconds()
    found = {
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "epochs": epochs(),
        "refresh_seconds": refresh,
        "forward_over_refresh": refresh["forward"] / refresh["refresh"],
    }
    RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
