"""Allocations: the target is met exactly whatever the rule, and the rules are the papers'."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from secateur.problems import ProblemError
from secateur.pruning import pipeline, targets
from secateur.pruning.allocation import allocate
from secateur.pruning.events import Event, OnEvent
from secateur.pruning.job import SCRATCH, RunResult
from secateur.pruning.outliers import percentage_above
from secateur.pruning.resume import SCORES
from secateur.pruning.spectra import block_exponents, tail_exponent
from secateur.recipes import Sparsity
from tests.engine.conftest import MakeModel
from tests.engine.runs import prune, recipe
from tests.engine.test_pipeline import linears_of
from tests.engine.test_resume import OutOfMemory
from tests.engine.test_staged import GROUPS, tokens_of

RULES: list[dict[str, Any]] = [
    {"name": "uniform"},
    {"name": "per_block", "ratios": [1, 0.5, 1.2]},
    {"name": "per_linear", "ratios": {"self_attn": 1.5, "q_proj": 0.25, "mlp.down_proj": 0}},
    {"name": "owl"},
    {"name": "alphapruning"},
]


def names_of(blocks: int) -> list[list[str]]:
    linears = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    return [[f"model.layers.{block}.{linear}.weight" for linear in linears] for block in range(blocks)]


@st.composite
def allocations(draw: st.DrawFn) -> tuple[dict[str, Any], list[float]]:
    """A rule for three blocks and scores of theirs, extreme ones too."""
    ratios = st.floats(0.001, 1000) | st.just(0.0)
    scores = draw(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3))
    rule: dict[str, Any] = {"name": draw(st.sampled_from([rule["name"] for rule in RULES]))}
    if rule["name"] == "per_block":
        rule["ratios"] = draw(st.lists(ratios, min_size=3, max_size=3))
    if rule["name"] == "per_linear":
        rule["ratios"] = {key: draw(ratios) for key in ("q_proj", "self_attn", "mlp")}
    if rule["name"] == "owl":
        rule["limit"] = draw(st.floats(0, 0.5))
    if rule["name"] == "alphapruning":
        rule["spread"] = draw(st.floats(0, 0.99))
    return rule, scores


@given(made=allocations(), target=st.floats(0.001, 0.999), sizes=st.lists(st.integers(1, 10**9), min_size=9, max_size=9))
@settings(deadline=None, max_examples=300)
def test_the_target_is_met_within_a_weight_a_linear(
    made: tuple[dict[str, Any], list[float]], target: float, sizes: list[int]
) -> None:
    rule, scores = made
    blocks = [dict(zip(names, sizes[3 * i : 3 * i + 3], strict=True)) for i, names in enumerate(names_of(3))]
    try:
        found = allocate(Sparsity.model_validate({"target": target, "allocation": rule}), blocks, scores)
    except ProblemError:  # nothing but linears that are left alone, or too few others
        reject()
    counts = [found[name].count(size) for block in blocks for name, size in block.items()]
    assert all(0 <= count < size or rule["name"] == "uniform" for count, size in zip(counts, sizes, strict=True))
    exact = Fraction(str(target)) * sum(sizes)
    assert abs(sum(counts) - exact) < (len(sizes) if rule["name"] == "uniform" else 1)
    assert all(found[name].fraction < 1 for name in found)


def fractions_of(rule: dict[str, Any], target: float, *, scores: tuple[float, ...] = (), size: int = 10**6) -> list[float]:
    """The fractions of three blocks of one linear each."""
    blocks = [{f"layers.{block}.linear.weight": size} for block in range(3)]
    found = allocate(Sparsity.model_validate({"target": target, "allocation": rule}), blocks, scores)
    return [float(each.fraction) for each in found.values()]


def test_ratios_are_proportions() -> None:
    assert fractions_of({"name": "per_block", "ratios": [2, 1, 3]}, 0.4) == pytest.approx([0.4, 0.2, 0.6], abs=1e-6)
    assert fractions_of({"name": "per_block", "ratios": [0.4, 0.2, 0.6]}, 0.4) == pytest.approx([0.4, 0.2, 0.6], abs=1e-6)
    assert fractions_of({"name": "per_block", "ratios": [0, 1, 1]}, 0.4) == pytest.approx([0, 0.6, 0.6], abs=1e-6)


def test_who_is_full_leaves_the_rest_to_others() -> None:
    assert fractions_of({"name": "per_block", "ratios": [1, 1, 4]}, 0.6) == pytest.approx([0.4, 0.4, 1.0], abs=1e-5)


def test_owl_is_the_papers_rule() -> None:
    """D' = 2 lambda (D - min) / (max - min); sparsity = S - (D' - mean D')."""
    scores = (1.0, 3.0, 1.5)
    shifts = [0.0, 0.16, 0.04]
    expected = [0.7 - (shift - sum(shifts) / 3) for shift in shifts]
    assert fractions_of({"name": "owl"}, 0.7, scores=scores) == pytest.approx(expected, abs=1e-6)
    assert fractions_of({"name": "owl"}, 0.7, scores=(2.0, 2.0, 2.0)) == pytest.approx([0.7] * 3, abs=1e-6)
    assert fractions_of({"name": "owl", "limit": 0.5}, 0.05, scores=scores)[1] == 0.0


