"""Which channels of attention's heads must be scaled alike. Torch-free.

A score is the product of a query and its key: s for a channel of the one and 1/s for that of the other cancel out. Positions
turn channels two by two, so both of a couple have one s; so have all query heads that a key head serves. Values are only
averaged: what divides a channel of a value head multiplies that of all outputs that the head serves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from secateur.pruning.induction.wiring import Attention, LatentAttention, Rotary

NOWHERE = -1
Places = tuple[int, ...]  # for each channel which scale is its, or NOWHERE
Rows = tuple[str, Places]  # of the linear of that name
Shapes = Mapping[str, tuple[int, ...]]  # of a block's tensors; of matrices (out_features, in_features)


class ImpossibleError(Exception):
    """A block does not allow a kind of pair; the message says why."""


@dataclass(frozen=True, slots=True)
class Heads:
    """`queries`, `keys`: how many; each key head has a value head. `size`: channels of a query or key; `value`: of a value.
    `shared`: the last channels of a key that all key heads have in common, and the only ones turned (latent attention)."""

    queries: int
    keys: int
    size: int
    value: int
    shared: int = 0

    def serving(self, keys: Sequence[Places]) -> list[Places]:
        """For each query head what its key head has."""
        return [keys[head * self.keys // self.queries] for head in range(self.queries)]


def said(config: Mapping[str, Any], key: str, otherwise: Any) -> Any:
    """What config.json says of `key`, in which dots lead inside; null is nothing."""
    found: Any = config
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return otherwise if found is None else found


def heads_of(attention: Attention | LatentAttention, config: Mapping[str, Any], shapes: Shapes) -> Heads:
    """Raises ImpossibleError if config.json does not count the heads, or counts others than the weights have."""
    queries = config.get(attention.heads)
    if type(queries) is not int or queries < 1:
        raise ImpossibleError(f"config.json does not say how many heads there are ('{attention.heads}')")
    value = shapes[f"{attention.o}.weight"][1] // queries
    if isinstance(attention, LatentAttention):
        shared = shapes[f"{attention.kv_a}.weight"][0] - shapes[f"{attention.kv_norm}.weight"][0]
        heads = Heads(queries, queries, shapes[f"{attention.kv_b}.weight"][0] // queries - value + shared, value, shared)
    else:
        rows = shapes[f"{attention.k}.weight"][0] // max(value, 1)
        heads = Heads(queries, (rows - queries) // 2 if attention.fused else rows, value, value)
    if min(heads.keys, heads.value, heads.size - heads.shared) < 1 or queries % heads.keys:
        raise ImpossibleError(f"the weights of attention do not divide into {queries} heads")
    return heads


def turned_places(rotary: Rotary | None, config: Mapping[str, Any], size: int) -> tuple[Places, int]:
    """For each of `size` channels of a head the place of its scale, and how many there are.

    Raises ImpossibleError if config.json turns a part of a head that cannot be.
    """
    if rotary is None or (rotary.off and said(config, rotary.off, False)):
        return tuple(range(size)), size
    turned = _turned(rotary, config, size)
    if type(turned) is not int or turned % 2 or not 0 <= turned <= size:
        raise ImpossibleError(f"config.json lets positions turn {str(turned)[:40]} of a head's {size} channels")
    half = turned // 2
    halves = rotary.layout == "halves" or (rotary.interleaved and not said(config, rotary.interleaved, True))
    couples = (*range(half), *range(half)) if halves else tuple(channel // 2 for channel in range(turned))
    return (*couples, *range(half, size - half)), size - half


def _turned(rotary: Rotary, config: Mapping[str, Any], size: int) -> Any:
    """How many channels of a head are turned, as config.json says it."""
    if rotary.count:
        count = config.get(rotary.count, int(rotary.otherwise))
        return size if count is None else count
    if rotary.share is None:
        return size
    parameters = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    share = said(config, f"{parameters}.partial_rotary_factor", said(config, rotary.share, rotary.otherwise))
    return int(size * share) if isinstance(share, int | float) and 0 <= share <= 1 else share


def score_places(heads: Heads, rotary: Rotary | None, config: Mapping[str, Any]) -> list[Places]:
    """The scales of each key head's channels: its own, but for what all have in common."""
    if not heads.shared:
        places, free = turned_places(rotary, config, heads.size)
        return [tuple(head * free + place for place in places) for head in range(heads.keys)]
    still = heads.size - heads.shared
    places, _ = turned_places(rotary, config, heads.shared)
    common = tuple(heads.keys * still + place for place in places)
    return [(*range(head * still, (head + 1) * still), *common) for head in range(heads.keys)]


def value_places(heads: Heads) -> list[Places]:
    """The scales of each value head's channels: each its own."""
    return [tuple(range(head * heads.value, (head + 1) * heads.value)) for head in range(heads.keys)]


def rows_of(
    attention: Attention | LatentAttention,
    heads: Heads,
    shapes: Shapes,
    *,
    queries: Sequence[Places] = (),
    keys: Sequence[Places] = (),
    values: Sequence[Places] = (),
) -> list[Rows]:
    """The linears that make these heads, and the places of all their rows: NOWHERE for those of other heads."""
    q = queries or [(NOWHERE,) * heads.size] * heads.queries
    k = keys or [(NOWHERE,) * heads.size] * heads.keys
    v = values or [(NOWHERE,) * heads.value] * heads.keys
    if isinstance(attention, LatentAttention):
        made = _latent_rows(attention, heads, shapes, (q, k, v))
    elif attention.fused == "stacked":
        made = [(attention.q, joined([*q, *k, *v]))]
    elif attention.fused == "by_head":
        served = heads.queries // heads.keys
        made = [(attention.q, joined(chain(*((*q[i * served : (i + 1) * served], k[i], v[i]) for i in range(heads.keys)))))]
    else:
        made = [(attention.q, joined(q)), (attention.k, joined(k)), (attention.v, joined(v))]
    return [(module, places) for module, places in made if set(places) != {NOWHERE}]


def _latent_rows(
    attention: LatentAttention, heads: Heads, shapes: Shapes, channels: tuple[Sequence[Places], ...]
) -> list[Rows]:
    q, k, v = channels
    still, latent = heads.size - heads.shared, shapes[f"{attention.kv_norm}.weight"][0]
    own = chain(*((key[:still], value) for key, value in zip(k, v, strict=True)))
    return [
        (attention.q if f"{attention.q}.weight" in shapes else attention.q_b, joined(q)),
        (attention.kv_a, ((NOWHERE,) * latent + k[0][still:])),
        (attention.kv_b, joined(own)),
    ]


def joined(heads: Iterable[Places]) -> Places:
    """The places of all `heads`, one behind the other."""
    return tuple(chain.from_iterable(heads))
