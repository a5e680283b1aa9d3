"""Masks against their definitions, spelt out with sorting and loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.pruning.masks import lowest_per_layer, lowest_per_row, n_of_m, removal_mask
from tests.targets import target


@st.composite
def score_matrices(draw: st.DrawFn, columns: int | None = None) -> Tensor:
    """Few distinct values, so that ties are the rule."""
    rows, width = draw(st.integers(1, 5)), columns or draw(st.integers(1, 24))
    values = draw(st.lists(st.integers(0, 3), min_size=rows * width, max_size=rows * width))
    return torch.tensor(values, dtype=torch.float32).view(rows, width)  # (rows, width)


def first_lowest(scores: list[float], count: int) -> list[bool]:
    chosen = sorted(range(len(scores)), key=lambda i: (scores[i], i))[:count]
    return [i in chosen for i in range(len(scores))]


@given(scores=score_matrices(), fraction=st.floats(0, 1))
@settings(deadline=None)
def test_per_row_removes_the_first_lowest_of_each_row(scores: Tensor, fraction: float) -> None:
    count = int(fraction * scores.shape[1])
    assert lowest_per_row(scores, count).tolist() == [first_lowest(row, count) for row in scores.tolist()]


@given(scores=score_matrices(), fraction=st.floats(0, 1))
@settings(deadline=None)
def test_per_layer_removes_the_first_lowest_of_all(scores: Tensor, fraction: float) -> None:
    count = int(fraction * scores.numel())
    assert lowest_per_layer(scores, count).flatten().tolist() == first_lowest(scores.flatten().tolist(), count)


@given(data=st.data(), group=st.integers(2, 32))
@settings(deadline=None)
def test_n_of_m_removes_the_first_lowest_of_each_group(data: st.DataObject, group: int) -> None:
    kept = data.draw(st.integers(1, group - 1))
    scores = data.draw(score_matrices(2 * group))
    expected = [first_lowest(row[:group], group - kept) + first_lowest(row[group:], group - kept) for row in scores.tolist()]
    assert n_of_m(scores, kept, group).tolist() == expected


@pytest.mark.parametrize(
    ("weights", "amount", "count"),
    [
        (10, 0.3, 3),
        (10, 0.29, 2),
        (576, 0.5, 288),
        (7, 0.5, 3),
        (3, 0.1, 0),
        (4096 * 11008, 0.013, 586153),
        (8192 * 28672, 0.033, 7751073),
        (96, "31:32", 3),
    ],
)
def test_counts_are_floors_of_the_decimal_that_was_written(weights: int, amount: str | float, count: int) -> None:
    assert target(amount).count(weights) == count


@given(scores=score_matrices(), amount=st.floats(0.001, 0.999))
@settings(deadline=None)
def test_rows_differ_by_one_at_most_and_the_linear_is_exact(scores: Tensor, amount: float) -> None:
    mask = removal_mask(scores, target(amount), "row")
    counts = mask.sum(dim=1).tolist()
    assert sum(counts) == target(amount).count(scores.numel())
    assert max(counts) - min(counts) <= 1
    assert mask.tolist() == [first_lowest(row, count) for row, count in zip(scores.tolist(), counts, strict=True)]


def test_the_recipe_decides_who_competes() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    half = target(0.5)
    assert removal_mask(scores, half, "row").tolist() == [[True, True, False, False]] * 2
    assert removal_mask(scores, half, "layer").tolist() == [[True] * 4, [False] * 4]
    assert removal_mask(scores, target("1:2"), "layer").tolist() == [[True, False, True, False]] * 2
