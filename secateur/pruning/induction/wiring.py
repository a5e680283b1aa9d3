"""How a block of each family is wired, as far as scales that cancel out need it: a row for each. Torch-free.

Modules are called as in the block that runs, like `Linear.module`. Sizes are not here: the shapes of the weights tell them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["attn_in", "mlp_in", "v_o", "up_down", "fc1_fc2", "q_k", "q_b_in", "kv_b_in"]


@dataclass(frozen=True, slots=True)
class Attention:
    """`q`, `k`, `v`: the linears, thrice the same if they are fused. Its rows then lie as `fused` says: all heads of q, then
    those of k and of v ("stacked"), or for each key head its query heads, itself and its value head ("by_head").

    `heads`: the key of config.json for the number of query heads. `norms`: those behind q and k.
    """

    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    fused: Literal["stacked", "by_head"] | None = None
    heads: str = "num_attention_heads"
    norms: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """DeepSeek's. Keys and values are `kv_b` of the norm of the first rows of `kv_a`, whose others are a rotary key that all
    heads share. Queries are `q`, or `q_b` of the norm of `q_a`."""

    q: str = "self_attn.q_proj"
    q_a: str = "self_attn.q_a_proj"
    q_norm: str = "self_attn.q_a_layernorm"
    q_b: str = "self_attn.q_b_proj"
    kv_a: str = "self_attn.kv_a_proj_with_mqa"
    kv_norm: str = "self_attn.kv_a_layernorm"
    kv_b: str = "self_attn.kv_b_proj"
    o: str = "self_attn.o_proj"
    heads: str = "num_attention_heads"


@dataclass(frozen=True, slots=True)
class Rotary:
    """Channels of a head that positions turn together: c and c + half of them ("halves"), or 2 c and 2 c + 1 ("pairs").

    It may be the first of a head only: as many as the key `count` of config.json says, or the share that `share` says, at
    the top or as `partial_rotary_factor` among the rotary parameters; `otherwise` holds without them. `off`: a key that
    switches it off. `interleaved`: one that makes pairs into halves if it is false.
    """

    layout: Literal["halves", "pairs"] = "halves"
    share: str | None = None
    count: str | None = None
    otherwise: float = 1.0
    off: str | None = None
    interleaved: str | None = None


@dataclass(frozen=True, slots=True)
class PlainMLP:
    """Without a gate: `fc2`(activation(`fc1`)). The activation is what the key `activation` of config.json says, or
    `otherwise`."""

    fc1: str
    fc2: str
    activation: str | None
    otherwise: str


@dataclass(frozen=True, slots=True)
class Ruling:
    """Refuses `kinds` for a `reason` where the key of config.json (dots lead inside) is `value`, or `otherwise` is if it is
    not there; both as truth."""

    key: str
    value: bool
    otherwise: bool
    kinds: tuple[Kind, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Wiring:
    """`norms`: those before attention and those before the MLP; a block has the first that is there, and if none is there
    before the MLP, the one before attention feeds both. None: what attention and MLP take is no norm's. `gain`: what is
    added to a norm's weight before it multiplies. `mlp`: None if MLPs have gates. `rotary`: None without it."""

    attention: Attention | LatentAttention = Attention()
    mlp: PlainMLP | None = None
    norms: tuple[tuple[str, ...], tuple[str, ...]] | None = (("input_layernorm",), ("post_attention_layernorm",))
    gain: float = 0.0
    rotary: Rotary | None = Rotary()
    rulings: tuple[Ruling, ...] = ()


def _fused(qkv: str, o: str, fused: Literal["stacked", "by_head"], heads: str = "num_attention_heads") -> Attention:
    return Attention(qkv, qkv, qkv, o, fused=fused, heads=heads)


_NORMED = Attention(norms=("self_attn.q_norm", "self_attn.k_norm"))
_GEMMA_NORMS = (("input_layernorm",), ("pre_feedforward_layernorm",))
_GPT = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_LLAMA = Wiring()
_QWEN3 = Wiring(_NORMED)

