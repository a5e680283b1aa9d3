"""Which weights of a block can be scaled against each other so that its function stays; which not, and why. Torch-free.

The scaling is the one of equation 3 of arXiv 2602.21652: columns of a linear times s, its input by s. Which weights take the
division is not in the paper: these are ours. A pair is exact whatever its scales: to what a scale is tied is part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from secateur.pruning.families import FAMILIES, Family, block_count
from secateur.pruning.headers import ModelHeaders
from secateur.pruning.induction.heads import (
    NOWHERE,
    ImpossibleError,
    Places,
    Rows,
    Shapes,
    heads_of,
    joined,
    rows_of,
    said,
    score_places,
    value_places,
)
from secateur.pruning.induction.wiring import WIRINGS, Attention, Kind, LatentAttention, Wiring

Axis = Literal["columns", "rows", "gain"]
# What takes the norm before an MLP with a gate, or experts: their first linears, the router, the share of a shared expert.
_TAKE_NORM = frozenset({"gate_proj", "up_proj", "gate_up_proj", "gate", "shared_expert_gate"})


@dataclass(frozen=True, slots=True)
class Side:
    """Where the scales of a pair meet a module: the `columns` (inputs) or `rows` (outputs, with their bias) of a linear, or
    the `gain` of a norm (with its bias), which is `added` + its weight.

    `places`: for each of them, which of the pair's scales is its, or NOWHERE. `inverse`: it is divided, not multiplied.
    `transposed`: the weight is stored (in_features, out_features).
    """

    module: str
    axis: Axis
    places: Places
    inverse: bool = False
    transposed: bool = False
    added: float = 0.0


@dataclass(frozen=True, slots=True)
class Pair:
    """Weights that scales s > 0 can be moved between. `free`: how many scales there are, those that are tied counted once.

    `name` is unique in the block: the kind, behind the module that holds both if there may be several of its kind.
    `shifts`: whether it can carry a shift of the consumers' input too.
    """

    kind: Kind
    name: str
    free: int
    sides: tuple[Side, ...]
    shifts: bool = False

    @property
    def consumers(self) -> tuple[Side, ...]:
        """Those whose columns are multiplied; q_k has none."""
        return tuple(side for side in self.sides if side.axis == "columns")


@dataclass(frozen=True, slots=True)
class Refusal:
    """A kind of pair that a block does not allow, and why."""

    kind: Kind
    reason: str


@dataclass(frozen=True, slots=True)
class Pairs:
    """Of one block."""

    allowed: tuple[Pair, ...]
    refused: tuple[Refusal, ...]


def pairs_of(model: ModelHeaders, family: Family) -> list[Pairs]:
    """The pairs of each block. Those of a family that is not in the table are all refused.

    Raises ProblemError `model_config_invalid` if config.json does not count the blocks.
    """
    count, listed = block_count(model, family), FAMILIES.get(model.architecture)
    wiring = WIRINGS[listed.architecture] if listed and listed.model_type == family.model_type else None
    if wiring is None:
        reason = f"how a block of {model.architecture[:100]} is wired is not known, only which linears it has"
        kinds: tuple[Kind, ...] = ("attn_in", "mlp_in", "v_o", "up_down", "q_k")
        return [Pairs((), tuple(Refusal(kind, reason) for kind in kinds))] * count
    alike: dict[tuple[tuple[str, tuple[int, ...]], ...], Pairs] = {}
    found = []
    for shapes in _shapes(model, family, count):
        key = tuple(shapes.items())
        if key not in alike:
            alike[key] = _Block(wiring, model.config, shapes, transposed=family.transposed).pairs()
        found.append(alike[key])
    return found


def _shapes(model: ModelHeaders, family: Family, count: int) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of each block's tensors, by what the block that runs calls them, in the order of their names."""
    blocks: list[dict[str, tuple[int, ...]]] = [{} for _ in range(count)]
    prefix = f"{family.block_list}."
    for name in sorted(model.tensors):
        index, _, inside = family.parameter(name).removeprefix(prefix).partition(".")
        if family.parameter(name).startswith(prefix) and index.isdecimal() and int(index) < count:
            shape = model.tensors[name].shape
            blocks[int(index)][inside] = shape[::-1] if family.transposed and len(shape) == 2 else shape
    return blocks