def test_alphapruning_is_the_papers_rule() -> None:
    """Exponents mapped to [1 - epsilon, 1 + epsilon], and scaled to the mean S: the larger, the more is pruned."""
    ratios = [0.7, 1.3, 0.85]
    expected = [0.5 * ratio * 3 / sum(ratios) for ratio in ratios]
    assert fractions_of({"name": "alphapruning"}, 0.5, scores=(2.0, 6.0, 3.0)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("rule", "target", "pointer"),
    [
        ({"name": "per_block", "ratios": [1, 1]}, 0.5, "/sparsity/allocation/ratios"),
        ({"name": "per_block", "ratios": [0, 0, 1]}, 0.5, "/sparsity/allocation"),
        ({"name": "per_block", "ratios": [0, 0, 0]}, 0.5, "/sparsity/allocation"),
        ({"name": "per_linear", "ratios": {"c_attn": 0.5}}, 0.5, "/sparsity/allocation/ratios/c_attn"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_done(
    llama: Path, tmp_path: Path, rule: dict[str, Any], target: float, pointer: str
) -> None:
    with pytest.raises(ProblemError) as caught:
        prune(recipe("magnitude", sparsity={"target": target, "allocation": rule}), llama, tmp_path)
    assert caught.value.code == "allocation_impossible"
    assert [fault.pointer for fault in caught.value.faults] == [pointer]


@pytest.mark.parametrize(
    ("method", "rule"),
    [*(("wanda", rule) for rule in RULES), *(("sparsegpt", rule) for rule in RULES[1:3]), ("magnitude", RULES[3])],
    ids=lambda value: value["name"] if isinstance(value, dict) else value,
)
def test_a_run_meets_the_target_and_reports_every_share(
    llama: Path, tmp_path: Path, method: str, rule: dict[str, Any]
) -> None:
    result = prune(recipe(method, sparsity={"target": 0.61, "allocation": rule}), llama, tmp_path)
    linears = linears_of(result.report)
    total = sum(math.prod(linear["shape"]) for linear in linears)
    assert abs(sum(linear["zeros"] for linear in linears) - 0.61 * total) <= len(linears)
    for linear in linears:
        assert abs(linear["zeros"] - linear["target"] * math.prod(linear["shape"])) < 1
    assert len({linear["target"] for linear in linears}) > 1 or rule["name"] == "uniform"
    for block in result.report["blocks"]:
        sizes = [math.prod(linear["shape"]) for linear in block["linears"]]
        shares = [linear["target"] * size for linear, size in zip(block["linears"], sizes, strict=True)]
        assert block["target"] == pytest.approx(sum(shares) / sum(sizes))
        assert (block["score"] is not None) == (rule["name"] in {"owl", "alphapruning"})


def test_owl_counts_the_outliers_of_the_dense_model(llama: Path, tmp_path: Path) -> None:
    """Against the whole model run at once with hooks, in float64."""
    wanted = recipe("sparsegpt", sparsity={"target": 0.6, "allocation": {"name": "owl", "outlier": 2.0}})
    result = prune(wanted, llama, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    expected = []
    for block in model.model.layers:
        scores = []
        for group in GROUPS:
            seen: list[torch.Tensor] = []
            handle = block.get_submodule(group[0]).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            with torch.no_grad():
                model(tokens_of(llama, wanted))
            handle.remove()
            norms = seen[0].flatten(0, 1).double().norm(dim=0)
            scores += [(block.get_submodule(name).weight.detach().abs() * norms).flatten() for name in group]
        together = torch.cat(scores)
        expected.append(100 * float((together > 2.0 * together.mean()).double().mean()))
    assert [block["score"] for block in result.report["blocks"]] == pytest.approx(expected, rel=1e-3)
    assert len(set(expected)) == 3


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "MixtralForCausalLM"])
def test_owl_goes_with_every_kind_of_linear(make_family_model: MakeModel, tmp_path: Path, architecture: str) -> None:
    """Conv1D weights are stored (in_features, out_features); an expert's inputs are those routed to it."""
    wanted = recipe("wanda", sparsity={"target": 0.6, "allocation": {"name": "owl", "outlier": 2.0}})
    result = prune(wanted, make_family_model(architecture), tmp_path)
    blocks = result.report["blocks"]
    assert len({block["score"] for block in blocks}) == len(blocks)
    linears = linears_of(result.report)
    assert abs(result.metrics["sparsity"] - 0.6) * sum(math.prod(linear["shape"]) for linear in linears) <= len(linears)


def test_memory_that_runs_out_while_owl_looks_is_made_do_with(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe("magnitude", sparsity={"target": 0.6, "allocation": {"name": "owl", "outlier": 2.0}})
    expected = prune(wanted, llama, tmp_path / "undisturbed")
    seen = OutOfMemory(monkeypatch, {6})  # in the second block
    assert prune(wanted, llama, tmp_path / "again").files == expected.files
    assert (seen.sizes[0], seen.sizes[-1]) == (6, 3)


def test_a_percentage_is_of_all_linears_together() -> None:
    one, other = torch.tensor([[1.0, -1.0, 20.0]]), torch.tensor([[2.0]])
    assert percentage_above([(one, torch.ones(3)), (other, torch.tensor([5.0]))], 2.0) == 25.0  # 20 of 1, 1, 20, 10


@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.5])
def test_the_exponent_of_a_power_law_is_found(alpha: float) -> None:
    """A spectrum drawn evenly from l^-alpha: its quantiles are (1 - u)^(-1 / (alpha - 1))."""
    values = (1 - torch.arange(400, dtype=torch.float64) / 400) ** (-1 / (alpha - 1))
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(400, 400, dtype=torch.float64, generator=generator)).Q for _ in range(2))
    weight = left @ torch.diag(values.sqrt()) @ right
    assert tail_exponent(weight.float()) == pytest.approx(alpha, rel=0.1)


