"""One run of Secateur, as the service runs it: `python -m benchmarks.ours MODEL METHOD INTO SEED`. Prints one line of JSON.

After it, so that its peak is its own, as many tokens go through the dense decoder twice, in two ways: by transformers'
own forward of the whole model, four sequences at a time, and by the walker, block by block.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.protocol import recipe, token_ids
from secateur.pruning.checkpoint import DTYPES, Checkpoint
from secateur.pruning.device import best_device
from secateur.pruning.discovery import family_of
from secateur.pruning.headers import read_model
from secateur.pruning.memory import peak
from secateur.pruning.pipeline import run
from secateur.pruning.streaming import StreamedModel, forward


def dense_seconds(folder: Path, clock: Callable[[], float] = time.monotonic) -> float:
    """Seconds that the calibration tokens of seed 0 take through the decoder blocks, each block's load included; no head.

    By `clock`: with `time.process_time` those of the processor, which other programs disturb less.
    """
    headers = read_model(folder)
    with Checkpoint(folder, headers) as source, torch.no_grad():
        model = StreamedModel(source, family_of(headers), DTYPES["bfloat16"], best_device())
        batches = model.batches(token_ids(folder))
        began = clock()
        for index in range(model.count):
            with model.block(index) as block:
                forward(block, index, batches, model.lanes)
        return clock() - began


def transformers_seconds(folder: Path) -> float:
    """Seconds that the calibration tokens of seed 0 take through transformers' decoder, in memory already; no head.

    Four sequences of 512 tokens at a time were the fastest of 1, 4, 8 and 32 on two cores.
    """
    decoder = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(best_device()).eval().base_model
    tokens = token_ids(folder).to(best_device())
    with torch.no_grad():
        began = time.monotonic()
        for part in torch.split(tokens, 4):
            decoder(input_ids=part, use_cache=False)
        return time.monotonic() - began


def main(model: str, method: str, into: str, seed: str) -> None:
    folder, output, wanted = Path(model), Path(into), recipe(method, seed=int(seed))
    result = run(wanted, source=folder, output=output, cache=output.with_suffix(".cache"), on_event=lambda _: None)
    most = peak()
    print(
        json.dumps(
            {
                "seconds": result.metrics["seconds"]["prune"],
                "peak_memory_bytes": most,
                "dense_forward_seconds": [transformers_seconds(folder) for _ in range(2)],
                "walker_forward_seconds": [dense_seconds(folder) for _ in range(2)],
                "sparsity": result.metrics["sparsity"],
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
