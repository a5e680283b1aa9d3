"""Which family a checkpoint is of: a row of the table or, if it is in none, what its names and shapes show for certain.

Torch-free, so that a model is refused before its job is queued. Of a family that is not in the table nothing is guessed:
transformers has the architecture built in, the checkpoint has one list of as many blocks as its config counts, and every
matrix in them bears a name that a linear has in some family of the table. Whether such a model can be walked through block
by block shows in the run, before anything is pruned.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from importlib import resources
from typing import NoReturn

from secateur.problems import at
from secateur.pruning.families import FAMILIES, Family
from secateur.pruning.headers import ModelHeaders

_IN_A_LIST = re.compile(r"(.+?)\.(0|[1-9][0-9]{0,9})\.(.+)")
_NUMBER = re.compile(r"(?<=\.)[0-9]{1,9}(?=\.)")
_BUFFERS = (".bias", ".masked_bias", ".inv_freq")
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")


def _last_parts(names: Iterable[str]) -> frozenset[str]:
    return frozenset(name.rpartition(".")[2] for name in names)


# All but GPT-2's c_attn: some of those who have it store it transposed and some do not.
_LINEARS = _last_parts(name for row in FAMILIES.values() for name in (*row.linears, *row.optional)) - {"c_attn"}
_ROUTERS = _last_parts(name for row in FAMILIES.values() for name in row.dense)
_EMBEDDINGS = sorted({row.embedding for row in FAMILIES.values()})


def family_of(model: ModelHeaders) -> Family:
    """The family of a safetensors model, as its checkpoint has it. Raises ProblemError `unsupported_architecture` at
    /model/id."""
    family = FAMILIES.get(model.architecture)
    if family is None or family.model_type != model.config["model_type"]:
        return _discovered(model)
    return family if family.embedding in model.tensors else _bare(family, model)


def _bare(family: Family, model: ModelHeaders) -> Family:
    """The family as it is in a checkpoint that was saved from the base model, if this is one."""
    prefix = f"{family.base}."
    if family.embedding.removeprefix(prefix) not in model.tensors:
        return family
    return replace(
        family,
        bare=True,
        blocks=family.blocks.removeprefix(prefix),
        embedding=family.embedding.removeprefix(prefix),
        norm=family.norm and family.norm.removeprefix(prefix),
    )


@cache
def known_to_transformers() -> frozenset[tuple[str, str]]:
    """Architecture and model_type of each causal language model that transformers has built in."""
    text = resources.files("secateur.pruning").joinpath("data", "causal-lm-architectures.txt").read_text(encoding="utf-8")
    return frozenset((architecture, model_type) for architecture, model_type in map(str.split, text.splitlines()))


def _discovered(model: ModelHeaders) -> Family:
    model_type = str(model.config["model_type"])
    if (model.architecture, model_type) not in known_to_transformers():
        _refuse(model, "which is no causal language model that is built into transformers")
    count_key = next((key for key in _COUNTS if type(model.config.get(key)) is int), None)
    embedding = next((name for name in _EMBEDDINGS if name in model.tensors), None)
    if count_key is None or embedding is None:
        _refuse(model, "and neither in the table of families nor like those that are there")
    count = model.config[count_key]
    blocks, matrices = _block_list(model, count)
    known = _LINEARS | _ROUTERS
    if odd := next((matrix for matrix in matrices if not _last_parts([matrix]) <= known), None):
        _refuse(model, f"and in its blocks '{odd[:100]}' is no linear that is known")
    linears = [matrix for matrix in matrices if _last_parts([matrix]) <= _LINEARS]
    everywhere = [matrix for matrix in linears if "*" not in matrix and len(matrices[matrix]) == count]
    return Family(
        model.architecture,
        model_type,
        linears=tuple(everywhere),
        optional=tuple(matrix for matrix in linears if matrix not in everywhere),
        dense=tuple(matrix for matrix in matrices if matrix not in linears),
        norms=(),
        base=blocks.partition(".")[0],
        blocks=blocks,
        embedding=embedding,
        norm=None,
        tied="lm_head.weight" not in model.tensors,
        count=count_key,
        positions=next((key for key in _POSITIONS if key in model.config), None),
    )


def _block_list(model: ModelHeaders, count: int) -> tuple[str, dict[str, set[int]]]:
    """The one list of `count` blocks: its name, and for each matrix below a block (`*` counts experts) which have it."""
    lists: defaultdict[str, defaultdict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for name, tensor in model.tensors.items():
        found = _IN_A_LIST.fullmatch(name)
        if found and len(tensor.shape) > 1 and not name.endswith(_BUFFERS):
            blocks, index, inside = found.groups()
            of_linear = len(tensor.shape) == 2 and inside.endswith(".weight")
            matrix = inside.removesuffix(".weight") if of_linear else f"{inside} {list(tensor.shape)}"
            lists[blocks][_NUMBER.sub("*", matrix)].add(int(index))
    whole = {blocks: matrices for blocks, matrices in lists.items() if len(set().union(*matrices.values())) == count}
    if len(whole) != 1:
        _refuse(model, f"and it has {len(whole)} lists of {count} blocks where there is to be one")
    return next(iter(whole.items()))


def _refuse(model: ModelHeaders, why: str) -> NoReturn:
    raise at(
        "/model/id",
        "unsupported_architecture",
        f"The model is a {model.architecture[:100]} (model_type {str(model.config['model_type'])[:100]!r}), {why}.",
        hint=f"Supported are {', '.join(FAMILIES)}, and families with blocks like theirs.",
    )
