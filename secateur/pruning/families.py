"""What checkpoints of each family look like: a row for each, and nothing else in the engine knows a family. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from secateur.problems import ProblemError
from secateur.pruning.headers import CONFIG, ModelHeaders

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_EXPERTS = tuple(f"mlp.experts.*.{linear}" for linear in ("gate_proj", "up_proj", "down_proj"))
_SHARED_EXPERTS = tuple(f"mlp.shared_experts.{linear}" for linear in ("gate_proj", "up_proj", "down_proj"))
_NORMS = ("input_layernorm", "post_attention_layernorm")
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_FOUR_NORMS = (*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_GPT = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_FALCON = ("self_attention.query_key_value", "self_attention.dense", *_GPT)
_ATTENTION_BIAS = ("attention_bias", _ATTENTION)
# Tensors that transformers keeps in their dtype whatever the model's is: rounded, they would choose other experts.
EXACT = ("e_score_correction_bias",)


@dataclass(frozen=True, slots=True)
class Family:
    """Names inside a checkpoint.

    `blocks` is the list of decoder blocks. Below a block: every block has the `linears` and `norms`; a block may have the
    `optional` linears (`*` counts experts) and the `dense` matrices, which are never pruned (routers). `transposed`: weights
    are stored (in_features, out_features), as Conv1D has them. Outside: `embedding`, the `norm` behind the last block if
    there always is one, and the `head`, which a config without `tie_word_embeddings` has of its own unless it is `tied`.

    `base` is the module that holds everything but the head: a checkpoint that was saved from it alone lacks this prefix,
    which `bare` says. `renamed`: what in a tensor's name transformers calls otherwise. `count` and `positions` are the keys
    of config.json for the number of blocks and of positions; `most_positions` are those of a config that does not say, None
    if there is no end to them. `bias_switches`: keys of config.json that give linears a bias, and which linears. `unused` is
    the key for a number of blocks behind the last, which only training or speculation uses and which stay as they are.
    """

    architecture: str
    model_type: str
    linears: tuple[str, ...] = (*_ATTENTION, *_MLP)
    optional: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    norms: tuple[str, ...] = _NORMS
    transposed: bool = False
    base: str = "model"
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens.weight"
    norm: str | None = "model.norm.weight"
    head: str = "lm_head.weight"
    tied: bool = False
    bias_switches: tuple[tuple[str, tuple[str, ...]], ...] = ()
    bare: bool = False
    renamed: tuple[tuple[str, str], ...] = ()
    count: str = "num_hidden_layers"
    positions: str | None = "max_position_embeddings"
    most_positions: int | None = None
    unused: str | None = None

    def block(self, index: int) -> str:
        """The name of a block in the checkpoint, such as `model.layers.3`."""
        return f"{self.blocks}.{index}"

    @property
    def block_list(self) -> str:
        """Where the blocks are in transformers' model."""
        return self.parameter(self.blocks)

    def parameter(self, tensor: str) -> str:
        """What transformers calls a tensor of the checkpoint."""
        for theirs, ours in self.renamed:
            tensor = tensor.replace(theirs, ours)
        return f"{self.base}.{tensor}" if self.bare and tensor != self.head else tensor


