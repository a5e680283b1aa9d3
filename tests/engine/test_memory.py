"""Memory: garbage is sought among a run's own objects, and the caller's garbage is the collector's again afterwards."""

from __future__ import annotations

import gc
import weakref
from contextlib import suppress

from secateur.pruning.memory import give_back, only_what_is_new_collected


class Knot:
    """It refers to itself, so only the collector finds it."""

    def __init__(self) -> None:
        self.myself = self


def test_garbage_of_a_run_goes_at_once_and_that_of_before_after_it_even_if_it_fails() -> None:
    before = weakref.ref(Knot())
    with suppress(ValueError), only_what_is_new_collected():
        within = weakref.ref(Knot())
        give_back()
        assert within() is None
        assert before() is not None
        raise ValueError("failed")
    give_back()
    assert before() is None


def test_what_a_program_froze_itself_stays_frozen() -> None:
    gc.freeze()
    try:
        count = gc.get_freeze_count()
        with only_what_is_new_collected():
            pass
        assert gc.get_freeze_count() == count
    finally:
        gc.unfreeze()
