"""Every family against transformers' own model of it: what it computes, what is pruned, and that the result loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from secateur.pruning.calibration import calibration_set, tokenise
from secateur.pruning.checkpoint import DTYPES
from secateur.pruning.datasets import read_text
from secateur.pruning.families import FAMILIES, family_of
from secateur.pruning.methods.factor import inverse_factor
from secateur.pruning.methods.sparsegpt import sparsegpt
from secateur.pruning.streaming import StreamedModel, run_block
from secateur.recipes import PruneRecipe
from tests.engine.conftest import MakeModel
from tests.engine.runs import checkpoint, prune, recipe
from tests.targets import target

DAMPING = 0.1  # well conditioned: what differs in the last bit may differ in the last bit only
METHODS: dict[str, dict[str, Any]] = {"wanda": {"name": "wanda"}, "sparsegpt": {"name": "sparsegpt", "damping": DAMPING}}
WINDOWS = torch.randint(0, 256, (3, 48), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _several_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.pruning.memory.MOST_TOKENS", 64)


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_streamed_model_is_the_model(make_family_model: MakeModel, architecture: str) -> None:
    folder = make_family_model(architecture)
    with checkpoint(folder) as source, torch.no_grad():
        expected = loaded(folder)(WINDOWS).logits
        streamed = StreamedModel(source, family_of(source.headers), DTYPES["float32"], torch.device("cpu"))
        batch = streamed.enter(WINDOWS)
        for index in range(streamed.count):
            with streamed.block(index) as block:
                batch.hidden = run_block(block, index, batch)
        logits = streamed.logits(streamed.leave(batch).flatten(0, 1)).view(*WINDOWS.shape, -1)
    assert float(expected.std()) > 0.05, "a model without an opinion proves nothing"
    assert torch.equal(logits, expected)


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def matrices_in(block: nn.Module) -> list[nn.Module]:
    """Every linear of a block, found by its type and not by the table."""
    return [module for module in block.modules() if isinstance(module, nn.Linear | Conv1D)]


def inputs_in_order(model: nn.Module, block: nn.Module, tokens: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """What each linear of `block` gets when the whole model runs: (tokens, in_features) each."""
    seen: list[tuple[nn.Module, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: seen.append((module, args[0].flatten(0, -2))))
        for module in matrices_in(block)
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return seen


def wanda(weight: Tensor, inputs: Tensor) -> Tensor:
    order = (weight.abs() * inputs.norm(dim=0)).argsort(dim=1, stable=True)
    return weight.scatter(1, order[:, : weight.shape[1] // 2], 0.0)


def second_order(weight: Tensor, inputs: Tensor) -> Tensor:
    (done,) = sparsegpt([weight], [target(0.5)], inverse_factor(inputs.T @ inputs, DAMPING), 128)
    return done.weight.masked_fill(done.removed, 0.0)


REFERENCE = {"wanda": wanda, "sparsegpt": second_order}


def prune_module(module: nn.Module, inputs: Tensor, method: str) -> None:
    stored = module.get_parameter("weight").data
    turn = isinstance(module, Conv1D)
    pruned = REFERENCE[method](stored.T.contiguous() if turn else stored, inputs)
    stored.copy_(pruned.T if turn else pruned)


def plain(folder: Path, tokens: Tensor, method: str, propagate: str) -> Any:
    """The whole model pruned linear by linear: before each, or before each block, everything is run again."""
    model = loaded(folder)
    for block in blocks_of(model):
        if propagate == "block":
            for module, inputs in inputs_in_order(model, block, tokens):
                prune_module(module, inputs, method)
            continue
        done: set[nn.Module] = set()
        while len(done) < len(matrices_in(block)):
            waiting = [pair for pair in inputs_in_order(model, block, tokens) if pair[0] not in done]
            for module, inputs in waiting:
                if torch.equal(inputs, waiting[0][1]):
                    prune_module(module, inputs, method)
                    done.add(module)
                else:
                    break
    return model


def tokens_of(source: Path, wanted: PruneRecipe) -> Tensor:
    text = read_text("wikitext2-sample", "calibration")[:40_000]
    return calibration_set(tokenise(source, text, 257), wanted.calibration).tokens


CASES = [(architecture, "wanda", "staged") for architecture in FAMILIES] + [
    (architecture, "sparsegpt", propagate)
    for architecture in ("GPT2LMHeadModel", "FalconForCausalLM", "Gemma2ForCausalLM")
    for propagate in ("staged", "block")
]


@pytest.mark.parametrize(("architecture", "method", "propagate"), CASES)
def test_it_is_pruned_as_the_whole_model_would_be_and_loads(
    make_family_model: MakeModel, tmp_path: Path, architecture: str, method: str, propagate: str
) -> None:
    source = make_family_model(architecture)
    wanted = recipe(METHODS[method], propagate=propagate)
    result = prune(wanted, source, tmp_path)
    done, expected = loaded(tmp_path / "output").state_dict(), plain(source, tokens_of(source, wanted), method, propagate)
    assert done.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(done[name] == 0, tensor == 0), name
        assert float((done[name] - tensor).norm()) <= 1e-5 * float(tensor.norm()), name
    told = [linear for block in result.report["blocks"] for linear in block["linears"]]
    assert len(told) == sum(len(matrices_in(block)) for block in blocks_of(expected))
    assert all(linear["sparsity"] == 0.5 for linear in told)


def test_a_checkpoint_saved_from_the_base_model_keeps_its_names(make_family_model: MakeModel, tmp_path: Path) -> None:
    """As GPT-2's and BLOOM's are on the hub: no prefix, and causal masks beside the weights."""
    source = tmp_path / "source"
    shutil.copytree(make_family_model("GPT2LMHeadModel"), source)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(source / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 128, 128).tril()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    prune(recipe(), source, tmp_path)
    pruned = load_file(tmp_path / "output" / "model.safetensors")
    assert pruned.keys() == tensors.keys()
    assert torch.equal(pruned["h.0.attn.bias"], tensors["h.0.attn.bias"])
    expected = plain(source, tokens_of(source, recipe()), "wanda", "staged").state_dict()
    done = loaded(tmp_path / "output").state_dict()
    assert all(torch.equal(done[name], tensor) for name, tensor in expected.items())


def test_groups_of_a_pattern_run_along_the_inputs_however_weights_are_stored(
    make_family_model: MakeModel, tmp_path: Path
) -> None:
    prune(recipe("sparsegpt", "2:4"), make_family_model("GPT2LMHeadModel"), tmp_path)
    for name, weight in load_file(tmp_path / "output" / "model.safetensors").items():
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            assert int((weight.T.reshape(weight.shape[1], -1, 4) == 0).sum(2).min()) == 2
