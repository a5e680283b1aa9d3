"""Small random models, with a tokenizer, as ordinary checkpoint folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from secateur.pruning.families import FAMILIES

_USUAL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_GEMMA = _USUAL | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
_GPT = {"n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
_DEEPSEEK = _USUAL | {
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
# Small, but with what makes each family what it is: layers that slide, heads that share, embeddings of another width.
SMALL: Mapping[str, Mapping[str, Any]] = {
    "LlamaForCausalLM": _USUAL,
    "MistralForCausalLM": _USUAL | {"head_dim": 8, "sliding_window": 16},
    "Qwen2ForCausalLM": _USUAL,
    "Qwen3ForCausalLM": _USUAL | {"head_dim": 8},
    "Gemma2ForCausalLM": _GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "Gemma3ForCausalLM": _GEMMA | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "Phi3ForCausalLM": _USUAL,
    "Olmo2ForCausalLM": _USUAL,
    "StableLmForCausalLM": _USUAL | {"partial_rotary_factor": 0.5},
    "FalconForCausalLM": {
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "alibi": True,
        "bias": True,
    },
    "OPTForCausalLM": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 16,
    },
    "GPT2LMHeadModel": _GPT,
    "GPTNeoXForCausalLM": _USUAL | {"num_hidden_layers": 2},
    "GPTJForCausalLM": _GPT | {"rotary_dim": 4},
    "BloomForCausalLM": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "MptForCausalLM": {"d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 128},
    "MixtralForCausalLM": _USUAL | {"num_hidden_layers": 2, "num_local_experts": 4},
    "Qwen2MoeForCausalLM": _USUAL
    | {
        "num_hidden_layers": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
    },
    "Qwen3MoeForCausalLM": _USUAL
    | {
        "num_hidden_layers": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [0],
    },
    "DeepseekV2ForCausalLM": _DEEPSEEK | {"topk_method": "greedy"},
    "DeepseekV3ForCausalLM": _DEEPSEEK | {"n_group": 2, "topk_group": 1},
}
# Families that are not in the table, with what tells them from those that are: scaled logits, one norm for two, biases.
UNLISTED: Mapping[str, Mapping[str, Any]] = {
    "GraniteForCausalLM": _USUAL
    | {"model_type": "granite", "logits_scaling": 0.5, "residual_multiplier": 0.5, "embedding_multiplier": 3.0},
    "CohereForCausalLM": _USUAL | {"model_type": "cohere", "logit_scale": 2.0},
    "PhiForCausalLM": _USUAL | {"model_type": "phi"},
    "Starcoder2ForCausalLM": _USUAL | {"model_type": "starcoder2"},
    "OlmoeForCausalLM": _USUAL | {"model_type": "olmoe", "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2},
}


def make_family(folder: Path, architecture: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A model of an architecture with random weights, and a tokenizer, in `folder`; the same bytes for the same arguments.

    Linears are large enough that blocks, and so what is pruned in them, matter; biases and norms are not all alike.
    """
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    words = {"vocab_size": len(tokenizer), "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": None}
    shape = SMALL.get(architecture) or UNLISTED[architecture]
    model_type = shape.get("model_type") or FAMILIES[architecture].model_type
    config = AutoConfig.for_model(**{"model_type": model_type, **words, **shape, **changes})
    model = AutoModelForCausalLM.from_config(config)
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        elif id(parameter) not in embeddings:
            parameter.data.mul_(8)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_llama(
    folder: Path,
    *,
    seed: int = 0,
    hidden: int = 32,
    intermediate: int = 64,
    layers: int = 2,
    heads: int = 4,
    key_value_heads: int = 2,
    positions: int = 512,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """A Llama with random weights and a byte-level tokenizer of 257 tokens in `folder`; the same bytes for the same seed."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=256,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and an end of text."""
    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>")
