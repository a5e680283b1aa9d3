"""Verification finds what it is there to find: each kind of damage to the written file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.problems import ProblemError
from secateur.pruning.discovery import family_of
from secateur.pruning.verify import verify
from tests.engine.runs import checkpoint, prune, recipe

LINEAR = "model.layers.1.mlp.up_proj.weight"
Damage = Callable[[dict[str, Tensor]], None]


def set_value(name: str, zero: bool, value: float) -> Damage:
    """Overwrite the first weight of `name` that is, or is not, zero."""

    def damage(weights: dict[str, Tensor]) -> None:
        flat = weights[name].view(-1)
        flat[int((flat == 0).eq(zero).nonzero()[0])] = value

    return damage


def drop(weights: dict[str, Tensor]) -> None:
    del weights["model.norm.weight"]


def cast(weights: dict[str, Tensor]) -> None:
    weights[LINEAR] = weights[LINEAR].bfloat16()


def reshape(weights: dict[str, Tensor]) -> None:
    weights[LINEAR] = weights[LINEAR].T.contiguous()


def shuffle_groups(weights: dict[str, Tensor]) -> None:
    """As many zeros as before, all at the beginning of the first row."""
    weights[LINEAR][0] = weights[LINEAR][0].sort(descending=True).values


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        pytest.param(set_value(LINEAR, zero=True, value=0.5), "zeros where", id="a zero filled"),
        pytest.param(set_value(LINEAR, zero=True, value=-0.0), "negative zero", id="a negative zero"),
        pytest.param(set_value(LINEAR, zero=False, value=float("nan")), "not finite", id="a NaN"),
        pytest.param(set_value("model.norm.weight", zero=False, value=0.5), "not to be touched", id="a norm changed"),
        pytest.param(set_value("model.embed_tokens.weight", zero=False, value=0.5), "not to be touched", id="an embedding"),
        pytest.param(drop, "same tensors", id="a tensor lost"),
        pytest.param(cast, "BF16", id="another dtype"),
        pytest.param(reshape, r"\(32, 64\)", id="another shape"),
        pytest.param(shuffle_groups, "group of 4 with fewer than 2 zeros", id="zeros in the wrong places"),
    ],
)
def test_damage_is_found(llama: Path, tmp_path: Path, damage: Damage, told: str) -> None:
    wanted = recipe("magnitude", "2:4")
    result = prune(wanted, llama, tmp_path)
    removed = {linear["name"]: linear["removed"] for block in result.report["blocks"] for linear in block["linears"]}
    file = tmp_path / "output" / "model.safetensors"
    with checkpoint(llama) as source:
        assert verify(tmp_path / "output", source, family_of(source.headers), removed, wanted).sparsity == 0.5
        weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
        damage(weights)
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(ProblemError, match=told) as caught:
            verify(tmp_path / "output", source, family_of(source.headers), removed, wanted)
    assert caught.value.code == "verification_failed"


def test_negative_zeros_of_the_source_are_not_passed_on(llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in llama.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    weights = {name: tensor.clone() for name, tensor in load_file(source / "model.safetensors").items()}
    weights[LINEAR][:, :20] = -0.0
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    result = prune(recipe("wanda"), source, tmp_path)
    pruned = load_file(tmp_path / "output" / "model.safetensors")[LINEAR]
    assert not bool((torch.signbit(pruned) & (pruned == 0)).any())
    facts = [linear for linear in result.report["blocks"][1]["linears"] if linear["name"] == LINEAR]
    assert (facts[0]["removed"], facts[0]["zeros"]) == (64 * 16, 64 * 20)  # 20 zeros a row were there, 16 were to go
