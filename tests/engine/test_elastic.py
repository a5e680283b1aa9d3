"""The parts of an elastic model as pure functions: bands, nested masks, chains, the mixed stream, the safeguard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from secateur.pruning.allocation import Target
from secateur.pruning.elastic.bands import SEVEN, THREE, band_of, exact, groups_of, schedule, stratified, widths
from secateur.pruning.elastic.chain import Chain, gradients, masked_sum, new_chain
from secateur.pruning.elastic.linear import ElasticLinear, weights_at
from secateur.pruning.elastic.mixer import mix, mixing_rates
from secateur.pruning.elastic.nested import kept_bits, removal_ranks
from secateur.pruning.elastic.reconstruction import Sample, Trained, Training, loss, reconstruct, without_chain
from secateur.pruning.elastic.safeguard import BASE_FROZEN, LOW_BAND_OFF, RATE, error_at, guarded
from secateur.pruning.lanes import lanes
from secateur.pruning.linears import Linear
from secateur.pruning.masks import lowest_per_row, removal_mask
from secateur.pruning.methods.wanda import WandaMethod, wanda_scores
from secateur.pruning.placed import Placed
from secateur.pruning.streaming import MicroBatch
from secateur.recipes import Band, Epts, Wanda

LANES = lanes(torch.device("cpu"))
RATES = [0.1, 0.2, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.9]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    """As in the engine."""
    with torch.no_grad():
        yield


class Block(nn.Module):
    """Two linears with something between them that is not linear; a block as the engine calls one."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False)
        self.to(dtype).requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = hidden + self.second(torch.tanh(3 * self.first(hidden)))
        return result


