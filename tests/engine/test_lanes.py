"""Lanes: order, threads, failures."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from secateur.pruning.lanes import WORTH_LANES, Lanes, lanes, map_short


@pytest.fixture(scope="module")
def two() -> Lanes:
    return Lanes(2, 2)


def test_results_come_in_order_and_an_item_keeps_its_thread(two: Lanes) -> None:
    assert two.map(lambda number: number * 10, range(5)) == [0, 10, 20, 30, 40]
    first, second = (two.map(lambda _: threading.get_ident(), range(5)) for _ in range(2))
    assert first == second
    assert len(set(first)) == 2


def test_the_first_lanes_failure_is_raised_once_nothing_runs_any_more(two: Lanes) -> None:
    ended: list[int] = []
    first_failed = threading.Event()

    def fail(number: int) -> None:
        if number % 2:
            first_failed.wait(30)
            time.sleep(0.05)
        ended.append(number)
        first_failed.set()
        raise ValueError(number)

    with pytest.raises(ValueError, match="0"):
        two.map(fail, range(4))
    assert ended == [0, 1]  # neither lane began its second


def test_a_map_within_a_lane_does_not_wait_for_that_lane(two: Lanes) -> None:
    assert two.map(lambda tens: sum(two.map(lambda ones: 10 * tens + ones, range(3))), range(2)) == [3, 33]


def test_a_lane_computes_gradients_where_its_caller_does(two: Lanes) -> None:
    weight = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        assert not any(part.requires_grad for part in two.map(lambda k: weight * k, range(2)))
    assert all(part.requires_grad for part in two.map(lambda k: weight * k, range(2)))


def test_the_caller_keeps_its_threads(two: Lanes) -> None:
    before = torch.get_num_threads()
    Lanes(2, 2)
    assert torch.get_num_threads() == before
    assert two.map(lambda _: torch.get_num_threads(), range(2)) == [1, 1]


@pytest.fixture
def _four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_four_threads")
@pytest.mark.parametrize(("count", "used"), [(3, 1), (WORTH_LANES, 4)])
def test_short_operations_have_one_thread_each_and_the_caller_has_all_of_its_own_again(count: int, used: int) -> None:
    def seen(number: int) -> tuple[int, int, int]:
        return number, torch.get_num_threads(), threading.get_ident()

    numbers, threads, lane = zip(*map_short(seen, range(count), torch.device("cpu")), strict=True)
    assert numbers == tuple(range(count))
    assert set(threads) == {1}
    assert len(set(lane)) == used
    with pytest.raises(ValueError, match="3"):
        map_short(_refuse, [3], torch.device("cpu"))
    assert torch.get_num_threads() == 4


@pytest.mark.usefixtures("_four_threads")
def test_lanes_asked_for_within_a_lane_leave_the_number_of_threads_alone(two: Lanes) -> None:
    def within(number: int) -> list[int]:
        assert lanes(torch.device("cpu")).count == 1
        return map_short(lambda part: 10 * number + part, range(WORTH_LANES), torch.device("cpu"))

    assert two.map(within, range(2)) == [list(range(WORTH_LANES)), list(range(10, 10 + WORTH_LANES))]
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == 4


def _refuse(number: int) -> None:
    raise ValueError(number)
