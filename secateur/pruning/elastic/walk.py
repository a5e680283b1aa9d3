"""The block loop of an elastic model: observe the dense block, train its chains, mix what the next block gets, write."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from secateur.problems import ProblemError
from secateur.pruning.checkpoint import DTYPES, Checkpoint, write_shard
from secateur.pruning.device import best_device
from secateur.pruning.elastic import safeguard
from secateur.pruning.elastic.artifact import linears_in, tensors_of
from secateur.pruning.elastic.bands import bands_of, streams_of
from secateur.pruning.elastic.linear import ElasticLinear, Linears
from secateur.pruning.elastic.mixer import mix, mixing_rates
from secateur.pruning.elastic.reconstruction import Sample, Trained, reconstruct, without_chain
from secateur.pruning.elastic.safeguard import Guarded, error_at, guarded
from secateur.pruning.events import Narrator
from secateur.pruning.facts import BlockFacts, BlockTraining
from secateur.pruning.families import Family
from secateur.pruning.linears import linears_of
from secateur.pruning.memory import give_back, keep_what_is_freed
from secateur.pruning.placed import Placed, turned
from secateur.pruning.randomness import generator_of
from secateur.pruning.resume import Attempt
from secateur.pruning.stages import Group, groups_of, run_dense
from secateur.pruning.statistics import Glimpse, glimpse, observe, observer
from secateur.pruning.streaming import PROBE_TOKENS, MicroBatch, StreamedModel, forward
from secateur.recipes import ElasticRecipe


def optimise_blocks(
    recipe: ElasticRecipe, source: Checkpoint, family: Family, *, tokens: Tensor, attempt: Attempt, narrator: Narrator
) -> float:
    """Train the blocks of `source` that `attempt` has not finished on `tokens`, (samples, sequence_length), and finish them.

    Returns the seconds from the first block's load to the last one's shard, with those of blocks taken over. Raises
    ProblemError `nonfinite_activation`, naming the block.
    """
    walk = _Walk(recipe, source, family, tokens)
    keep_what_is_freed(training=True)
    total, first = walk.model.count, len(attempt.finished)
    spent = sum(facts.seconds for facts in attempt.finished)
    narrator.progress(first, total)
    began = time.monotonic()
    walk.catch_up(attempt)
    for index in range(first, total):
        started = time.monotonic()
        done = walk.optimise(index)
        write_shard(attempt.shard(index), tensors_of(done.linears, walk.linears[index]))
        training = BlockTraining(done.band_errors, done.errors)
        attempt.finish(BlockFacts(index, seconds=time.monotonic() - started, fallbacks=done.fallbacks, training=training))
        if index + 1 < total:
            attempt.save(index + 1, walk.hidden)
        narrator.progress(index + 1, total)
    keep_what_is_freed()
    give_back()
    return spent + time.monotonic() - began


class _Walk:
    """The calibration set on its way through the blocks: as the dense model has it, and as it comes out of masked blocks, in
    one stream or in one for each group of bands. A micro-batch is one sequence."""

    def __init__(self, recipe: ElasticRecipe, source: Checkpoint, family: Family, tokens: Tensor) -> None:
        self._method, self._seed = recipe.method, recipe.calibration.seed
        self._bands, self._shared = bands_of(recipe.method), streams_of(recipe.method)
        self._device = best_device()
        self.linears = linears_of(source.headers, family)
        self.model = StreamedModel(source, family, DTYPES[recipe.output.dtype], self._device)
        self._dense = [self.model.enter(part) for part in torch.split(tokens, 1)]
        self._sparse = [[replace(batch) for batch in self._dense] for _ in self._shared]
        self._probe = self.model.enter(tokens[:1, :PROBE_TOKENS])
        self.model.release()
        give_back()

    @property
    def _batches(self) -> list[MicroBatch]:
        return [*self._dense, *chain.from_iterable(self._sparse)]

    @property
    def hidden(self) -> list[Tensor]:
        """All streams, (1, seq, hidden) each, the dense one first."""
        return [batch.hidden for batch in self._batches]

    def catch_up(self, attempt: Attempt) -> None:
        """Go where the first unfinished block begins: from the saved activations on, through blocks as they were written."""
        reached, hidden = attempt.restore(self.hidden)
        for batch, part in zip(self._batches, hidden, strict=True):
            batch.hidden = part
        for facts in attempt.finished[reached:]:
            low_band = safeguard.LOW_BAND_OFF not in facts.fallbacks
            with self._placed(facts.block) as placed, attempt.written(facts.block) as written:
                linears = linears_in(written, placed.linears, self._device, low_band=low_band)
                self._go_on(placed, linears)
                forward(placed.block, placed.index, self._dense, placed.lanes)

    def optimise(self, index: int) -> Guarded:
        """Train block `index` and carry both streams behind it."""
        with self._placed(index) as placed:
            # The authors' safeguard looks at the dense stream; a stream of low rates is nearer to what the band will meet.
            low = self._dense if self._method.streams == "mixed" else self._sparse[0]
            before = [replace(batch) for batch in low[: safeguard.SEQUENCES]]
            dense = self._observed(placed)  # from here on the dense stream is behind the block
            samples = self._samples()
            compared = [(batch, sample.target) for batch, sample in zip(before, samples, strict=False)]

            def train(train_base: bool) -> Trained:
                method = self._method.model_copy(update={"train_base": train_base})
                return reconstruct(placed, dense, samples, method, generator_of(self._seed, index, "training"))

            def error(linears: Linears) -> float:
                return error_at(placed, linears, self._bands, safeguard.RATE, compared)

            done = guarded(train, dense, error, train_base=self._method.train_base)
            if index + 1 < self.model.count:
                self._go_on(placed, done.linears)
        if not all(bool(part.isfinite().all()) for part in self.hidden):
            raise ProblemError("nonfinite_activation", f"Behind block {index}, an activation is not finite.")
        return done

    @contextmanager
    def _placed(self, index: int) -> Iterator[Placed]:
        with self.model.block(index) as block:
            yield Placed(block, index, self.linears[index], self.model.lanes)

    def _observed(self, placed: Placed) -> dict[str, ElasticLinear]:
        """The block's linears, masked by the norms of their inputs in the dense model; the dense stream is carried on."""
        groups = groups_of(placed.block, placed.index, [linear.module for linear in placed.linears], self._probe)
        weights = {
            linear.module: turned(linear, placed.block.get_submodule(linear.module).get_parameter("weight"))
            for linear in placed.linears
        }
        seen = {group: observer("norms", weights[group[0]].shape[1], self._device) for group in groups}

        def see(group: Group, glimpses: list[Glimpse]) -> None:
            observe(seen[group], glimpses)

        look = partial(glimpse, "norms")
        run_dense(
            placed.block, placed.index, self._dense, groups, look=look, observe=see, lanes=placed.lanes, propagate=True
        )
        norms = {name: seen[group].squares.sqrt().float() for group in groups for name in group}
        return without_chain(weights, norms)

    def _samples(self) -> list[Sample]:
        """The streams before a block, by band, and the dense stream behind it."""
        of_band = {band: stream for stream, bands in enumerate(self._shared) for band in bands}
        return [
            Sample([self._sparse[of_band[band]][i] for band in range(len(self._bands))], batch.hidden)
            for i, batch in enumerate(self._dense)
        ]

    def _go_on(self, placed: Placed, linears: Linears) -> None:
        """Carry the sparse streams behind the block."""
        rates = mixing_rates(self._bands, generator_of(self._seed, placed.index, "mixing"))
        for stream, bands in zip(self._sparse, self._shared, strict=True):
            outputs = mix(placed, linears, self._bands, {band: rates[band] for band in bands}, stream)
            for batch, hidden in zip(stream, outputs, strict=True):
                batch.hidden = hidden
