"""A causal language model of which one block at a time is in memory.

The model is built without weights (`skeleton.py`). Embeddings and head stay; a block's weights come when it is entered and
go when it is left. What a block is called with is recorded once per micro-batch, verbatim, by running the model's own
forward over blocks that only take notes: no code here knows what an architecture passes to its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.problems import ProblemError
from secateur.pruning.checkpoint import Checkpoint
from secateur.pruning.explain import is_out_of_memory
from secateur.pruning.families import Family
from secateur.pruning.lanes import Lanes, lanes
from secateur.pruning.linears import linears_of, widths_of
from secateur.pruning.memory import TRAINING_TOKENS, batch_tokens
from secateur.pruning.products import use_fast_products
from secateur.pruning.quiet import quiet_transformers
from secateur.pruning.skeleton import without_weights

PROBE_TOKENS = 8  # of a sequence that shows which linears get the same input


@dataclass(slots=True)
class MicroBatch:
    """Some sequences on their way through the blocks.

    `hidden`: what the next block takes, (batch, seq, hidden). `calls`: for each block the arguments beside it.
    """

    tokens: Tensor
    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]


class StreamedModel:
    """See the module. `checkpoint` and `family` say what the weights are called; `dtype` is that of every computation."""

    def __init__(self, checkpoint: Checkpoint, family: Family, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint, self._family, self._dtype, self.device = checkpoint, family, dtype, device
        self._tensors = {family.parameter(name): name for name in checkpoint.headers.tensors}
        self.model = without_weights(checkpoint, dtype, device)
        use_fast_products(self.model)
        self._decoder = self.model.get_submodule(family.block_list.rpartition(".")[0])
        self._blocks: list[nn.Module] = list(self.model.get_submodule(family.block_list).children())
        self.count = len(self._blocks)
        self.lanes = lanes(device)
        self._widths = widths_of(linears_of(checkpoint.headers, family))
        inside = f"{family.block_list}."
        self._outside = {name: empty for name, empty in self.model.state_dict().items() if not name.startswith(inside)}
        self._origins = self._load_outside_blocks()
        self._held = True
        self._find_what_blocks_return()

    def _load_outside_blocks(self) -> dict[str, str]:
        """Load embeddings, norm and head; for each, the name of the tensor that it is, which another may be tied to."""
        weights = {name: self._read(self._checkpoint, name) for name in self._outside if name in self._tensors}
        _assign(self.model, weights, strict=False)
        with quiet_transformers():  # a head of its own beside a config that ties is loaded as from_pretrained loads it
            self.model.tie_weights(missing_keys=self._outside.keys() - weights.keys())
        state = self.model.state_dict()
        if missing := next((name for name in self._outside if state[name].is_meta), None):
            raise ProblemError("model_file_corrupt", f"The tensor '{missing}' is missing, which the model needs.")
        places = {tensor.data_ptr(): name for name, tensor in weights.items()}
        return {name: places[state[name].data_ptr()] for name in self._outside}

    def _hold(self) -> None:
        """Load again what `release` let go."""
        if not self._held:
            loaded = {origin: self._read(self._checkpoint, origin) for origin in set(self._origins.values())}
            _assign(self.model, {name: loaded[origin] for name, origin in self._origins.items()}, strict=False)
            self._held = True

    def release(self) -> None:
        """Let go of embeddings and head until they are needed again. Between the first block and the last nothing does."""
        _assign(self.model, self._outside, strict=False)
        self._held = False

    def _read(self, checkpoint: Checkpoint, parameter: str) -> Tensor:
        return checkpoint.read(self._tensors[parameter], self._dtype, self.device)

    def batches(self, tokens: Tensor, *, step: int | None = None) -> list[MicroBatch]:
        """`tokens`, (sequences, seq), in micro-batches before the first block, at least one for each lane if it can be.

        `step`: the blocks are trained on so many sequences at a time. How they are grouped changes what is learned, so the
        memory that happens to be free has no say then.
        """
        most = TRAINING_TOKENS if step else batch_tokens(*self._widths, self._dtype, self.device)
        size = max(1, min(most // tokens.shape[1], -(-(step or len(tokens)) // self.lanes.count)))
        return self._entered(torch.split(tokens, size))

    def _entered(self, parts: Iterable[Tensor]) -> list[MicroBatch]:
        """A micro-batch of each of `parts`; what they are called with alike they have together."""
        batches: list[MicroBatch] = []
        for part in parts:
            batch = self.enter(part)
            if batches:
                batch.calls = shared(batch.calls, batches[-1].calls)
            batches.append(batch)
        return batches

    def halved(self, batches: list[MicroBatch]) -> list[MicroBatch]:
        """The same sequences in the same place, in micro-batches of half the size; those of one sequence stay."""
        size = max((len(batch.tokens) + 1) // 2 for batch in batches)
        parts = [part for batch in batches for part in torch.split(batch.tokens, size)]
        hidden = [part for batch in batches for part in torch.split(batch.hidden, size)]
        halves = self._entered(parts)
        for half, part in zip(halves, hidden, strict=True):
            half.hidden = part.clone()
        return halves

    def within_memory(
        self, batches: list[MicroBatch], work: Callable[[list[MicroBatch]], None], again: Callable[[int], None]
    ) -> list[MicroBatch]:
        """Do `work` on `batches`; if memory runs out, on micro-batches of half the size, and so on. Those are returned.

        `again` is told, before each further try, how many tokens were too many; it lets go of what was made so far.
        """
        while True:
            try:
                work(batches)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or all(len(batch.tokens) == 1 for batch in batches):
                    raise
            else:
                return batches
            again(max(batch.tokens.numel() for batch in batches))
            batches = self.halved(batches)
            self.release()

    def enter(self, tokens: Tensor) -> MicroBatch:
        """Embed `tokens`, (batch, seq), and note down what every block would be called with."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        first: list[Tensor] = []

        def note(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            first.append(hidden)
            calls.append((args, kwargs))
            return hidden

        self._forward_over(note, tokens)
        return MicroBatch(tokens, first[0], calls)

    def leave(self, batch: MicroBatch) -> Tensor:
        """What the model makes of `batch.hidden` after the last block, before the head: (batch, seq, hidden)."""
        return self._forward_over(lambda *_, **__: batch.hidden, batch.tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        """What the model makes of `hidden`, (rows, hidden), in its head, caps and scales included: (rows, vocabulary)."""
        self._hold()
        tokens = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        with _standing_in([self._decoder], lambda *_, **__: self._output(last_hidden_state=hidden.unsqueeze(0))):
            logits: Tensor = self.model(input_ids=tokens, use_cache=False, return_dict=True).logits
        return logits[0]  # (rows, vocabulary)

    def _find_what_blocks_return(self) -> None:
        """A tensor, or a tuple whose first is the tensor: the model's own forward over stand-ins shows what it expects."""
        tokens, refusal = torch.zeros(1, 2, dtype=torch.int64), "it changes what goes from block to block"
        for self._in_tuple in (False, True):
            passed: list[Any] = []

            def note(hidden: Any, *_: Any, passed: list[Any] = passed, **__: Any) -> Any:
                passed.append(hidden)
                return hidden

            try:
                last = self._forward_over(note, tokens)
            except Exception as error:  # any error may be that of a tuple where a tensor is expected
                refusal = f"{type(error).__name__}: {error}"
                continue
            if last.shape[:2] == tokens.shape and all(hidden is passed[0] for hidden in passed):
                return
        raise ProblemError("unsupported_architecture", f"This model cannot be walked through block by block: {refusal}.")

    def _forward_over(self, stand_in: Callable[..., Tensor], tokens: Tensor) -> Tensor:
        self._hold()
        with _standing_in(self._blocks, _returning_tuples(stand_in) if self._in_tuple else stand_in):
            output = self._decoder(input_ids=tokens.to(self.device), use_cache=False, return_dict=True)
        self._output = type(output)
        hidden: Tensor = output.last_hidden_state
        return hidden

    @contextmanager
    def block(self, index: int, written: Checkpoint | None = None) -> Iterator[nn.Module]:
        """Block `index` with its weights, which go when the context is left; of `written` if it is given.

        The weights of the next block are read ahead meanwhile.
        """
        block, checkpoint = self._blocks[index], written or self._checkpoint
        prefix, empty = f"{self._family.block_list}.{index}.", block.state_dict()
        if missing := next((name for name in empty if prefix + name not in self._tensors), None):
            raise ProblemError("model_file_corrupt", f"The tensor '{prefix}{missing}' is missing, which the model needs.")
        _assign(block, {name: self._read(checkpoint, prefix + name) for name in empty}, strict=True)
        following = f"{self._family.block(index + 1)}."
        checkpoint.prefetch(name for name in checkpoint.headers.tensors if name.startswith(following))
        try:
            yield block
        finally:
            block.load_state_dict(empty, assign=True)


@contextmanager
def _standing_in(modules: list[nn.Module], stand_in: Callable[..., Any]) -> Iterator[None]:
    """`modules` with `stand_in` for their forward; afterwards they are as before, and none refers to itself."""
    before = [vars(module).get("forward") for module in modules]
    for module in modules:
        module.forward = stand_in
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            if own is None:
                del module.forward
            else:
                module.forward = own


def _returning_tuples(stand_in: Callable[..., Tensor]) -> Callable[..., tuple[Tensor]]:
    return lambda *args, **kwargs: (stand_in(*args, **kwargs),)


def forward(block: nn.Module, index: int, batches: list[MicroBatch], lanes: Lanes) -> None:
    """Carry `batches` through the block: all of them or, if anything fails, none."""
    outputs = lanes.map(partial(run_block, block, index), batches)
    for batch, output in zip(batches, outputs, strict=True):
        batch.hidden = output


def run_block(block: nn.Module, index: int, batch: MicroBatch) -> Tensor:
    """The block's output for `batch`, (batch, seq, hidden)."""
    args, kwargs = batch.calls[index]
    output = block(batch.hidden, *args, **kwargs)
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def shared(calls: Any, earlier: Any) -> Any:
    """`calls` with the tensors of `earlier`, another micro-batch's, where they are equal: masks are large, and all alike."""
    known: dict[int, Tensor] = {}

    def share(value: Any, other: Any) -> Any:
        if isinstance(value, Tensor) and isinstance(other, Tensor):
            if id(value) not in known:
                same = value.dtype == other.dtype and torch.equal(value, other)
                known[id(value)] = other if same else value
            return known[id(value)]
        if isinstance(value, list | tuple) and type(value) is type(other) and len(value) == len(other):
            return type(value)(map(share, value, other))
        if isinstance(value, dict) and isinstance(other, dict) and value.keys() == other.keys():
            return {key: share(item, other[key]) for key, item in value.items()}
        return value

    return share(calls, earlier)


def _assign(module: nn.Module, weights: dict[str, Tensor], *, strict: bool) -> None:
    try:
        module.load_state_dict(weights, strict=strict, assign=True)
    except RuntimeError as error:
        raise ProblemError(
            "model_file_corrupt", f"The weights do not fit the model that config.json describes: {error}"
        ) from error
    module.requires_grad_(False)
