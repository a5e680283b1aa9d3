"""Mean correction: the biases that it fills in, where a model has them or its config can give it some."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from secateur.problems import ProblemError
from secateur.pruning.calibration import calibration_set, tokenise
from secateur.pruning.datasets import read_text
from secateur.pruning.families import FAMILIES
from tests.engine.conftest import MakeModel
from tests.engine.runs import prune, recipe


def calibration_tokens(model: Path) -> Tensor:
    """Those of `recipe`, (6, 32)."""
    text = read_text("wikitext2-sample", "calibration")[:40_000]
    return calibration_set(tokenise(model, text, 300), recipe().calibration).tokens


def first_output(folder: Path, tokens: Tensor) -> Tensor:
    """What the first linear makes of the first block's input, (batch, seq, out_features)."""
    model, seen = LlamaForCausalLM.from_pretrained(folder), list[Tensor]()
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    model(tokens)
    return seen[0]


def test_mean_correction_gives_a_llama_biases_and_says_so_in_its_config(llama: Path, tmp_path: Path) -> None:
    method = {"name": "wanda", "compensation": {"name": "mean_correction", "guard": False}}
    report = prune(recipe(method, 0.6, propagate="none"), llama, tmp_path).report
    config = json.loads((tmp_path / "output" / "config.json").read_text())
    assert (config["attention_bias"], config["mlp_bias"]) == (True, True)
    tokens = calibration_tokens(llama)
    corrected, before = (first_output(folder, tokens) for folder in (tmp_path / "output", llama))
    torch.testing.assert_close(corrected.mean(dim=(0, 1)), before.mean(dim=(0, 1)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(corrected, before, rtol=1e-2)
    assert all(not linear["fallbacks"] for block in report["blocks"] for linear in block["linears"])


@pytest.mark.parametrize("architecture", sorted(name for name, family in FAMILIES.items() if family.bias_switches))
def test_every_bias_that_a_config_can_switch_on_is_one_that_transformers_reads(
    make_model: MakeModel, tmp_path: Path, architecture: str
) -> None:
    method = {"name": "wanda", "compensation": {"name": "mean_correction", "guard": False}}
    prune(recipe(method, 0.6), make_model(architecture), tmp_path)
    model, loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "output", output_loading_info=True)
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]
    switched = [module for _, modules in FAMILIES[architecture].bias_switches for module in modules]
    corrected = {
        module
        for module in switched
        for name, bias in model.named_parameters()
        if name.endswith(f".{module}.bias") and bool(bias.any())
    }
    assert corrected
    assert corrected == {each for each in switched if any(f".{each}.weight" in name for name, _ in model.named_parameters())}


def test_a_linear_that_cannot_have_a_bias_is_named(make_model: MakeModel, tmp_path: Path) -> None:
    method = {"name": "wanda", "compensation": {"name": "mean_correction"}}
    report = prune(recipe(method), make_model("Qwen2ForCausalLM"), tmp_path).report
    refused = [
        linear["name"].split(".")[-2]
        for linear in report["blocks"][0]["linears"]
        if list(linear["fallbacks"]) == ["compensation_refused:mean_correction:no_bias"]
    ]
    assert refused == ["o_proj", "gate_proj", "up_proj", "down_proj"]


def test_a_model_that_can_have_no_bias_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    method = {"name": "wanda", "compensation": {"name": "mean_correction"}}
    with pytest.raises(ProblemError, match="No linear of a MistralForCausalLM") as raised:
        prune(recipe(method), make_model("MistralForCausalLM"), tmp_path)
    assert raised.value.code == "compensation_unavailable"
