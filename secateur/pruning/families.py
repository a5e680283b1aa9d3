"""Where blocks, linears, embeddings and head are in a model: one row per family, and nothing else knows a family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from secateur.problems import at
from secateur.pruning.headers import ModelHeaders

_LLAMA_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True, slots=True)
class Family:
    """Names inside a checkpoint. `blocks` is the list of decoder blocks; `linears` are the pruned ones, `norms` the norms,
    below a block; `norm` is the one behind the last block."""

    architecture: str
    model_type: str
    blocks: str = "model.layers"
    linears: tuple[str, ...] = _LLAMA_LINEARS
    norms: tuple[str, ...] = _LLAMA_NORMS
    embedding: str = "model.embed_tokens.weight"
    norm: str = "model.norm.weight"
    head: str = "lm_head.weight"

    def block(self, index: int) -> str:
        """The name of a block, such as `model.layers.3`."""
        return f"{self.blocks}.{index}"

    def weights(self, index: int) -> list[str]:
        """The tensors of a block that are pruned."""
        return [f"{self.block(index)}.{linear}.weight" for linear in self.linears]

    def norm_weights(self, index: int) -> list[str]:
        """The tensors of a block's norms."""
        return [f"{self.block(index)}.{norm}.weight" for norm in self.norms]


FAMILIES: Mapping[str, Family] = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM", "llama"),
        Family("MistralForCausalLM", "mistral"),
        Family("Qwen2ForCausalLM", "qwen2"),
        Family("Qwen3ForCausalLM", "qwen3", norms=(*_LLAMA_NORMS, "self_attn.q_norm", "self_attn.k_norm")),
    )
}


def family_of(model: ModelHeaders) -> Family:
    """The family of a safetensors model. Raises ProblemError `unsupported_architecture` at /model/id."""
    family = FAMILIES.get(model.architecture)
    if family is None or family.model_type != model.config["model_type"]:
        raise at(
            "/model/id",
            "unsupported_architecture",
            f"The model is a {model.architecture[:100]} (model_type {str(model.config['model_type'])[:100]!r}).",
            hint=f"Supported are {', '.join(FAMILIES)}.",
        )
    return family


def block_count(model: ModelHeaders) -> int:
    """Number of decoder blocks."""
    return int(model.config["num_hidden_layers"])


def pruned_weights(model: ModelHeaders, family: Family) -> list[str]:
    """Every tensor that is pruned, in the order of the blocks."""
    return [name for index in range(block_count(model)) for name in family.weights(index)]
