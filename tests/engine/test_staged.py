"""The staged pass against the same thing said plainly: a whole model, one forward for each group of linears."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from secateur.pruning.calibration import calibration_set, tokenise
from secateur.pruning.checkpoint import DTYPES
from secateur.pruning.datasets import read_text
from secateur.pruning.discovery import family_of
from secateur.pruning.memory import MOST_TOKENS
from secateur.pruning.stages import groups_of
from secateur.pruning.streaming import StreamedModel
from secateur.recipes import PruneRecipe
from tests.engine.conftest import MakeModel
from tests.engine.runs import checkpoint, prune, recipe

GROUPS = [
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
]


def plain_wanda(source: Path, tokens: Tensor) -> dict[str, Tensor]:
    """Wanda at 50 % per row, staged: before each group is pruned the whole model is run with all that is pruned so far."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for block in model.model.layers:
        for group in GROUPS:
            seen: list[Tensor] = []
            handle = block.get_submodule(group[0]).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            with torch.no_grad():
                model(tokens)
            handle.remove()
            norms = seen[0].flatten(0, 1).norm(dim=0)
            for name in group:
                weight = block.get_submodule(name).weight.data
                order = (weight.abs() * norms).argsort(dim=1, stable=True)
                weight.scatter_(1, order[:, : weight.shape[1] // 2], 0.0)
    return dict(model.state_dict())


def tokens_of(source: Path, wanted: PruneRecipe) -> Tensor:
    text = read_text("wikitext2-sample", "calibration")[:40_000]
    return calibration_set(tokenise(source, text, 257), wanted.calibration).tokens


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("batch_tokens", [64, 4096])
def test_staged_wanda_is_wanda_on_the_inputs_that_linears_really_get(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, batch_tokens: int
) -> None:
    monkeypatch.setitem(MOST_TOKENS, "cpu", batch_tokens)
    source = make_model(architecture, tied=False)
    prune(recipe("wanda"), source, tmp_path)
    pruned = load_file(tmp_path / "output" / "model.safetensors")
    for name, expected in plain_wanda(source, tokens_of(source, recipe())).items():
        assert torch.equal(pruned[name], expected), name


def test_wanda_compares_in_the_layer_if_asked(llama: Path, tmp_path: Path) -> None:
    prune(recipe({"name": "wanda", "comparison": "layer"}), llama, tmp_path)
    weight = load_file(tmp_path / "output" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    per_row = (weight == 0).sum(dim=1)
    assert int(per_row.sum()) == weight.numel() // 2
    assert len(set(per_row.tolist())) > 1


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_groups_are_the_linears_with_the_same_input(make_model: MakeModel, architecture: str) -> None:
    with checkpoint(make_model(architecture)) as source, torch.no_grad():
        family = family_of(source.headers)
        model = StreamedModel(source, family, DTYPES["float32"], torch.device("cpu"))
        with model.block(1) as block:
            assert groups_of(block, 1, family.linears, model.enter(torch.zeros(1, 4, dtype=torch.int64))) == GROUPS


def test_a_block_gives_its_weights_back(llama: Path) -> None:
    with checkpoint(llama) as source, torch.no_grad():
        model = StreamedModel(source, family_of(source.headers), DTYPES["float32"], torch.device("cpu"))
        with model.block(0) as block:
            assert not any(parameter.is_meta for parameter in block.parameters())
        assert all(parameter.is_meta for parameter in block.parameters())
