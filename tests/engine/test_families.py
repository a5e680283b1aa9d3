"""Every family against transformers' own model of it: what it computes, what is pruned, and that the result loads."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from secateur.problems import ProblemError
from secateur.pruning import discovery
from secateur.pruning.admission import check
from secateur.pruning.calibration import calibration_set, tokenise
from secateur.pruning.checkpoint import DTYPES
from secateur.pruning.datasets import read_text
from secateur.pruning.discovery import family_of, known_to_transformers
from secateur.pruning.families import FAMILIES
from secateur.pruning.headers import read_model
from secateur.pruning.linears import linears_of
from secateur.pruning.memory import MOST_TOKENS
from secateur.pruning.methods.factor import inverse_factor
from secateur.pruning.methods.sparsegpt import sparsegpt
from secateur.pruning.streaming import StreamedModel, run_block
from secateur.recipes import PruneRecipe
from tests.engine.conftest import MakeModel
from tests.engine.runs import checkpoint, prune, recipe
from tests.targets import target
from tests.tiny_models import UNLISTED

DAMPING = 0.1  # well conditioned: what differs in the last bit may differ in the last bit only
METHODS: dict[str, dict[str, Any]] = {"wanda": {"name": "wanda"}, "sparsegpt": {"name": "sparsegpt", "damping": DAMPING}}
WINDOWS = torch.randint(0, 256, (3, 48), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _several_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MOST_TOKENS, "cpu", 64)


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("architecture", [*FAMILIES, *UNLISTED])
def test_the_streamed_model_is_the_model(make_family_model: MakeModel, architecture: str) -> None:
    folder = make_family_model(architecture)
    with checkpoint(folder) as source, torch.no_grad():
        expected = loaded(folder)(WINDOWS).logits
        streamed = StreamedModel(source, family_of(source.headers), DTYPES["float32"], torch.device("cpu"))
        batch = streamed.enter(WINDOWS)
        for index in range(streamed.count):
            with streamed.block(index) as block:
                batch.hidden = run_block(block, index, batch)
        linears = linears_of(source.headers, family_of(source.headers))[-1]
        logits = streamed.logits(streamed.leave(batch).flatten(0, 1)).view(*WINDOWS.shape, -1)
    assert float(expected.std()) > 0.05, "a model without an opinion proves nothing"
    if any(linear.routed for linear in linears):  # transformers multiplies experts' matrices in another order
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(logits, expected)


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


@dataclass(frozen=True)
class Observed:
    """A matrix of a block, found by what its module is and not by the table: its `weight`, a view, and its inputs."""

    key: tuple[nn.Module, str, int]
    weight: Tensor  # (out_features, in_features)
    inputs: Tensor  # (tokens, in_features)
    routed: bool = False


def linear_observed(module: nn.Module, args: tuple[Tensor, ...]) -> list[Observed]:
    weight = module.get_parameter("weight").data
    return [Observed((module, "", 0), weight.T if isinstance(module, Conv1D) else weight, args[0].flatten(0, -2))]


def experts_observed(module: Any, args: tuple[Tensor, ...]) -> list[Observed]:
    """The three matrices of each expert on the tokens that are routed to it."""
    found = []
    for expert, (gate_up, down) in enumerate(zip(module.gate_up_proj.data, module.down_proj.data, strict=True)):
        gate, up = gate_up.chunk(2)
        inputs = args[0][(args[1] == expert).any(dim=1)]
        middle = module.act_fn(inputs @ gate.T) * (inputs @ up.T)
        for name, weight, given in (("gate", gate, inputs), ("up", up, inputs), ("down", down, middle)):
            found.append(Observed((module, name, expert), weight, given, routed=True))
    return found


def observed(model: nn.Module, block: nn.Module, tokens: Tensor) -> list[Observed]:
    """Every matrix of `block` in the order they run, when the whole model runs over `tokens`."""
    seen: list[Observed] = []
    hooks = []
    for name, module in block.named_modules():
        if name.endswith("gate"):
            continue  # a router, or the like
        look = linear_observed if isinstance(module, nn.Linear | Conv1D) else experts_observed
        if look is linear_observed or (hasattr(module, "gate_up_proj") and not isinstance(module.gate_up_proj, nn.Linear)):
            hooks.append(module.register_forward_pre_hook(lambda module, args, look=look: seen.extend(look(module, args))))
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


def prune_matrix(matrix: Observed, method: str) -> None:
    if matrix.routed and len(matrix.inputs) < 32:
        matrix.weight.copy_(wanda(matrix.weight, torch.ones(1, matrix.weight.shape[1])))
    else:
        matrix.weight.copy_(REFERENCE[method](matrix.weight.contiguous(), matrix.inputs))


def plain(folder: Path, tokens: Tensor, method: str, propagate: str) -> Any:
    """The whole model pruned matrix by matrix: before each input, or before each block, everything is run again."""
    model = loaded(folder)
    for block in blocks_of(model):
        if propagate == "block":
            for matrix in observed(model, block, tokens):
                prune_matrix(matrix, method)
            continue
        done: set[tuple[nn.Module, str, int]] = set()
        while waiting := [matrix for matrix in observed(model, block, tokens) if matrix.key not in done]:
            for matrix in takewhile(lambda each: torch.equal(each.inputs, waiting[0].inputs), waiting):
                prune_matrix(matrix, method)
                done.add(matrix.key)
    return model


def tokens_of(source: Path, wanted: PruneRecipe) -> Tensor:
    text = read_text("wikitext2-sample", "calibration")[:40_000]
    return calibration_set(tokenise(source, text, 257), wanted.calibration).tokens


CASES = [(architecture, "wanda", "staged") for architecture in (*FAMILIES, *UNLISTED)] + [
    (architecture, "sparsegpt", propagate)
    for architecture in ("GPT2LMHeadModel", "FalconForCausalLM", "Gemma2ForCausalLM", "DeepseekV2ForCausalLM")
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
    assert len(told) == sum(len(observed(expected, block, WINDOWS)) for block in blocks_of(expected))
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


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("propagate", ["staged", "block"])
def test_an_expert_that_saw_no_token_is_named_and_pruned_by_its_weights(
    make_family_model: MakeModel, tmp_path: Path, method: str, propagate: str
) -> None:
    source, bias = tmp_path / "source", "model.layers.1.mlp.gate.e_score_correction_bias"
    shutil.copytree(make_family_model("DeepseekV3ForCausalLM"), source)
    tensors = load_file(source / "model.safetensors")
    tensors[bias][2:] = -100.0  # no token ever goes to the second group of experts
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    report = prune(recipe(METHODS[method], propagate=propagate), source, tmp_path).report
    told = {linear["name"]: linear["fallbacks"] for block in report["blocks"] for linear in block["linears"]}
    unseen = {name for name, fallbacks in told.items() if "by_weight_alone:tokens=0" in fallbacks}
    assert unseen == {
        f"model.layers.1.mlp.experts.{expert}.{linear}_proj.weight" for expert in (2, 3) for linear in ("gate", "up", "down")
    }
    pruned = load_file(tmp_path / "output" / "model.safetensors")
    for name in unseen:
        expected = wanda(tensors[name], torch.ones(1, tensors[name].shape[1]))
        assert torch.equal(pruned[name], expected), name


def test_what_chooses_experts_stays_exact_in_a_model_of_fewer_bits(make_family_model: MakeModel, tmp_path: Path) -> None:
    source, bias = tmp_path / "source", "model.layers.1.mlp.gate.e_score_correction_bias"
    shutil.copytree(make_family_model("DeepseekV3ForCausalLM"), source)
    tensors = load_file(source / "model.safetensors")
    tensors[bias] = torch.tensor([0.1234567, 0.2, -0.3, 0.7654321])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    prune(recipe(output={"dtype": "bfloat16"}), source, tmp_path)
    pruned = load_file(tmp_path / "output" / "model.safetensors")
    assert torch.equal(pruned[bias], tensors[bias])
    assert {tensor.dtype for name, tensor in pruned.items() if name != bias} == {torch.bfloat16}


def test_routers_stay_dense(make_family_model: MakeModel, tmp_path: Path) -> None:
    source = make_family_model("MixtralForCausalLM")
    prune(recipe(), source, tmp_path)
    name = "model.layers.0.block_sparse_moe.gate.weight"
    pruned = load_file(tmp_path / "output" / "model.safetensors")
    assert torch.equal(pruned[name], load_file(source / "model.safetensors")[name])


def test_the_list_of_architectures_is_that_of_transformers() -> None:
    """`python tests/engine/test_families.py` writes it anew."""
    assert known_to_transformers() == built_in()
    assert {(family.architecture, family.model_type) for family in FAMILIES.values()} <= known_to_transformers()


def built_in() -> set[tuple[str, str]]:
    pairs = ((name, model_type) for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if isinstance(name, str))
    return {(name, model_type) for name, model_type in pairs if name.endswith(("ForCausalLM", "LMHeadModel"))}


def test_blocks_that_are_never_run_stay_as_they_are(make_family_model: MakeModel, tmp_path: Path) -> None:
    """DeepSeek-V3's block behind the last, which predicts a second token in training."""
    source = tmp_path / "source"
    shutil.copytree(make_family_model("DeepseekV3ForCausalLM"), source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    tensors = load_file(source / "model.safetensors")
    unused = {name.replace("layers.1.", "layers.2."): tensor + 1 for name, tensor in tensors.items() if "layers.1." in name}
    unused["model.layers.2.eh_proj.weight"] = torch.ones(32, 64)
    save_file(tensors | unused, source / "model.safetensors", metadata={"format": "pt"})
    prune(recipe("magnitude"), source, tmp_path)
    pruned = load_file(tmp_path / "output" / "model.safetensors")
    assert pruned.keys() == tensors.keys() | unused.keys()
    assert all(torch.equal(pruned[name], tensor) for name, tensor in unused.items())


def test_what_micro_batches_are_called_with_alike_they_have_together(make_family_model: MakeModel) -> None:
    """Masks of several sequences take more memory than the sequences."""
    with checkpoint(make_family_model("FalconForCausalLM")) as source, torch.no_grad():
        model = StreamedModel(source, family_of(source.headers), DTYPES["float32"], torch.device("cpu"))
        batches = model.batches(torch.randint(0, 256, (4, 48)))
        assert len(batches) > 2
        masks = [batch.calls[0][1]["attention_mask"] for batch in batches]
        assert all(mask is masks[0] for mask in masks)
        alone = model.enter(batches[-1].tokens)
        with model.block(0) as block:
            assert torch.equal(run_block(block, 0, batches[-1]), run_block(block, 0, alone))


def test_fused_experts_in_a_checkpoint_are_refused_with_the_remedy(make_family_model: MakeModel, tmp_path: Path) -> None:
    loaded(make_family_model("Qwen3MoeForCausalLM")).save_pretrained(tmp_path / "source", save_original_format=False)
    with pytest.raises(ProblemError, match=r"layers\.1\.mlp\.experts\.") as caught:
        check(recipe(), read_model(tmp_path / "source"))
    assert caught.value.code == "unsupported_architecture"
    assert "save_pretrained" in (caught.value.hint or "")


if __name__ == "__main__":
    lines = sorted(f"{architecture} {model_type}\n" for architecture, model_type in built_in())
    Path(discovery.__file__).with_name("data").joinpath("causal-lm-architectures.txt").write_text("".join(lines))
