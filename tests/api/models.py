"""A tiny Llama's files, made without torch: real headers over zeros."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_HIDDEN, _INTERMEDIATE, _VOCABULARY = 8, 12, 16
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": _HIDDEN,
    "intermediate_size": _INTERMEDIATE,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


def write_model(folder: Path, **config: Any) -> Path:
    """A checkpoint of one block in `folder`; `config` is added to its config.json."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    block, square = "model.layers.0", [_HIDDEN, _HIDDEN]
    shapes = {
        "model.embed_tokens.weight": [_VOCABULARY, _HIDDEN],
        "model.norm.weight": [_HIDDEN],
        f"{block}.input_layernorm.weight": [_HIDDEN],
        f"{block}.post_attention_layernorm.weight": [_HIDDEN],
        **{f"{block}.self_attn.{name}_proj.weight": square for name in "qkvo"},
        f"{block}.mlp.gate_proj.weight": [_INTERMEDIATE, _HIDDEN],
        f"{block}.mlp.up_proj.weight": [_INTERMEDIATE, _HIDDEN],
        f"{block}.mlp.down_proj.weight": [_HIDDEN, _INTERMEDIATE],
    }
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    packed = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(packed).to_bytes(8, "little") + packed + bytes(end))
    return folder
