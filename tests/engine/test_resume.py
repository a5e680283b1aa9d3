"""A job that is killed goes on where it was, and ends with the same bytes."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from secateur.problems import ProblemError
from secateur.pruning import pipeline, resume
from secateur.pruning.checkpoint import link as link_file
from secateur.pruning.checkpoint import sha256_of
from secateur.pruning.events import Event
from secateur.pruning.job import SCRATCH, RunResult
from secateur.pruning.lanes import Lanes
from secateur.pruning.methods import Pruned
from secateur.pruning.methods.wanda import WandaMethod
from secateur.pruning.statistics import InputNorms
from secateur.pruning.streaming import MicroBatch, forward
from tests.engine.conftest import MakeModel
from tests.engine.runs import prune, recipe
from tests.engine.test_pipeline import PERPLEXITY

ROOT = Path(__file__).parents[2]


def digests(folder: Path) -> dict[str, str]:
    return {file.name: sha256_of(file) for file in folder.iterdir()}


def done_of(told: str) -> list[int]:
    """Numbers of finished blocks that a killed run told, in order; a line that was cut short is none."""
    lines = [line.split() for line in told.splitlines()]
    return [int(line[1]) for line in lines if len(line) == 2 and line[0] == "progress"]


@pytest.mark.parametrize(
    ("method", "propagate", "kills"), [("sparsegpt", "staged", 5), ("wanda", "block", 1), ("wanda", "none", 1)]
)
def test_killed_again_and_again_it_ends_with_the_same_bytes(
    make_model: MakeModel, tmp_path: Path, method: str, propagate: str, kills: int
) -> None:
    model, layers = make_model(layers=100), 100
    prune(recipe(method, propagate=propagate), model, tmp_path / "undisturbed")
    dice, earlier, finished = random.Random(), list[str](), 0
    for attempt in range(kills + 1):
        into = tmp_path / str(attempt)
        command = [sys.executable, "-m", "tests.engine.killed", str(model), str(into), method, propagate, *earlier]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        told = ""
        if attempt < kills:
            for _ in range(dice.randint(5, 14)):  # the two stages, the blocks taken over, then one block a line
                told += child.stdout.readline()
            time.sleep(dice.uniform(0, 0.02))
            child.send_signal(signal.SIGKILL)
        told += child.communicate()[0]
        if attempt < kills and child.returncode == 0:
            continue  # it was through before the signal came, and has tidied up
        blocks = done_of(told)
        if blocks:
            assert blocks[0] >= finished  # what was finished when it was killed is not pruned again
            assert blocks == list(range(blocks[0], blocks[-1] + 1))
            finished = blocks[-1]
        earlier.insert(0, str(into / "output"))
    assert blocks[0] > 0
    assert finished == layers
    assert digests(tmp_path / str(kills) / "output") == digests(tmp_path / "undisturbed" / "output")


class KilledError(BaseException):
    """Ends a run the way a kill does: nothing is cleaned up."""


@pytest.fixture
def stopped(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output folder of a Wanda run over three blocks that ended after the second."""

    def die_after_two(event: Event) -> None:
        if event.get("done") == 2:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("secateur.pruning.pipeline.shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(KilledError):
            pipeline.run(
                recipe(), source=llama, output=tmp_path / "stopped", cache=tmp_path / "cache", on_event=die_after_two
            )
    return tmp_path / "stopped"


def first_done(llama: Path, into: Path, *earlier: Path, method: str = "wanda", seed: int = 0) -> tuple[int, RunResult]:
    """Run on after `earlier`: how many blocks were taken over, and the result."""
    events: list[Event] = []
    result = pipeline.run(
        recipe(method, calibration={"samples": 6, "sequence_length": 32, "seed": seed}, **PERPLEXITY),
        source=llama,
        output=into / "output",
        cache=into / "cache",
        on_event=events.append,
        earlier=earlier,
    )
    return next(event["done"] for event in events if event["type"] == "progress"), result


def test_what_is_finished_is_not_pruned_again(
    llama: Path, tmp_path: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned: list[int] = []
    prune_group = WandaMethod.prune

    def counted(method: WandaMethod, weights: Sequence[Tensor], *rest: Any) -> list[Pruned]:
        pruned.append(len(weights))
        return prune_group(method, weights, *rest)

    monkeypatch.setattr(WandaMethod, "prune", counted)
    taken, result = first_done(llama, tmp_path / "second", stopped)
    assert taken == 2
    assert sum(pruned) == 7  # the linears of the third block
    assert [block["block"] for block in result.report["blocks"]] == [0, 1, 2]
    assert result.files == first_done(llama, tmp_path / "undisturbed")[1].files


def test_saved_activations_are_a_shortcut_and_nothing_more(
    llama: Path, tmp_path: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = first_done(llama, tmp_path / "undisturbed")[1].files
    walked: list[int] = []

    def counted(block: nn.Module, index: int, batches: list[MicroBatch], lanes: Lanes) -> None:
        walked.append(index)
        forward(block, index, batches, lanes)

    monkeypatch.setattr("secateur.pruning.walk.forward", counted)
    assert first_done(llama, tmp_path / "with", stopped)[1].files == expected
    with_them = len(walked)
    (boundary,) = (stopped / SCRATCH).glob("boundary-*.safetensors")
    boundary.write_bytes(boundary.read_bytes()[:-1] + b"?")
    assert first_done(llama, tmp_path / "damaged", stopped)[1].files == expected
    assert walked[with_them:] == [0, 1]
    assert with_them < 2


@pytest.mark.parametrize("harm", ["shard", "record", "no record"])
def test_a_damaged_block_is_pruned_again(llama: Path, tmp_path: Path, stopped: Path, harm: str) -> None:
    shard = stopped / SCRATCH / "block-00001.safetensors"
    if harm == "shard":
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    elif harm == "record":
        shard.with_suffix(".json").write_text("{")
    else:
        shard.with_suffix(".json").unlink()
    taken, result = first_done(llama, tmp_path / "second", stopped)
    assert taken == 1
    assert result.files == first_done(llama, tmp_path / "undisturbed")[1].files


def test_an_attempt_that_tidies_up_while_it_is_taken_over_fails_nothing(
    llama: Path, tmp_path: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker was thought lost, and is not: it ends meanwhile, and with it its folder."""
    linked: list[Path] = []

    def link(existing: Path, new: Path) -> None:
        if len(linked) == 3:  # the first block's shard and record, and the second's shard
            shutil.rmtree(existing.parent)
        linked.append(new)
        link_file(existing, new)

    monkeypatch.setattr(resume, "link", link)
    taken, result = first_done(llama, tmp_path / "second", stopped)
    assert taken == 1
    assert result.files == first_done(llama, tmp_path / "undisturbed")[1].files


def test_another_jobs_work_is_not_taken_over(llama: Path, tmp_path: Path, stopped: Path) -> None:
    assert first_done(llama, tmp_path / "method", stopped, method="magnitude")[0] == 0
    assert first_done(llama, tmp_path / "seed", stopped, seed=1)[0] == 0
    assert first_done(llama, tmp_path / "nothing", tmp_path / "absent")[0] == 0


def test_the_most_advanced_attempt_is_taken_over(llama: Path, tmp_path: Path, stopped: Path) -> None:
    fewer = tmp_path / "fewer" / SCRATCH
    fewer.mkdir(parents=True)
    for name in (resume.FINGERPRINT, "block-00000.safetensors", "block-00000.json"):
        (fewer / name).write_bytes((stopped / SCRATCH / name).read_bytes())
    assert first_done(llama, tmp_path / "second", fewer.parent, stopped)[0] == 2


class OutOfMemory:
    """Fails like torch's CPU allocator at the `n`-th matrix of inputs, as often as it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, places: set[int]) -> None:
        add, self.calls, self.sizes = InputNorms.add, 0, list[int]()

        def failing(norms: InputNorms, inputs: Tensor) -> None:
            self.calls += 1
            self.sizes.append(len(inputs))
            if self.calls in places:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")
            add(norms, inputs)

        monkeypatch.setattr(InputNorms, "add", failing)


def test_memory_that_runs_out_halves_the_micro_batches(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = prune(recipe(), llama, tmp_path / "undisturbed")
    seen = OutOfMemory(monkeypatch, {7, 9})  # in the second block, and when it is begun again
    result = prune(recipe(), llama, tmp_path / "again")
    assert [block["fallbacks"] for block in result.report["blocks"]] == [
        (),
        ("out_of_memory:micro_batch=192", "out_of_memory:micro_batch=96"),
        (),
    ]
    assert (seen.sizes[0], seen.sizes[-1]) == (6, 1)
    weights = [next(f.sha256 for f in r.files if f.path == "model.safetensors") for r in (expected, result)]
    assert weights[0] == weights[1]


def test_memory_that_runs_out_where_sparsity_is_induced_leaves_what_is_aimed_at(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(layers=2)
    method = {"name": "wanda", "induction": {"name": "sparsity_induction", "sequences_per_step": 64}}
    wanted = recipe(method, calibration={"samples": 264, "sequence_length": 32})
    before = prune(wanted, model, tmp_path / "undisturbed").report["blocks"]
    OutOfMemory(monkeypatch, {5})  # in the first block, whose training is over: its targets are behind it by then
    after = prune(wanted, model, tmp_path / "again").report["blocks"]
    assert [note.partition("=")[0] for note in after[0]["fallbacks"]] == ["out_of_memory:micro_batch"]
    errors = [[block["induction"]["choice"]["errors"]["trained"] for block in blocks] for blocks in (after, before)]
    assert errors[0] == pytest.approx(errors[1], rel=0.2)  # other micro-batches, other steps


def test_memory_that_does_not_suffice_for_one_sequence_is_a_problem(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    OutOfMemory(monkeypatch, set(range(1000)))
    with pytest.raises(ProblemError) as caught:
        prune(recipe(), llama, tmp_path)
    assert caught.value.code == "out_of_memory"
