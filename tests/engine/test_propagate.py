"""The other two ways to propagate against plain forwards of the whole model, and the dense path against its logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from secateur.pruning.memory import MOST_TOKENS
from secateur.pruning.methods.factor import inverse_factor
from secateur.pruning.methods.sparsegpt import sparsegpt
from tests.engine.conftest import MakeModel
from tests.engine.runs import prune, recipe
from tests.engine.test_staged import GROUPS, tokens_of
from tests.targets import target


@pytest.fixture(autouse=True)
def _several_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MOST_TOKENS, "cpu", 64)


PruneLinear = Callable[[Tensor, Tensor], Tensor]


def wanda(weight: Tensor, inputs: Tensor) -> Tensor:
    order = (weight.abs() * inputs.norm(dim=0)).argsort(dim=1, stable=True)
    return weight.scatter(1, order[:, : weight.shape[1] // 2], 0.0)


def second_order(weight: Tensor, inputs: Tensor) -> Tensor:
    (done,) = sparsegpt([weight], [target(0.5)], inverse_factor(inputs.T @ inputs, 0.01), 128)
    return done.weight.masked_fill(done.removed, 0.0)


def inputs_of(model: nn.Module, block: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """What each linear of `block` gets when the whole model runs over `tokens`: (tokens, in_features)."""
    seen: dict[str, Tensor] = {}
    handles = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0].flatten(0, 1)})
        )
        for group in GROUPS
        for name in group
    ]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return seen


def plain(source: Path, tokens: Tensor, prune_linear: PruneLinear, *, dense_inputs: bool) -> dict[str, Tensor]:
    """Prune block after block, all linears of a block on one look at it: of the dense model, or of the one pruned so far."""
    pruned = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    observed = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval() if dense_inputs else pruned
    for block, seen in zip(pruned.model.layers, observed.model.layers, strict=True):
        for name, inputs in inputs_of(observed, seen, tokens).items():
            linear = block.get_submodule(name)
            linear.weight.data = prune_linear(linear.weight.data, inputs)
    return dict(pruned.state_dict())


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("propagate", ["block", "none"])
def test_it_is_the_plain_thing(
    make_model: MakeModel,
    tmp_path: Path,
    architecture: str,
    method: str,
    propagate: str,
) -> None:
    source = make_model(architecture, tied=False)
    wanted = recipe(method, propagate=propagate)
    prune(wanted, source, tmp_path)
    done = load_file(tmp_path / "output" / "model.safetensors")
    chosen = wanda if method == "wanda" else second_order
    for name, expected in plain(source, tokens_of(source, wanted), chosen, dense_inputs=propagate == "none").items():
        assert torch.equal(done[name] == 0, expected == 0), name
        assert float((done[name] - expected).norm()) <= 1e-5 * float(expected.norm()), name


def test_the_three_ways_differ(llama: Path, tmp_path: Path) -> None:
    digests = set()
    for propagate in ("staged", "block", "none"):
        files = prune(recipe("sparsegpt", propagate=propagate), llama, tmp_path / propagate).files
        digests |= {file.sha256 for file in files if file.path == "model.safetensors"}
    assert len(digests) == 3