def test_a_weight_without_a_spectrum_has_no_say() -> None:
    weight = torch.randn(12, 30, generator=torch.Generator().manual_seed(0))
    alpha = tail_exponent(weight)
    assert block_exponents([[weight, torch.zeros(4, 4)], [torch.eye(3)]]) == pytest.approx([alpha, alpha])
    assert block_exponents([[weight, torch.full((3, 3), torch.nan)], [weight]]) == pytest.approx([alpha, alpha])
    assert block_exponents([[torch.zeros(2, 2)], [torch.zeros(2, 2)]]) == [1.0, 1.0]


@pytest.mark.parametrize("rule", ["owl", "alphapruning"])
def test_a_resumed_run_does_not_look_again(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    """An attempt that was killed behind its second block leaves what its allocation was made from."""
    wanted = recipe("wanda", sparsity={"target": 0.6, "allocation": {"name": rule}})
    undisturbed = prune(wanted, llama, tmp_path / "undisturbed")

    def run(into: str, on_event: OnEvent, *earlier: Path) -> RunResult:
        output, cache = tmp_path / into, tmp_path / "cache"
        return pipeline.run(wanted, source=llama, output=output, cache=cache, on_event=on_event, earlier=earlier)

    def die_after_two(event: Event) -> None:
        if event.get("done") == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("secateur.pruning.pipeline.shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            run("stopped", die_after_two)
    assert len(json.loads((tmp_path / "stopped" / SCRATCH / SCORES).read_text())) == 3

    def looked(*_: Any) -> None:
        pytest.fail("it looked at the model again")

    monkeypatch.setattr(targets, "outlier_percentages", looked)
    monkeypatch.setattr(targets, "block_exponents", looked)
    assert run("resumed", lambda _: None, tmp_path / "stopped").files == undisturbed.files
