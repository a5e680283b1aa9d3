"""Energy compensation as a share of the forward that Wanda needs: `make bench-energy`, on a machine that does nothing else.

In one run, of a block of the demo model: a forward of the tokens through it, for the calibration set of all benchmarks (32 x
512 tokens) and for a recipe's by default (64 x 2048), and energy compensation of its linears at 50 %, which needs no tokens.
Kept in results/energy.json.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.engine import machine
from benchmarks.induction import BLOCK, FOLDER, timed
from benchmarks.protocol import LENGTH, ROOT, SAMPLES, token_ids
from benchmarks.quality import commit
from secateur.pruning.allocation import uniform
from secateur.pruning.checkpoint import DTYPES, Checkpoint
from secateur.pruning.device import best_device
from secateur.pruning.discovery import family_of
from secateur.pruning.energy import energy_compensated
from secateur.pruning.headers import read_model
from secateur.pruning.linears import linears_of
from secateur.pruning.memory import keep_what_is_freed
from secateur.pruning.methods import Pruned
from secateur.pruning.methods.magnitude import MagnitudeMethod
from secateur.pruning.streaming import StreamedModel, forward
from secateur.recipes import Calibration, EnergyCompensation, Magnitude, Sparsity

RESULTS: Path = ROOT / "benchmarks" / "results" / "energy.json"
WANTED = EnergyCompensation(name="energy")


def token_sets() -> dict[str, Tensor]:
    """By what they are called. The text has tokens for a part of the default's: they are taken again and again."""
    usual, default = token_ids(FOLDER), Calibration()
    wanted = default.samples * default.sequence_length
    again = usual.flatten().repeat(-(-wanted // usual.numel()))[:wanted]
    return {
        f"{SAMPLES} x {LENGTH}": usual,
        f"{default.samples} x {default.sequence_length}": again.view(default.samples, -1),  # (samples, sequence_length)
    }


def main() -> None:
    keep_what_is_freed()  # as a job does
    headers = read_model(FOLDER)
    with Checkpoint(FOLDER, headers) as source, torch.no_grad():
        family = family_of(headers)
        model = StreamedModel(source, family, DTYPES["bfloat16"], best_device())
        names = [linear.module for linear in linears_of(headers, family)[BLOCK]]
        with model.block(BLOCK) as block:
            weights = [block.get_submodule(name).get_parameter("weight") for name in names]
            targets = uniform(Sparsity(target=0.5), names)
            pruned = MagnitudeMethod(Magnitude(name="magnitude")).prune(weights, [targets[name] for name in names], None)

            def compensate() -> list[Pruned]:
                return [energy_compensated(weight, each, WANTED) for weight, each in zip(weights, pruned, strict=True)]

            seconds = {}
            for name, tokens in token_sets().items():
                batches = model.batches(tokens)
                rounds = [
                    {
                        "forward": timed(lambda batches=batches: forward(block, BLOCK, batches, model.lanes), repeats=1),
                        "compensation": timed(compensate),
                    }
                    for _ in range(3)
                ]
                seconds[name] = {key: median(each[key] for each in rounds) for key in rounds[0]}
                shares = sorted(each["compensation"] / each["forward"] for each in rounds)
                seconds[name] |= {"share": shares[1], "least_share": shares[0], "most_share": shares[2]}
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    found = {"date": date, "commit": commit(), "machine": machine(), "threads": torch.get_num_threads(), "seconds": seconds}
    RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