WIRINGS: Mapping[str, Wiring] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _QWEN3,
    "Gemma2ForCausalLM": Wiring(norms=_GEMMA_NORMS, gain=1.0),
    "Gemma3ForCausalLM": Wiring(_NORMED, norms=_GEMMA_NORMS, gain=1.0),
    "Phi3ForCausalLM": Wiring(
        _fused("self_attn.qkv_proj", "self_attn.o_proj", "stacked"), rotary=Rotary(share="partial_rotary_factor")
    ),
    "Olmo2ForCausalLM": Wiring(_NORMED, norms=None),
    "StableLmForCausalLM": Wiring(
        rotary=Rotary(share="partial_rotary_factor", otherwise=0.25),
        rulings=(Ruling("qk_layernorm", True, False, ("q_k",), "each head has norms of its own behind q and k"),),
    ),
    "FalconForCausalLM": Wiring(
        _fused("self_attention.query_key_value", "self_attention.dense", "by_head"),
        mlp=PlainMLP(*_GPT, activation="activation", otherwise="gelu"),
        norms=(("ln_attn", "input_layernorm"), ("ln_mlp", "post_attention_layernorm")),
        rotary=Rotary(off="alibi"),
    ),
    "OPTForCausalLM": Wiring(
        Attention(o="self_attn.out_proj"),
        mlp=PlainMLP("fc1", "fc2", activation="activation_function", otherwise="relu"),
        norms=(("self_attn_layer_norm",), ("final_layer_norm",)),
        rotary=None,
        rulings=(
            Ruling(
                "do_layer_norm_before",
                False,
                True,
                ("attn_in", "mlp_in"),
                "the norms are behind attention and MLP, and what they give is the residual stream too",
            ),
        ),
    ),
    "GPT2LMHeadModel": Wiring(
        _fused("attn.c_attn", "attn.c_proj", "stacked", heads="n_head"),
        mlp=PlainMLP("mlp.c_fc", "mlp.c_proj", activation="activation_function", otherwise="gelu_new"),
        norms=(("ln_1",), ("ln_2",)),
        rotary=None,
    ),
    "GPTNeoXForCausalLM": Wiring(
        _fused("attention.query_key_value", "attention.dense", "by_head"),
        mlp=PlainMLP(*_GPT, activation="hidden_act", otherwise="gelu"),
        rotary=Rotary(share="rotary_pct", otherwise=0.25),
    ),
    "GPTJForCausalLM": Wiring(
        Attention("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", heads="n_head"),
        mlp=PlainMLP("mlp.fc_in", "mlp.fc_out", activation="activation_function", otherwise="gelu_new"),
        norms=(("ln_1",), ()),
        rotary=Rotary("pairs", count="rotary_dim", otherwise=64),
    ),
    "BloomForCausalLM": Wiring(
        _fused("self_attention.query_key_value", "self_attention.dense", "by_head", heads="n_head"),
        mlp=PlainMLP(*_GPT, activation=None, otherwise="gelu"),
        rotary=None,
        rulings=(
            Ruling(
                "apply_residual_connection_post_layernorm",
                True,
                False,
                ("attn_in", "mlp_in"),
                "what the norm gives is the residual stream too",
            ),
        ),
    ),
    "MptForCausalLM": Wiring(
        _fused("attn.Wqkv", "attn.out_proj", "stacked", heads="n_heads"),
        mlp=PlainMLP("ffn.up_proj", "ffn.down_proj", activation=None, otherwise="gelu"),
        norms=(("norm_1",), ("norm_2",)),
        rotary=None,
        rulings=(
            Ruling("attn_config.clip_qkv", True, False, ("v_o", "q_k"), "queries, keys and values are clipped at a value"),
        ),
    ),
    "MixtralForCausalLM": _LLAMA,
    "Qwen2MoeForCausalLM": _LLAMA,
    "Qwen3MoeForCausalLM": _QWEN3,
    "DeepseekV2ForCausalLM": Wiring(LatentAttention(), rotary=Rotary("pairs")),
    "DeepseekV3ForCausalLM": Wiring(LatentAttention(), rotary=Rotary("pairs", interleaved="rope_interleave")),
}
