"""The guard: what does not bring the block's output closer to the dense model's is refused, and the report says so."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.problems import ProblemError
from secateur.pruning.allocation import Target
from secateur.pruning.events import Event
from secateur.pruning.group_pruner import Dense, GroupPruner, Observed
from secateur.pruning.guard import Guard, held_out, relative_error
from secateur.pruning.job import SCRATCH
from secateur.pruning.methods import Pruned
from secateur.pruning.pipeline import run
from secateur.pruning.statistics import InputNorms
from secateur.pruning.streaming import MicroBatch, run_block
from secateur.recipes import Wanda
from tests.engine.runs import prune, recipe


class KilledError(BaseException):
    """Ends a run the way a kill does."""


def die_after_two(event: Event) -> None:
    if event.get("done") == 2:
        raise KilledError


def batch(hidden: Tensor) -> MicroBatch:
    return MicroBatch(torch.zeros(hidden.shape[:2], dtype=torch.int64), hidden, [((), {})])


def candidate(weight: Tensor) -> list[Pruned]:
    return [Pruned(weight, weight == 0, 0.0, "weights")]


class Setting:
    """A block that is one linear, and a way to place candidates in it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.block = nn.Linear(16, 16, bias=False).requires_grad_(False)
        self.dense = self.block.weight.clone()
        hidden = torch.randn(1, 50, 16)
        self.guard = Guard(batch(hidden), batch(hidden))
        self.guard.enter(self.block, 0)

    def place(self, pruned: list[Pruned]) -> None:
        self.block.weight = nn.Parameter(pruned[0].weight, requires_grad=False)

    def choose(self, *, least_gain: float = 0.0, **candidates: Tensor) -> Any:
        named = [(name, candidate(weight)) for name, weight in candidates.items()]
        return self.guard.choose(named, self.place, least_gain=least_gain)


def test_a_compensation_that_raises_the_error_is_refused() -> None:
    setting = Setting()
    pruned = setting.dense.masked_fill(setting.dense.abs() < 0.1, 0.0)
    best, choice = setting.choose(none=pruned, scaled=pruned * 1.5)
    assert choice.chosen == "none"
    assert choice.errors["scaled"] > choice.errors["none"] > 0
    assert torch.equal(best.candidate[0].weight, pruned)
    assert torch.equal(setting.block.weight, pruned)


def test_energy_compensation_is_refused_where_it_raises_the_error() -> None:
    """Its aim is the spread of weights: of independent inputs, larger weights are farther from the dense ones."""
    setting = Setting()
    inputs = InputNorms(16, torch.device("cpu"))
    inputs.add(setting.guard.dense.hidden)
    dense, seen = Dense([setting.dense], [None], [Target("w", Fraction(1, 2))]), Observed(inputs)
    decided = {
        guard: GroupPruner(
            Wanda.model_validate({"name": "wanda", "compensation": {"name": "energy", "guard": guard}})
        ).prune(dense, seen, setting.guard, setting.place)
        for guard in (False, True)
    }
    plain = GroupPruner(Wanda(name="wanda")).prune(dense, seen, None, lambda _: None)
    (choice,) = decided[True].choices
    assert choice.chosen == "none"
    assert choice.errors["energy"] > choice.errors["none"] > 0
    assert torch.equal(setting.block.weight, plain.pruned[0].weight)
    assert decided[True].pruned[0].fallbacks == ("compensation_refused:energy",)
    assert not torch.equal(decided[False].pruned[0].weight, plain.pruned[0].weight)


def test_a_compensation_that_lowers_it_is_taken_and_goes_on() -> None:
    setting = Setting()
    halved = setting.dense * 0.5
    _, choice = setting.choose(none=halved, scaled=halved * 1.8)
    assert choice.chosen == "scaled"
    expected = setting.guard.pruned.hidden @ (halved * 1.8).T
    setting.guard.leave()
    torch.testing.assert_close(setting.guard.pruned.hidden, expected)


@pytest.mark.parametrize(("least_gain", "chosen"), [(0.03, "scaled"), (0.05, "none")])
def test_a_gain_can_be_too_small_to_be_taken(least_gain: float, chosen: str) -> None:
    setting = Setting()
    near = {"none": setting.dense * 0.5, "scaled": setting.dense * 0.51}  # errors of 0.25 and 0.24
    _, choice = setting.choose(least_gain=least_gain, **near)
    assert choice.chosen == chosen
    assert choice.errors["scaled"] < choice.errors["none"]
    torch.testing.assert_close(setting.block.weight, near[chosen])


def test_of_equal_candidates_the_first_is_taken() -> None:
    setting = Setting()
    assert setting.choose(none=setting.dense * 0.5, scaled=setting.dense * 0.5)[1].chosen == "none"


def test_the_target_is_where_the_dense_model_takes_the_sequences() -> None:
    """What the blocks before shrank, a block that scales up makes good: its own dense output would not be the better one."""
    setting = Setting()
    setting.guard.pruned.hidden = setting.guard.dense.hidden * 0.5
    assert setting.choose(none=setting.dense, scaled=setting.dense * 2)[1].chosen == "scaled"