def _deepseek(architecture: str, model_type: str) -> Family:
    return Family(
        architecture,
        model_type,
        linears=("self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj", "self_attn.o_proj"),
        optional=("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.q_b_proj", *_MLP, *_SHARED_EXPERTS, *_EXPERTS),
        dense=("mlp.gate",),
        norms=(*_NORMS, "self_attn.kv_a_layernorm"),
        bias_switches=(("attention_bias", ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.o_proj")),),
        unused="num_nextn_predict_layers",
    )


FAMILIES: Mapping[str, Family] = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM", "llama", bias_switches=(_ATTENTION_BIAS, ("mlp_bias", _MLP))),
        Family("MistralForCausalLM", "mistral"),
        Family("Qwen2ForCausalLM", "qwen2"),
        Family("Qwen3ForCausalLM", "qwen3", norms=(*_NORMS, *_QK_NORMS), bias_switches=(_ATTENTION_BIAS,)),
        Family("Gemma2ForCausalLM", "gemma2", norms=_FOUR_NORMS, tied=True, bias_switches=(_ATTENTION_BIAS,)),
        Family(
            "Gemma3ForCausalLM",
            "gemma3_text",
            norms=(*_FOUR_NORMS, *_QK_NORMS),
            tied=True,
            bias_switches=(_ATTENTION_BIAS,),
        ),
        Family(
            "Phi3ForCausalLM",
            "phi3",
            linears=("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
        ),
        Family(
            "Olmo2ForCausalLM",
            "olmo2",
            norms=("post_attention_layernorm", "post_feedforward_layernorm", *_QK_NORMS),
            bias_switches=(_ATTENTION_BIAS,),
        ),
        Family(
            "StableLmForCausalLM",
            "stablelm",
            norms=("input_layernorm",),
            bias_switches=(("use_qkv_bias", _ATTENTION[:3]),),
        ),
        Family(
            "FalconForCausalLM",
            "falcon",
            linears=_FALCON,
            norms=(),
            base="transformer",
            blocks="transformer.h",
            embedding="transformer.word_embeddings.weight",
            norm="transformer.ln_f.weight",
            tied=True,
            bias_switches=(("bias", _FALCON),),
            most_positions=2048,
        ),
        Family(
            "OPTForCausalLM",
            "opt",
            linears=(*_ATTENTION[:3], "self_attn.out_proj", "fc1", "fc2"),
            norms=("self_attn_layer_norm", "final_layer_norm"),
            blocks="model.decoder.layers",
            embedding="model.decoder.embed_tokens.weight",
            norm=None,
            tied=True,
        ),
        Family(
            "GPT2LMHeadModel",
            "gpt2",
            linears=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
            norms=("ln_1", "ln_2"),
            transposed=True,
            base="transformer",
            blocks="transformer.h",
            embedding="transformer.wte.weight",
            norm="transformer.ln_f.weight",
            tied=True,
            count="n_layer",
            positions="n_positions",
        ),
        Family(
            "GPTNeoXForCausalLM",
            "gpt_neox",
            linears=("attention.query_key_value", "attention.dense", *_GPT),
            base="gpt_neox",
            blocks="gpt_neox.layers",
            embedding="gpt_neox.embed_in.weight",
            norm="gpt_neox.final_layer_norm.weight",
            head="embed_out.weight",
            renamed=(("embed_out.", "lm_head."),),
        ),
        Family(
            "GPTJForCausalLM",
            "gptj",
            linears=("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out"),
            norms=("ln_1",),
            base="transformer",
            blocks="transformer.h",
            embedding="transformer.wte.weight",
            norm="transformer.ln_f.weight",
            count="n_layer",
            positions="n_positions",
        ),
        Family(
            "BloomForCausalLM",
            "bloom",
            linears=("self_attention.query_key_value", "self_attention.dense", *_GPT),
            base="transformer",
            blocks="transformer.h",
            embedding="transformer.word_embeddings.weight",
            norm="transformer.ln_f.weight",
            tied=True,
            count="n_layer",
            positions=None,
        ),
        Family(
            "MptForCausalLM",
            "mpt",
            linears=("attn.Wqkv", "attn.out_proj", "ffn.up_proj", "ffn.down_proj"),
            norms=("norm_1", "norm_2"),
            base="transformer",
            blocks="transformer.blocks",
            embedding="transformer.wte.weight",
            norm="transformer.norm_f.weight",
            tied=True,
            count="n_layers",
            positions="max_seq_len",
        ),
        Family(
            "MixtralForCausalLM",
            "mixtral",
            linears=_ATTENTION,
            optional=tuple(f"block_sparse_moe.experts.*.{linear}" for linear in ("w1", "w3", "w2")),
            dense=("block_sparse_moe.gate",),
            renamed=(
                (".block_sparse_moe.", ".mlp."),
                (".w1.", ".gate_proj."),
                (".w3.", ".up_proj."),
                (".w2.", ".down_proj."),
            ),
        ),
        Family(
            "Qwen2MoeForCausalLM",
            "qwen2_moe",
            linears=_ATTENTION,
            optional=(*_MLP, *(linear.replace("experts", "expert") for linear in _SHARED_EXPERTS), *_EXPERTS),
            dense=("mlp.gate", "mlp.shared_expert_gate"),
        ),
        Family(
            "Qwen3MoeForCausalLM",
            "qwen3_moe",
            linears=_ATTENTION,
            optional=(*_MLP, *_EXPERTS),
            dense=("mlp.gate",),
            norms=(*_NORMS, *_QK_NORMS),
            bias_switches=(_ATTENTION_BIAS,),
        ),
        _deepseek("DeepseekV2ForCausalLM", "deepseek_v2"),
        _deepseek("DeepseekV3ForCausalLM", "deepseek_v3"),
    )
}


def block_count(model: ModelHeaders, family: Family) -> int:
    """Number of decoder blocks. Raises ProblemError `model_config_invalid`."""
    return _natural(model, family.count)


def positions_of(model: ModelHeaders, family: Family) -> int | None:
    """The longest sequence, in tokens; None if the model has no end of positions. Raises ProblemError
    `model_config_invalid`."""
    if family.positions is None or (family.most_positions and family.positions not in model.config):
        return family.most_positions
    return _natural(model, family.positions)


def _natural(model: ModelHeaders, key: str) -> int:
    value = model.config.get(key)
    if type(value) is not int or not 1 <= value < 2**31:
        raise ProblemError("model_config_invalid", f"{CONFIG} has no '{key}', or one that is no positive number.")
    return value


def is_tied(model: ModelHeaders, family: Family) -> bool:
    """Whether embeddings and head are one tensor, as config.json has it."""
    return bool(model.config.get("tie_word_embeddings", family.tied))
