"""GGUF in, an ordinary checkpoint out: for models that are only to be had as GGUF."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from secateur.problems import ProblemError
from secateur.pruning.quiet import quiet_transformers


def convert(gguf_file: Path, into: Path, dtype: str = "bfloat16") -> None:
    """Dequantise `gguf_file` and write safetensors, config and tokenizer to `into`, which appears whole or not at all.

    The model is held in memory, the one place in the engine where it is. Raises ProblemError `model_file_corrupt` for a file
    that cannot be read as a causal language model.
    """
    partial = into.with_name(f".{into.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    place = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name, "trust_remote_code": False}
    with quiet_transformers():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                **place, dtype=getattr(torch, dtype), quantization_config=GgufConfig(dequantize=True)
            )
            tokenizer = AutoTokenizer.from_pretrained(**place)
        except (ValueError, KeyError, IndexError, TypeError, NotImplementedError, OSError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise ProblemError(
                "model_file_corrupt",
                f"{gguf_file.name} cannot be read as GGUF: {error}",
                hint="Give a GGUF file of a supported architecture, or the model's safetensors.",
            ) from error
        model.config._name_or_path = ""  # a GGUF file's title is no place to load from
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    for file in partial.iterdir():
        file.chmod(0o644)  # weights are written for their owner alone, and a worker may be another user
    partial.rename(into)
