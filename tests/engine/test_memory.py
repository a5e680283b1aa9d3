"""Memory: garbage is sought among a run's own objects, and what it leaves is found by the next."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from secateur.pruning.checkpoint import Checkpoint
from secateur.pruning.discovery import family_of
from secateur.pruning.headers import read_model
from secateur.pruning.memory import give_back, only_what_is_new_collected
from secateur.pruning.streaming import StreamedModel, forward


class Knot:
    """It refers to itself, so only the collector finds it."""

    def __init__(self) -> None:
        self.myself = self


@pytest.fixture
def _no_collection_of_its_own() -> Iterator[None]:
    gc.disable()
    gc.unfreeze()
    yield
    gc.freeze()
    gc.enable()


@pytest.mark.usefixtures("_no_collection_of_its_own")
def test_garbage_of_a_run_goes_at_once_and_that_of_before_after_it_even_if_it_fails() -> None:
    knot = Knot()
    before = weakref.ref(knot)
    with suppress(ValueError), only_what_is_new_collected():
        del knot
        within = weakref.ref(Knot())
        give_back()
        assert within() is None
        assert before() is not None
        raise ValueError("failed")
    give_back()
    assert before() is None


@pytest.mark.usefixtures("_no_collection_of_its_own")
def test_what_a_run_leaves_is_gone_in_the_next() -> None:
    with only_what_is_new_collected():
        left = weakref.ref(Knot())
    with only_what_is_new_collected():
        assert left() is None


@pytest.mark.usefixtures("_no_collection_of_its_own")
def test_what_a_program_froze_itself_stays_frozen() -> None:
    gc.freeze()
    count = gc.get_freeze_count()
    with only_what_is_new_collected():
        pass
    assert gc.get_freeze_count() == count


@pytest.mark.usefixtures("_no_collection_of_its_own")
def test_a_model_that_was_walked_through_goes_without_the_collector(llama: Path) -> None:
    with Checkpoint(llama, read_model(llama)) as source, torch.no_grad():
        model = StreamedModel(source, family_of(source.headers), torch.float32, torch.device("cpu"))
        batches = model.batches(torch.zeros(2, 8, dtype=torch.int64))
        with model.block(0) as block:
            forward(block, 0, batches, model.lanes)
        model.logits(model.leave(batches[0])[0])
        held = [weakref.ref(each) for each in (model, model.model, block)]
        del model, batches, block
    assert [each() for each in held] == [None, None, None]