def batches(block: Block, count: int, seed: int = 1) -> list[MicroBatch]:
    """Sequences whose features are of very different sizes, so that masks matter."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-1, 0.5, 16)
    dtype = block.first.weight.dtype
    hidden = [(torch.randn(1, 12, 16, generator=generator) * scale).to(dtype) for _ in range(count)]
    return [MicroBatch(torch.zeros(1, 12, dtype=torch.int64), part, [((), {})]) for part in hidden]


def dense_linears(block: Block, given: list[MicroBatch]) -> dict[str, ElasticLinear]:
    inputs = torch.cat([batch.hidden for batch in given]).flatten(0, 1)
    middle = torch.tanh(3 * block.first(inputs))
    norms = {"first": inputs.float().norm(dim=0), "second": middle.float().norm(dim=0)}
    return without_chain({"first": block.first.weight, "second": block.second.weight}, norms)


def with_chain(linears: dict[str, ElasticLinear], seed: int = 2) -> dict[str, ElasticLinear]:
    """The linears with chains that change them."""
    generator = torch.Generator().manual_seed(seed)
    chained = {}
    for name, linear in linears.items():
        chain = new_chain((linear.weight.shape[0], linear.weight.shape[1]), widths(SEVEN)[-1], generator)
        up = 0.05 * torch.randn(chain.up.shape, generator=generator)
        chained[name] = replace(linear, chain=Chain(up.to(linear.weight.dtype), chain.down.to(linear.weight.dtype)))
    return chained


def placed_in_lanes(block: Block) -> Placed:
    linears = [Linear("first", "0.first.weight", 24, 16), Linear("second", "0.second.weight", 16, 24)]
    return Placed(block, 0, linears, LANES)


def output_with(block: Block, batch: MicroBatch, weights: Mapping[str, Tensor]) -> Tensor:
    return placed_in_lanes(block).outputs(weights, [batch])[0]


def with_targets(block: Block, given: list[MicroBatch]) -> list[tuple[MicroBatch, Tensor]]:
    """Micro-batches, and what the dense block makes of each."""
    return [(batch, block(batch.hidden)) for batch in given]


def samples(block: Block, given: list[MicroBatch]) -> list[Sample]:
    return [Sample([batch] * 7, target) for batch, target in with_targets(block, given)]


# Bands


@pytest.mark.parametrize(
    ("rate", "band"),
    [
        (0.01, 0), (0.4, 0), (0.4000001, 1), (0.45, 1), (0.4500001, 2), (0.5, 2), (0.501, 3), (0.55, 3), (0.551, 4),
        (0.6, 4), (0.601, 5), (0.65, 5), (0.651, 6), (0.7, 6), (0.71, 6), (0.9, 6),
    ],
)  # fmt: skip
def test_a_band_holds_its_upper_end_and_the_last_one_all_above_it(rate: float, band: int) -> None:
    assert band_of(SEVEN, exact(rate)) == band


def test_a_band_inherits_the_pairs_below_it() -> None:
    assert widths(SEVEN) == [8, 16, 24, 32, 40, 48, 56]
    assert widths(THREE) == [24, 40, 56]
    assert groups_of(SEVEN) == [[0], [1, 2, 3], [4, 5, 6]]
    assert groups_of(THREE) == [[0], [1], [2]]
    assert groups_of(THREE[:1]) == [[0]]


@given(band=st.integers(0, 6), count=st.integers(1, 60), seed=st.integers(0, 1000))
def test_rates_of_a_band_are_inside_it_one_in_each_equal_part(band: int, count: int, seed: int) -> None:
    rates = stratified(SEVEN, band, count, torch.Generator().manual_seed(seed))
    assert all(band_of(SEVEN, exact(rate)) == band for rate in rates)
    upper, lower = SEVEN[band].upper, SEVEN[band - 1].upper if band else 0.0
    parts = sorted(min(count - 1, int((upper - rate) / (upper - lower) * count + 1e-9)) for rate in rates)
    assert parts == list(range(count))


def test_a_step_trains_one_band_of_each_group_and_all_equally_often() -> None:
    plan = schedule(SEVEN, 60, torch.Generator().manual_seed(0), every_band=False)
    trained = [[band for band, _ in pairs] for pairs in plan]
    assert all(low == 0 and middle in (1, 2, 3) and high in (4, 5, 6) for low, middle, high in trained)
    assert [sum(band in bands for bands in trained) for band in range(7)] == [60, 20, 20, 20, 20, 20, 20]
    whole = schedule(SEVEN, 3, torch.Generator().manual_seed(0), every_band=True)
    assert [[band for band, _ in pairs] for pairs in whole] == [list(range(7))] * 3


# Nested masks


@settings(deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 40), seed=st.integers(0, 10_000))
def test_masks_are_nested_have_exact_counts_and_break_ties_stably(rows: int, columns: int, seed: int) -> None:
    # Three values only: nearly everything is a tie.
    scores = torch.randint(0, 3, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    ranks, before = removal_ranks(scores), torch.zeros(rows, columns, dtype=torch.bool)
    for rate in RATES:
        count = int(columns * exact(rate))
        removed = kept_bits(ranks, count, torch.int16) == 0
        assert torch.equal(removed, lowest_per_row(scores, count))
        assert (removed.sum(dim=1) == count).all()
        assert not (before & ~removed).any()
        before = removed


def test_ranks_of_rows_too_wide_for_sixteen_bits() -> None:
    scores = torch.rand(2, 40_000)
    ranks = removal_ranks(scores)
    assert ranks.dtype == torch.int32
    assert torch.equal(kept_bits(ranks, 35_000, torch.int16) == 0, lowest_per_row(scores, 35_000))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_chain_every_rate_is_wanda_bit_for_bit(dtype: torch.dtype) -> None:
    block = Block(dtype)
    linears = dense_linears(block, batches(block, 4))
    fresh = new_chain((24, 16), 56, torch.Generator().manual_seed(0))  # as training begins: its `up` is zero
    linear = replace(linears["first"], chain=Chain(fresh.up.to(dtype), fresh.down.to(dtype)))
    for rate in RATES:
        target = Target("", exact(rate))
        wanda = WandaMethod(Wanda(name="wanda")).prune([linear.weight], [target], linear.norms)[0]
        assert torch.equal(linear.at(SEVEN, exact(rate)), wanda.weight)


# Chains


def test_one_elastic_linear_has_ten_rates() -> None:
    block = Block()
    linear = with_chain(dense_linears(block, batches(block, 4)))["first"]
    made = [linear.at(SEVEN, Fraction(rate, 100)) for rate in (5, 15, 25, 35, 43, 48, 52, 58, 63, 68, 85)]
    zeros = [int((weight == 0).sum()) for weight in made]
    assert zeros == [int(24 * 16 * Fraction(rate, 100)) for rate in (5, 15, 25, 35, 43, 48, 52, 58, 63, 68, 85)]


def test_training_computes_what_is_materialised() -> None:
    block = Block()
    given_batches = batches(block, 2)
    linears = with_chain(dense_linears(block, given_batches))
    for rate in (0.25, 0.5, 0.75):  # quarters of 16 and of 24 inputs: whole numbers, so both count alike
        unmerged = {}
        for name, linear in linears.items():
            kept = kept_bits(removal_ranks(linear.importance()), int(linear.weight.shape[1] * rate), torch.int32)
            unmerged[name] = masked_sum(linear.weight, linear.chain, linear.width(SEVEN, exact(rate)), kept)
        merged = weights_at(linears, SEVEN, rate, LANES)
        first, second = (output_with(block, given_batches[0], weights) for weights in (unmerged, merged))
        assert ((first - second).abs().max() / second.abs().max()) <= 1e-5
        for name, linear in linears.items():
            removed = removal_mask(wanda_scores(linear.weight, linear.norms), Target("", exact(rate)), "row")
            assert torch.equal(merged[name] == 0, removed)


@pytest.mark.parametrize("band", [0, 2, 6])
def test_a_bands_gradient_reaches_its_pair_and_those_below(band: int) -> None:
    block = Block()
    given_batches = batches(block, 1)
    generator = torch.Generator().manual_seed(0)
    training = Training(placed_in_lanes(block), dense_linears(block, given_batches), Epts(name="epts"), generator)
    for chain in training.chains.values():
        chain.up.normal_()
    training.accumulate([(band, SEVEN[band].upper)], [Sample([given_batches[0]] * 7, block(given_batches[0].hidden) + 1)])
    width = widths(SEVEN)[band]
    for chain in training.chains.values():
        up, down = chain.up.grad, chain.down.grad
        assert up is not None
        assert down is not None
        assert not up[:, width:].any()
        assert not down[width:].any()
        assert all(up[:, start : start + 8].any() for start in range(0, width, 8))
        assert all(down[start : start + 8].any() for start in range(0, width, 8))


@pytest.mark.parametrize(("power", "sizes"), [(0.5, [0.0, 1.0, 1.0]), (0.75, [0.0, 1.0, 10.0]), (1.0, [0.0, 1.0, 100.0])])
def test_the_lower_its_power_the_more_the_loss_minds_small_errors(power: float, sizes: list[float]) -> None:
    target, error, found = torch.randn(2, 5, 3), torch.randn(2, 5, 3), []
    for scale in (0.0, 0.01, 1.0):
        output = (target + scale * error).requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(output, target, power), output)
        found.append(gradient.norm())
    assert [float(each / found[1]) for each in found] == pytest.approx(sizes, rel=1e-4)


def test_the_gradient_of_a_masked_sum_is_that_of_plain_arithmetic() -> None:
    weight, chain = torch.randn(5, 7), Chain(torch.randn(5, 4), torch.randn(4, 7))
    removed, weighting = torch.rand(5, 7) < 0.4, torch.randn(5, 7)
    kept = removed.to(torch.int32) - 1
    found_weight, found_chain = gradients(weighting, chain, 3, kept)
    leaves = [weight.requires_grad_(), chain.up.requires_grad_(), chain.down.requires_grad_()]
    with torch.enable_grad():
        plain = (weight + chain.up[:, :3] @ chain.down[:3]) * ~removed
        expected = torch.autograd.grad((plain * weighting).sum(), leaves)
    torch.testing.assert_close(masked_sum(weight.detach(), chain, 3, kept), plain.detach())
    torch.testing.assert_close(found_weight, expected[0])
    torch.testing.assert_close(found_chain.up, expected[1][:, :3])
    torch.testing.assert_close(found_chain.down, expected[2][:3])


# The mixed stream


@pytest.mark.parametrize("bands", [SEVEN, THREE])
def test_the_shares_of_the_bands_add_up_to_one(bands: tuple[Band, ...]) -> None:
    assert sum((exact(band.weight) for band in bands), start=Fraction()) == 1


def test_of_a_model_that_nothing_is_removed_from_the_mixed_stream_is_the_dense_one() -> None:
    block = Block()
    given_batches = batches(block, 3)
    mixed = mix(
        placed_in_lanes(block), dense_linears(block, given_batches), SEVEN, dict.fromkeys(range(7), 0.0), given_batches
    )
    for batch, hidden in zip(given_batches, mixed, strict=True):
        torch.testing.assert_close(hidden, block(batch.hidden))


def test_the_mixed_stream_is_the_weighted_sum_of_the_bands_outputs() -> None:
    block = Block()
    given_batches = batches(block, 2)
    linears = with_chain(dense_linears(block, given_batches))
    rates = mixing_rates(SEVEN, torch.Generator().manual_seed(3))
    outputs = [output_with(block, given_batches[1], weights_at(linears, SEVEN, rate, LANES)) for rate in rates]
    expected = sum(band.weight * output for band, output in zip(SEVEN, outputs, strict=True))
    torch.testing.assert_close(
        mix(placed_in_lanes(block), linears, SEVEN, dict(enumerate(rates)), given_batches)[1], expected
    )


# Training and its safeguard


@pytest.mark.parametrize("train_base", [False, True])
def test_training_beats_masks_alone_on_data_it_has_not_seen(train_base: bool) -> None:
    block = Block()
    seen, unseen = batches(block, 16), batches(block, 4, seed=9)
    dense = dense_linears(block, seen)
    method = Epts(name="epts", epochs=12, train_base=train_base)
    placed, held_out = placed_in_lanes(block), with_targets(block, unseen)
    trained = reconstruct(placed, dense, samples(block, seen), method, torch.Generator().manual_seed(0))
    for rate in (0.5, 0.6, 0.7):
        after = error_at(placed, trained.linears, SEVEN, rate, held_out)
        assert after < 0.9 * error_at(placed, dense, SEVEN, rate, held_out)
    assert torch.equal(trained.linears["first"].weight, block.first.weight) is not train_base
    assert all(error is not None and error > 0 for error in trained.errors)


def test_a_lowest_pair_that_harms_is_left_out_and_the_low_rate_is_wanda_exactly() -> None:
    block = Block()
    given_batches = batches(block, 4)
    placed, given = placed_in_lanes(block), with_targets(block, given_batches)
    dense = dense_linears(block, given_batches)
    harmful = with_chain(dense)

    done = guarded(
        lambda _: Trained(harmful, []),
        dense,
        lambda linears: error_at(placed, linears, SEVEN, RATE, given),
        train_base=False,
    )
    assert done.fallbacks == (LOW_BAND_OFF,)
    for name, linear in done.linears.items():
        assert torch.equal(linear.at(SEVEN, exact(0.3)), dense[name].at(SEVEN, exact(0.3)))
        assert not torch.equal(linear.at(SEVEN, exact(0.6)), dense[name].at(SEVEN, exact(0.6)))  # others still inherit it


def test_weights_whose_training_harms_the_low_rate_are_frozen_and_told() -> None:
    block = Block()
    given_batches = batches(block, 4)
    placed, given = placed_in_lanes(block), with_targets(block, given_batches)
    dense = dense_linears(block, given_batches)
    spoilt = {name: replace(linear, weight=linear.weight * 3) for name, linear in dense.items()}
    asked: list[bool] = []

    def train(train_base: bool) -> Trained:
        asked.append(train_base)
        return Trained(spoilt if train_base else dense, [])

    done = guarded(train, dense, lambda linears: error_at(placed, linears, SEVEN, RATE, given), train_base=True)
    assert asked == [True, False]
    assert BASE_FROZEN in done.fallbacks
    assert done.errors["base_trained"] > done.errors["masked"]
