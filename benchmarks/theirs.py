"""One run of llm-compressor, in its own environment: `python theirs.py MODEL METHOD TOKENS INTO`. Prints one line of JSON.

Its sequential pipeline is timed by itself: the model is in memory before, and nothing is written within.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.pipelines.sequential.pipeline import SequentialPipeline
from transformers import AutoModelForCausalLM, AutoTokenizer

MODIFIERS = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}


def main(folder: str, method: str, tokens: str, into: str) -> None:
    rows: list[list[int]] = json.loads(Path(tokens).read_text())
    dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    seconds: list[float] = []
    whole = SequentialPipeline.__call__

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.monotonic()
        try:
            return whole(*args, **kwargs)
        finally:
            seconds.append(time.monotonic() - began)

    # it is registered as an object of its class: the class's call is what runs
    SequentialPipeline.__call__ = staticmethod(timed)
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        dataset=dataset,
        recipe=MODIFIERS[method](sparsity=0.5, mask_structure="0:0", targets=["Linear"], ignore=["re:.*lm_head"]),
        max_seq_length=len(rows[0]),
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
        pipeline="sequential",
    )
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model.save_pretrained(into)
    AutoTokenizer.from_pretrained(folder).save_pretrained(into)
    linears = [module.weight for name, module in model.named_modules() if name.endswith("_proj")]
    zeros = sum(int((weight == 0).sum()) for weight in linears)
    print(
        json.dumps(
            {
                "seconds": sum(seconds),
                "runs": len(seconds),
                "peak_memory_bytes": peak,
                "sparsity": zeros / sum(weight.numel() for weight in linears),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