def test_an_error_does_not_depend_on_a_single_large_token() -> None:
    target = torch.ones(1, 10, 4)
    target[0, 0] = 1000.0
    output = target.clone()
    output[0, 1:] = 0.0  # all others are lost
    assert relative_error(output, target) == pytest.approx(0.9)
    assert relative_error(torch.zeros_like(target), torch.zeros_like(target)) == 0.0


@pytest.mark.parametrize(
    ("samples", "length", "groups", "sequences", "kept"),
    [(32, 512, 4, 1, 128), (64, 2048, 4, 1, 1024), (256, 2048, 4, 2, 2048), (2, 32, 4, 1, 16), (64, 2048, 22, 1, 204)],
)
def test_as_many_tokens_are_held_out_as_nine_of_128_parts_of_a_forward_allow(
    samples: int, length: int, groups: int, sequences: int, kept: int
) -> None:
    tokens = torch.arange(samples * length).view(samples, length)
    observed, held = held_out(tokens, groups)
    assert torch.equal(observed, tokens[: samples - sequences])
    assert torch.equal(held, tokens[samples - sequences :, :kept])


@pytest.mark.parametrize(
    ("method", "forwards"),
    [
        ({"name": "wanda"}, 0),
        ({"name": "statistical_correction"}, 9),
        ({"name": "statistical_correction", "alpha": "auto"}, 21),
    ],
)
def test_the_guard_takes_what_it_may_and_more_is_told(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any], forwards: int
) -> None:
    """Of 64 x 64 tokens 32 are held out."""
    taken = []

    def counted(block: nn.Module, index: int, batch: MicroBatch) -> Tensor:
        taken.append(batch.tokens.numel())
        return run_block(block, index, batch)

    monkeypatch.setattr("secateur.pruning.guard.run_block", counted)
    events: list[Event] = []
    prune(recipe(method, calibration={"samples": 64, "sequence_length": 64}), llama, tmp_path, events)
    blocks = 3
    assert sum(taken) == blocks * forwards * 32
    logged = [event["message"] for event in events if event["type"] == "log" and event["level"] == "warning"]
    told = "The guard takes 16% of a forward"
    assert [message[: len(told)] for message in logged] == ([told] if forwards == 21 else [])


@pytest.mark.parametrize("propagate", ["staged", "block", "none"])
def test_the_report_names_each_choice_and_refusal(llama: Path, tmp_path: Path, propagate: str) -> None:
    wanted = recipe({"name": "wanda", "compensation": {"name": "variance_matching", "tokens": 0.125}}, propagate=propagate)
    report = prune(wanted, llama, tmp_path).report
    linears = [linear for block in report["blocks"] for linear in block["linears"]]
    assert {linear["choices"][0]["chosen"] for linear in linears} == {"none", "variance_matching"}
    for linear in linears:
        (choice,) = linear["choices"]
        assert choice["errors"][choice["chosen"]] == min(choice["errors"].values())
        assert ("compensation_refused:variance_matching" in linear["fallbacks"]) == (choice["chosen"] == "none")


def test_what_is_held_out_is_not_observed(llama: Path, tmp_path: Path) -> None:
    """The guard of a compensation that changes nothing: the mask is that of the remaining sequences."""
    method = {"name": "wanda", "compensation": {"name": "variance_matching", "clamp": [1.0, 1.0]}}
    guarded = prune(recipe(method), llama, tmp_path / "guarded").files
    plain = prune(recipe("wanda"), llama, tmp_path / "plain").files
    weights = {
        files[0].sha256 for files in ([f for f in each if f.path == "model.safetensors"] for each in (guarded, plain))
    }
    assert len(weights) == 2


@pytest.mark.parametrize("propagate", ["staged", "none"])
def test_what_is_held_out_goes_on_where_a_killed_run_was(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, propagate: str
) -> None:
    wanted = recipe("statistical_correction", propagate=propagate)
    expected = prune(wanted, llama, tmp_path / "undisturbed").files
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr("secateur.pruning.pipeline.shutil.rmtree", lambda *_, **__: None)  # a kill cleans nothing up
        patch.setattr("secateur.pruning.resume.SAVE_SHARE", 1e9)  # activations are saved behind every block
        with pytest.raises(KilledError):
            run(wanted, source=llama, output=stopped, cache=tmp_path, on_event=die_after_two)
    (boundary,) = (stopped / SCRATCH).glob("boundary-*.safetensors")
    for there in ("with saved activations", "without"):
        output = tmp_path / there
        done = run(wanted, source=llama, output=output, cache=tmp_path, on_event=lambda _: None, earlier=[stopped])
        assert done.files == expected
        boundary.unlink(missing_ok=True)


def test_a_single_sample_cannot_be_held_out(llama: Path, tmp_path: Path) -> None:
    calibration = {"samples": 1, "sequence_length": 32}
    wanted = recipe({"name": "wanda", "compensation": {"name": "variance_matching"}}, calibration=calibration)
    with pytest.raises(ProblemError, match="one sample") as raised:
        prune(wanted, llama, tmp_path)
    assert raised.value.code == "calibration_too_small"
    without_guard = {"name": "wanda", "compensation": {"name": "variance_matching", "guard": False}}
    prune(recipe(without_guard, calibration=calibration), llama, tmp_path)
