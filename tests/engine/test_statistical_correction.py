"""Statistical Correction's score and its recipe."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from secateur.problems import ProblemError
from secateur.pruning.allocation import Target
from secateur.pruning.methods.statistical_correction import StatisticalCorrectionMethod, column_factors
from secateur.pruning.methods.wanda import WandaMethod
from secateur.pruning.statistics import InputMoments, InputNorms
from secateur.recipes import StatisticalCorrection, Wanda
from tests.engine.conftest import MakeModel
from tests.engine.runs import checkpoint, prune, recipe

HALF = Target("w", Fraction(1, 2))


def moments(inputs: Tensor) -> InputMoments:
    seen = InputMoments(inputs.shape[-1], torch.device("cpu"))
    seen.add(inputs)
    return seen


def norms(inputs: Tensor) -> InputNorms:
    seen = InputNorms(inputs.shape[-1], torch.device("cpu"))
    seen.add(inputs)
    return seen


def removed(weight: Tensor, inputs: Tensor, target: Target = HALF, **parameters: object) -> Tensor:
    method = StatisticalCorrectionMethod(
        StatisticalCorrection.model_validate({"name": "statistical_correction"} | parameters)
    )
    seen = moments(inputs) if parameters.get("variant") == "paper" else norms(inputs)
    return method.prune([weight], [target], method.prepare(seen))[0].removed


def problem(out_features: int = 24, in_features: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scales = torch.rand(in_features, generator=generator) + 0.1
    weight = torch.randn(out_features, in_features, generator=generator) * scales
    return weight, torch.randn(200, in_features, generator=generator) * scales.flip(0) + 0.5


@pytest.mark.parametrize("target", [HALF, Target("w", Fraction(1, 2), (2, 4)), Target("w", Fraction(5, 8), (3, 8))])
def test_without_column_factors_it_is_wanda(target: Target) -> None:
    weight, inputs = problem()
    wanda = WandaMethod(Wanda(name="wanda"))
    expected = wanda.prune([weight], [target], wanda.prepare(norms(inputs)))[0].removed
    assert torch.equal(removed(weight, inputs, target, alpha=0), expected)
    assert not torch.equal(removed(weight, inputs, target, alpha=1), expected)


def test_the_papers_score_is_the_fourth_root_of_the_inputs_variance_times_the_columns_factor() -> None:
    weight, inputs = problem()
    scores = weight.double().abs() * inputs.double().var(dim=0, correction=0).pow(0.25)
    scores *= weight.double().var(dim=0, correction=0).pow(-0.5 / 2)
    expected = scores <= scores.kthvalue(16, dim=1, keepdim=True).values
    assert torch.equal(removed(weight, inputs, variant="paper", alpha=0.5), expected)


@pytest.mark.parametrize("variant", ["paper", "secateur"])
@pytest.mark.parametrize("scale", [2.0**-20, 2.0**12])
def test_the_mask_does_not_depend_on_the_scale_of_weights_or_inputs(variant: str, scale: float) -> None:
    weight, inputs = problem()
    expected = removed(weight, inputs, variant=variant)
    assert torch.equal(removed(weight * scale, inputs, variant=variant), expected)
    assert torch.equal(removed(weight, inputs * scale, variant=variant), expected)


def test_an_input_that_never_varies_loses_its_weights_first_in_the_papers_variant() -> None:
    weight, inputs = problem()
    inputs[:, 3] = 7.0
    assert bool(removed(weight, inputs, variant="paper")[:, 3].all())
    assert not bool(removed(weight, inputs)[:, 3].all())  # its norm is large


def test_column_factors_are_finite_whatever_the_columns() -> None:
    weight, _ = problem()
    weight[:, 0], weight[:, 1] = 0.0, 2.0  # neither varies
    assert bool(column_factors(weight, 1.0, 1e-8).isfinite().all())
    one_row = column_factors(weight[:1], 1.0, 1e-8)  # of which no column varies
    assert torch.equal(one_row, one_row[0].expand(32))
    assert torch.equal(column_factors(torch.zeros(4, 3), 0.5, 1e-8), torch.full((3,), 1e-8).pow(-0.25))


@pytest.mark.parametrize(
    "wrong",
    [
        {"alpha": -0.1},
        {"alpha": "best"},
        {"epsilon": 0},
        {"compensation": {"name": "energy", "clamp": [1.5, 0.8]}},
        {"compensation": {"name": "energy", "clamp": [0, 2]}},
        {"compensation": {"name": "variance_matching", "tokens": 0.5}},
    ],
)
def test_wrong_parameters_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        StatisticalCorrection.model_validate({"name": "statistical_correction"} | wrong)


def test_each_variant_has_a_compensation_of_its_own_and_may_be_given_another() -> None:
    def compensation(**given: object) -> tuple[str, bool]:
        wanted = StatisticalCorrection.model_validate({"name": "statistical_correction"} | given)
        return wanted.compensation.name, wanted.guarded

    assert compensation() == ("variance_matching", True)
    assert compensation(variant="paper") == ("energy", False)
    assert compensation(variant="paper", compensation={"name": "none"}) == ("none", False)
    assert compensation(compensation={"name": "none"}, alpha="auto") == ("none", True)


@pytest.mark.parametrize("method", [{"variant": "paper"}, {"variant": "secateur"}, {"alpha": "auto"}])
@pytest.mark.parametrize("pattern", [0.6, "2:4"])
def test_a_model_is_pruned_as_asked(llama: Path, tmp_path: Path, method: dict[str, object], pattern: float | str) -> None:
    wanted = recipe({"name": "statistical_correction"} | method, pattern)
    result = prune(wanted, llama, tmp_path)
    assert result.metrics["sparsity"] == pytest.approx(wanted.sparsity.target, abs=0.01)
    with checkpoint(tmp_path / "output") as written, checkpoint(llama) as source:
        changed = [
            not torch.equal(weight[weight != 0], source.read(name)[weight != 0])
            for name in (linear["name"] for block in result.report["blocks"] for linear in block["linears"])
            for weight in [written.read(name)]
        ]
    refused = [
        "compensation_refused:variance_matching" in linear["fallbacks"]
        for block in result.report["blocks"]
        for linear in block["linears"]
    ]
    assert changed == [not each for each in refused]
    assert any(changed)


def test_every_choice_of_alpha_is_told(llama: Path, tmp_path: Path) -> None:
    wanted = recipe({"name": "statistical_correction", "alpha": "auto", "compensation": {"name": "none"}})
    report = prune(wanted, llama, tmp_path).report
    for linear in report["blocks"][1]["linears"]:
        (choice,) = linear["choices"]
        assert choice["errors"].keys() == {"alpha=0", "alpha=0.25", "alpha=0.5", "alpha=1"}
        assert choice["errors"][choice["chosen"]] == min(choice["errors"].values())


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "FalconForCausalLM", "MixtralForCausalLM"])
@pytest.mark.parametrize("compensation", ["variance_matching", "mean_correction"])
def test_turned_weights_shared_inputs_and_experts_are_compensated_too(
    make_model: MakeModel, tmp_path: Path, architecture: str, compensation: str
) -> None:
    method = {"name": "statistical_correction", "compensation": {"name": compensation}}
    model = make_model(architecture)
    if (architecture, compensation) == ("MixtralForCausalLM", "mean_correction"):
        with pytest.raises(ProblemError, match="can have a bias"):
            prune(recipe(method), model, tmp_path)
        return
    report = prune(recipe(method), model, tmp_path).report
    chosen = {choice["chosen"] for block in report["blocks"] for each in block["linears"] for choice in each["choices"]}
    assert compensation in chosen