class _Block:
    """A block of some `shapes`, whose biases are among them."""

    def __init__(self, wiring: Wiring, config: Mapping[str, Any], shapes: Shapes, *, transposed: bool) -> None:
        self._wiring, self._config, self._shapes, self._transposed = wiring, config, shapes, transposed

    def pairs(self) -> Pairs:
        """Every kind, allowed or refused."""
        ways: dict[Kind, Callable[[], list[Pair]]] = {
            "attn_in": self._attn_in,
            "q_k": self._q_k,
            "v_o": self._v_o,
            "mlp_in": self._mlp_in,
        }
        ways |= {"fc1_fc2": self._fc1_fc2} if self._wiring.mlp else {"up_down": self._up_down}
        if isinstance(self._wiring.attention, LatentAttention):
            ways |= {"q_b_in": self._q_b_in, "kv_b_in": self._kv_b_in}
        allowed: list[Pair] = []
        refused: list[Refusal] = []
        for kind, way in ways.items():
            try:
                self._require_no_ruling(kind)
                allowed += way()
            except ImpossibleError as error:
                refused.append(Refusal(kind, str(error)))
        return Pairs(tuple(allowed), tuple(refused))

    def _require_no_ruling(self, kind: Kind) -> None:
        for ruling in self._wiring.rulings:
            if kind in ruling.kinds and bool(said(self._config, ruling.key, ruling.otherwise)) is ruling.value:
                raise ImpossibleError(ruling.reason)

    def _attn_in(self) -> list[Pair]:
        norm, mlp_norm = self._norms()
        return [self._norm_to("attn_in", norm, self._attention_takes() + ([] if mlp_norm else self._mlp_takes()))]

    def _mlp_in(self) -> list[Pair]:
        norm, mlp_norm = self._norms()
        if mlp_norm is None:
            raise ImpossibleError(f"'{norm}' feeds attention and MLP alike: attn_in scales the inputs of both")
        return [self._norm_to("mlp_in", mlp_norm, self._mlp_takes())]

    def _norms(self) -> tuple[str, str | None]:
        """The norm before attention and, if it is another, the one before the MLP."""
        if self._wiring.norms is None:
            raise ImpossibleError("norms are behind attention and MLP: what these take is the residual stream itself")
        before, between = (next(filter(self._is_there, names), None) for names in self._wiring.norms)
        if before is None:
            raise ImpossibleError("there is no norm before attention")
        return before, between

    def _attention_takes(self) -> list[str]:
        attention = self._wiring.attention
        if isinstance(attention, Attention):
            return list(dict.fromkeys((attention.q, attention.k, attention.v)))
        return [linear for linear in (attention.q, attention.q_a, attention.kv_a) if self._is_there(linear)]

    def _mlp_takes(self) -> list[str]:
        """The MLP's first linears, also those of each expert, and what chooses and weighs experts."""
        if self._wiring.mlp:
            return [self._wiring.mlp.fc1]
        weights = [name.split(".") for name, shape in self._shapes.items() if len(shape) == 2]
        return [".".join(parts[:-1]) for parts in weights if parts[-1] == "weight" and parts[-2] in _TAKE_NORM]

    def _q_b_in(self) -> list[Pair]:
        attention = self._latent()
        if not self._is_there(attention.q_b):
            raise ImpossibleError("queries come from one linear, and no norm is inside")
        return [self._norm_to("q_b_in", attention.q_norm, [attention.q_b])]

    def _kv_b_in(self) -> list[Pair]:
        return [self._norm_to("kv_b_in", self._latent().kv_norm, [self._latent().kv_b])]

    def _latent(self) -> LatentAttention:
        assert isinstance(self._wiring.attention, LatentAttention)  # noqa: S101 - for the type checker: `pairs` knows
        return self._wiring.attention

    def _norm_to(self, kind: Kind, norm: str, linears: Sequence[str]) -> Pair:
        places = _each(self._shapes[f"{norm}.weight"][0])
        columns = [self._side("columns", (linear, places)) for linear in linears]
        gain = self._side("gain", (norm, places), inverse=True)
        return Pair(kind, kind, len(places), (gain, *columns), shifts=self._have_biases(norm, *linears))

    def _up_down(self) -> list[Pair]:
        """Of the block's MLP and of each expert. Never of the gate: an activation comes behind it."""
        found = []
        for name in self._shapes:
            mlp, is_down, _ = name.rpartition(".down_proj.weight")
            if is_down:
                places = _each(self._shapes[name][1])
                up = f"{mlp}.up_proj", places
                if not self._is_there(up[0]):
                    up = f"{mlp}.gate_up_proj", (NOWHERE,) * len(places) + places
                found.append(self._linears("up_down", f"{mlp}.up_down", up, (f"{mlp}.down_proj", places)))
        return found

    def _fc1_fc2(self) -> list[Pair]:
        mlp = self._wiring.mlp
        assert mlp is not None  # noqa: S101 - for the type checker: `pairs` knows
        activation = said(self._config, mlp.activation, mlp.otherwise) if mlp.activation else mlp.otherwise
        if activation != "relu":
            raise ImpossibleError(
                f"between them is {str(activation)[:40]}, which does not scale with its input as relu does"
            )
        places = _each(self._shapes[f"{mlp.fc2}.weight"][1])
        return [self._linears("fc1_fc2", "fc1_fc2", (mlp.fc1, places), (mlp.fc2, places))]

    def _v_o(self) -> list[Pair]:
        """Can carry a shift: attention adds up to one, so that what shifts every value shifts the output as much."""
        attention = self._wiring.attention
        heads = heads_of(attention, self._config, self._shapes)
        values = value_places(heads)
        (rows,) = rows_of(attention, heads, self._shapes, values=values)
        outputs = attention.o, joined(heads.serving(values))
        return [self._linears("v_o", "v_o", rows, outputs, shifts=self._have_biases(rows[0], attention.o))]

    def _linears(self, kind: Kind, name: str, rows: Rows, columns: Rows, *, shifts: bool = False) -> Pair:
        sides = (self._side("rows", rows, inverse=True), self._side("columns", columns))
        return Pair(kind, name, max(columns[1]) + 1, sides, shifts)

    def _q_k(self) -> list[Pair]:
        attention = self._wiring.attention
        heads = heads_of(attention, self._config, self._shapes)
        keys = score_places(heads, self._wiring.rotary, self._config)
        queries = heads.serving(keys)
        if isinstance(attention, Attention) and attention.norms:
            return [self._q_k_norms(attention.norms, queries, keys)]
        made = [self._side("rows", rows) for rows in rows_of(attention, heads, self._shapes, queries=queries)]
        made += [self._side("rows", rows, inverse=True) for rows in rows_of(attention, heads, self._shapes, keys=keys)]
        return [Pair("q_k", "q_k", 1 + max(map(max, keys)), tuple(made))]

    def _q_k_norms(self, norms: tuple[str, str], queries: Sequence[Places], keys: Sequence[Places]) -> Pair:
        """Norms undo what scales the rows before them: their gains take it, one for all heads if they are a head wide."""
        of_a_head = self._shapes[f"{norms[1]}.weight"][0] == len(keys[0])
        q, k = (keys[0], keys[0]) if of_a_head else (joined(queries), joined(keys))
        sides = self._side("gain", (norms[0], q)), self._side("gain", (norms[1], k), inverse=True)
        return Pair("q_k", "q_k", max(k) + 1, sides)

    def _side(self, axis: Axis, where: Rows, *, inverse: bool = False) -> Side:
        module, places = where
        if self._shapes[f"{module}.weight"][1 if axis == "columns" else 0] != len(places):
            raise ImpossibleError(f"'{module}' is of another size than the config and the linears around it tell")
        if axis == "gain":
            return Side(module, axis, places, inverse, added=self._wiring.gain)
        return Side(module, axis, places, inverse, transposed=self._transposed)

    def _is_there(self, module: str) -> bool:
        return f"{module}.weight" in self._shapes

    def _have_biases(self, *modules: str) -> bool:
        return all(f"{module}.bias" in self._shapes for module in modules)


@cache
def _each(count: int) -> Places:
    """Each channel has a scale of its own."""
    return tuple(range(count))
