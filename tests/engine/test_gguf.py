"""A GGUF file in, an ordinary checkpoint out."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur.problems import ProblemError
from secateur.pruning.gguf import convert
from tests.engine.runs import prune, recipe

WORDS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"]
HIDDEN, MIDDLE, HEADS = 32, 64, 4


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one block in float32, as llama.cpp names things."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(MIDDLE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(WORDS)
    writer.add_token_scores([-float(i) for i in range(len(WORDS))])
    writer.add_token_types([2, 3, 3, *([6] * 256), 1, 1, 1])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, shape in tensor_shapes().items():
        writer.add_tensor(name, values(name, shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    return {
        "token_embd.weight": (len(WORDS), HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        **{f"blk.0.attn_{letter}.weight": (HIDDEN, HIDDEN) for letter in ("q", "k", "v", "output")},
        "blk.0.ffn_gate.weight": (MIDDLE, HIDDEN),
        "blk.0.ffn_up.weight": (MIDDLE, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, MIDDLE),
    }


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32)


def test_it_becomes_a_model_that_loads_without_gguf(gguf_file: Path, tmp_path: Path) -> None:
    convert(gguf_file, tmp_path / "model", dtype="float32")
    names = {file.name for file in (tmp_path / "model").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    expected = torch.from_numpy(values("blk.0.ffn_down.weight", (HIDDEN, MIDDLE)))
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight.data, expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").decode([260]) == "a"


def test_a_gguf_folder_is_pruned(gguf_file: Path, tmp_path: Path) -> None:
    result = prune(recipe("wanda", "2:4"), gguf_file.parent, tmp_path)
    assert result.metrics["sparsity"] == 0.5
    assert "model.safetensors" in {file.path for file in result.files}


def test_what_is_no_gguf_is_a_problem_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\xff" * 200)
    with pytest.raises(ProblemError, match=r"broken\.gguf") as caught:
        convert(tmp_path / "broken.gguf", tmp_path / "model")
    assert caught.value.code == "model_file_corrupt"
    assert [file.name for file in tmp_path.iterdir()] == ["broken.gguf"]
