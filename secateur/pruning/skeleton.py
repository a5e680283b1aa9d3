"""The model without its weights: built from config.json alone, and held against what the checkpoint has."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from secateur.problems import ProblemError
from secateur.pruning.checkpoint import Checkpoint
from secateur.pruning.experts import separate_experts
from secateur.pruning.families import Family
from secateur.pruning.linears import linears_of, unused_tensors
from secateur.pruning.quiet import quiet_transformers

# What old versions of transformers saved beside the weights: rotary frequencies, causal masks.
_LEGACY_BUFFERS = r"rotary_emb\.inv_freq$|attn\.(masked_)?bias$"


def without_weights(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Any:
    """The model on the meta device, but for the buffers that no checkpoint holds (rotary frequencies), which are made."""
    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(
                str(checkpoint.folder), trust_remote_code=False, local_files_only=True, **checkpoint.headers.switched
            )
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, attn_implementation=_attention(config), trust_remote_code=False
                )
            for name, buffer in model.named_non_persistent_buffers():
                parent, _, leaf = name.rpartition(".")
                model.get_submodule(parent).register_buffer(leaf, torch.empty_like(buffer, device=device), persistent=False)
            model.initialize_weights()
            separate_experts(model)
        except ProblemError:
            raise
        except Exception as error:  # config.json is hostile input, and transformers raises what it likes
            raise ProblemError(
                "model_config_invalid", f"No model can be made from config.json: {type(error).__name__}: {error}"
            ) from error
    return model.eval().requires_grad_(False)


def _attention(config: PretrainedConfig) -> str:
    """The attention that is run, never one that config.json names: torch's, if it can do all that the model does (it cannot
    cap scores as Gemma 2 does), else transformers' plain one."""
    return "sdpa" if MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa else "eager"


def require_fit(checkpoint: Checkpoint, family: Family) -> None:
    """Raise ProblemError `model_file_corrupt` unless the checkpoint holds the tensors of the model that config.json names,
    in their shapes, and no others; `model_config_invalid` if it names none.

    As for `from_pretrained`, a tensor that is tied to another may be absent, and what old versions saved beside the weights
    may be there.
    """
    model = without_weights(checkpoint, torch.float32, torch.device("cpu"))
    _require_linears(model, checkpoint, family)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    unused = set(unused_tensors(checkpoint.headers, family))
    tensors = checkpoint.headers.tensors
    found = {family.parameter(name): tensor.shape for name, tensor in tensors.items() if name not in unused}
    missing = expected.keys() - found.keys()
    with quiet_transformers():
        model.tie_weights(missing_keys=missing)  # takes those away that are tied to what is there
    ignored = re.compile("|".join([*(model._keys_to_ignore_on_load_unexpected or ()), _LEGACY_BUFFERS]))
    unexpected = [name for name in found if name not in expected and not ignored.search(name)]
    misshapen = [name for name in expected.keys() & found.keys() if expected[name] != found[name]]
    for names, what in ((missing, "missing"), (unexpected, "none of the model's"), (misshapen, "of another shape")):
        if names:
            some = ", ".join(f"'{name[:120]}'" for name in sorted(names)[:3])
            raise ProblemError(
                "model_file_corrupt",
                f"The weights do not fit the model that config.json describes: {len(names)} are {what}, such as {some}.",
            )


def _require_linears(model: nn.Module, checkpoint: Checkpoint, family: Family) -> None:
    """Raise ProblemError `unsupported_architecture` unless what is to be pruned are linears, stored as they should be."""
    for index, linears in enumerate(linears_of(checkpoint.headers, family)):
        block = model.get_submodule(f"{family.block_list}.{index}")
        modules = dict(block.named_modules())
        for linear in linears:
            module = modules.get(linear.module)
            if not isinstance(module, Conv1D if linear.transposed else nn.Linear):
                raise ProblemError(
                    "unsupported_architecture",
                    f"'{linear.name}' is to be pruned, and in transformers it is of a {type(module).__name__}, which is no "
                    "linear that stores its weight so.",
                )
