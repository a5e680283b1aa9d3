"""Scales that cancel out, in every family: the model stays what it was, whatever they are, and what cannot be is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from secateur.pruning.discovery import family_of
from secateur.pruning.families import FAMILIES
from secateur.pruning.headers import read_model
from secateur.pruning.induction.folding import fold
from secateur.pruning.induction.pairs import Pair, Pairs, Side, pairs_of
from secateur.pruning.linears import linears_of
from secateur.pruning.masks import removal_mask
from secateur.pruning.methods.magnitude import magnitude_scores
from secateur.pruning.methods.wanda import wanda_scores
from tests.engine.conftest import MakeModel
from tests.targets import target
from tests.tiny_models import make_family

TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
# Blocks of the same family that are wired otherwise.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    ("FalconForCausalLM", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    ("FalconForCausalLM", {"alibi": False, "parallel_attn": False, "multi_query": False}),
    ("StableLmForCausalLM", {"use_parallel_residual": True, "use_qkv_bias": True}),
    ("Phi3ForCausalLM", {"partial_rotary_factor": 0.5}),
    ("GPT2LMHeadModel", {"activation_function": "relu"}),
    ("DeepseekV2ForCausalLM", {"q_lora_rank": None}),
    ("DeepseekV3ForCausalLM", {"rope_interleave": False}),
]


class Float64(TorchFunctionMode):
    """Whatever a model casts to float32 on its way, as norms do, is float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        wide = {torch.float32: torch.float64, torch.float: torch.float64}
        args = tuple(wide.get(each, each) if isinstance(each, torch.dtype) else each for each in args)
        named = {
            key: wide.get(each, each) if isinstance(each, torch.dtype) else each for key, each in (kwargs or {}).items()
        }
        return func(*args, **named)


def loaded(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def logits(folder: Path, dtype: torch.dtype) -> Tensor:
    model = loaded(folder, dtype)
    with torch.no_grad(), Float64() if dtype == torch.float64 else nullcontext():
        found: Tensor = model(TOKENS).logits
    return found


def difference(folder: Path, other: Path, dtype: torch.dtype) -> float:
    """The largest of the logits, relative to the largest logit."""
    before = logits(folder, dtype)
    assert float(before.std()) > 0.05, "a model without an opinion proves nothing"
    return float((logits(other, dtype) - before).abs().max() / before.abs().max())


def pairs_in(folder: Path) -> list[Pairs]:
    model = read_model(folder)
    return pairs_of(model, family_of(model))


def changed(
    folder: Path, into: Path, change: Callable[[int, dict[str, Tensor]], dict[str, Tensor]], dtype: torch.dtype
) -> Path:
    """The model of `folder`, cast, with the tensors of each block as `change` makes them, by their names below the block."""
    model = read_model(folder)
    family = family_of(model)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    for index in range(model.config[family.count]):
        prefix = f"{family.block_list}.{index}."
        inside = {
            family.parameter(name).removeprefix(prefix): name
            for name in tensors
            if family.parameter(name).startswith(prefix)
        }
        done = change(index, {short: tensors[name] for short, name in inside.items()})
        assert done.keys() == inside.keys()
        tensors |= {inside[short]: tensor for short, tensor in done.items()}
    shutil.copytree(folder, into, dirs_exist_ok=True)
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    return into


def scales_of(pairs: tuple[Pair, ...], seed: int = 2) -> dict[str, Tensor]:
    """Random ones in [0.25, 4]."""
    generator = torch.Generator().manual_seed(seed)
    return {
        pair.name: 4 ** torch.empty(pair.free, dtype=torch.float64).uniform_(-1, 1, generator=generator) for pair in pairs
    }


def folded(folder: Path, into: Path, dtype: torch.dtype, pairs: list[Pairs], *, shifted: bool = True) -> Path:
    """With random scales of every pair and, if `shifted`, random shifts of those that carry any."""

    def change(index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        allowed = pairs[index].allowed
        scales = scales_of(allowed)
        shifts = {pair.name: scales[pair.name].log() for pair in allowed if pair.shifts and shifted}
        done = fold(tensors, allowed, scales, shifts)
        for pair in allowed:
            for side in pair.sides:
                name = f"{side.module}.weight"
                assert not torch.equal(done[name], tensors[name]), name
        assert all(done[name].dtype == tensor.dtype and done[name].shape == tensor.shape for name, tensor in tensors.items())
        return done

    return changed(folder, into, change, dtype)


def assert_same_function(folder: Path, into: Path) -> None:
    pairs = pairs_in(folder)
    assert all(block.allowed for block in pairs)
    for dtype, most in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        assert difference(folder, folded(folder, into, dtype, pairs), dtype) <= most


@pytest.mark.parametrize("architecture", FAMILIES)
def test_scales_of_every_pair_leave_the_model_what_it_is(
    make_family_model: MakeModel, tmp_path: Path, architecture: str
) -> None:
    assert_same_function(make_family_model(architecture), tmp_path / "folded")


@pytest.mark.parametrize(("architecture", "changes"), VARIANTS)
def test_however_a_family_is_wired(tmp_path: Path, architecture: str, changes: dict[str, Any]) -> None:
    assert_same_function(make_family(tmp_path / "model", architecture, **changes), tmp_path / "folded")


def untied(pair: Pair, free: int, places: Callable[[Side], tuple[int, ...]]) -> Pair:
    return replace(pair, free=free, sides=tuple(replace(side, places=places(side)) for side in pair.sides))


def own(side: Side) -> tuple[int, ...]:
    return tuple(range(len(side.places)))


def of_key_head(side: Side) -> tuple[int, ...]:
    """Of four query heads with two key heads of eight channels."""
    return tuple(channel // 16 * 8 + channel % 8 for channel in range(32)) if side.module.endswith("q_proj") else own(side)


def in_halves(_: Side) -> tuple[int, ...]:
    """Of heads of eight channels of which four are turned: as families other than GPT-J turn them."""
    return tuple(8 * (channel // 8) + (channel % 8 % 2 if channel % 8 < 4 else channel % 8) for channel in range(32))


UNTIED = [
    ("LlamaForCausalLM", "q_k", (16, of_key_head)),
    ("Qwen3ForCausalLM", "q_k", (8, own)),
    ("GPTJForCausalLM", "q_k", (32, own)),
    ("GPTJForCausalLM", "q_k", (32, in_halves)),
    ("LlamaForCausalLM", "v_o", (32, own)),
]


@pytest.mark.parametrize(("architecture", "name", "places"), UNTIED)
def test_scales_that_are_not_tied_would_make_another_model(
    make_family_model: MakeModel,
    tmp_path: Path,
    architecture: str,
    name: str,
    places: tuple[int, Callable[[Side], tuple[int, ...]]],
) -> None:
    folder = make_family_model(architecture)
    found = [next(pair for pair in block.allowed if pair.name == name) for block in pairs_in(folder)]
    for apart in (False, True):
        pairs = [Pairs((untied(pair, *places) if apart else pair,), ()) for pair in found]
        done = folded(folder, tmp_path / "folded", torch.float32, pairs)
        assert (difference(folder, done, torch.float32) > 1e-3) is apart


GELU, POST, BOTH = "does not scale with its input", "norms are behind", "feeds attention and MLP alike"
REFUSED: dict[str, dict[str, str]] = {
    "Olmo2ForCausalLM": {"attn_in": POST, "mlp_in": POST},
    "FalconForCausalLM": {"mlp_in": BOTH, "fc1_fc2": GELU},
    "GPT2LMHeadModel": {"fc1_fc2": GELU},
    "GPTNeoXForCausalLM": {"fc1_fc2": GELU},
    "GPTJForCausalLM": {"mlp_in": BOTH, "fc1_fc2": GELU},
    "BloomForCausalLM": {"fc1_fc2": GELU},
    "MptForCausalLM": {"fc1_fc2": GELU},
}
ALL_SHIFTED = {"attn_in", "v_o", "mlp_in"}
SHIFTED = {
    "FalconForCausalLM": {"attn_in", "v_o"},
    "OPTForCausalLM": ALL_SHIFTED,
    "GPT2LMHeadModel": ALL_SHIFTED,
    "GPTNeoXForCausalLM": ALL_SHIFTED,
    "BloomForCausalLM": ALL_SHIFTED,
}
LATENT = {"q_b_in", "kv_b_in"}


def refusals(block: Pairs) -> dict[str, str]:
    return {refusal.kind: refusal.reason for refusal in block.refused}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_each_family_allows_what_it_can_and_says_why_not_the_rest(make_family_model: MakeModel, architecture: str) -> None:
    expected = REFUSED.get(architecture, {})
    for block in pairs_in(make_family_model(architecture)):
        told, kinds = refusals(block), {pair.kind for pair in block.allowed}
        assert told.keys() == expected.keys()
        assert all(reason in told[kind] for kind, reason in expected.items())
        assert not kinds & told.keys()
        last = "fc1_fc2" if "fc1_fc2" in kinds | told.keys() else "up_down"
        assert kinds | told.keys() == {"attn_in", "q_k", "v_o", "mlp_in", last} | (
            LATENT if "Deepseek" in architecture else set()
        )
        assert {pair.name for pair in block.allowed if pair.shifts} == SHIFTED.get(architecture, set())
        assert len({pair.name for pair in block.allowed}) == len(block.allowed)


def test_every_expert_has_a_pair_and_what_routes_is_scaled_with_them(make_family_model: MakeModel) -> None:
    block = pairs_in(make_family_model("Qwen2MoeForCausalLM"))[-1]
    experts = [f"mlp.experts.{expert}" for expert in range(4)]
    assert [pair.name for pair in block.allowed if pair.kind == "up_down"] == [
        f"{mlp}.up_down" for mlp in (*experts, "mlp.shared_expert")
    ]
    mlp_in = next(pair for pair in block.allowed if pair.name == "mlp_in")
    assert {side.module for side in mlp_in.consumers} == {
        "mlp.gate",
        "mlp.shared_expert_gate",
        *(f"{mlp}.{linear}" for mlp in (*experts, "mlp.shared_expert") for linear in ("gate_proj", "up_proj")),
    }


CONFIGS: list[tuple[str, dict[str, Any], dict[str, str]]] = [
    ("OPTForCausalLM", {"do_layer_norm_before": False}, {"attn_in": "residual stream", "mlp_in": "residual stream"}),
    ("OPTForCausalLM", {"activation_function": "gelu"}, {"fc1_fc2": "gelu"}),
    (
        "BloomForCausalLM",
        {"apply_residual_connection_post_layernorm": True},
        {"attn_in": "residual stream", "mlp_in": "residual stream", "fc1_fc2": GELU},
    ),
    ("MptForCausalLM", {"attn_config": {"clip_qkv": 8}}, {"q_k": "clipped", "v_o": "clipped", "fc1_fc2": GELU}),
    ("StableLmForCausalLM", {"qk_layernorm": True}, {"q_k": "norms of its own"}),
    ("StableLmForCausalLM", {"rope_parameters": {"partial_rotary_factor": 0.4}}, {"q_k": "turn 3 of a head's 8"}),
    ("StableLmForCausalLM", {"rope_parameters": {"partial_rotary_factor": "x"}}, {"q_k": "turn x of a head's 8"}),
    ("LlamaForCausalLM", {"num_attention_heads": None}, {"q_k": "how many heads", "v_o": "how many heads"}),
    ("LlamaForCausalLM", {"num_attention_heads": 64}, {"q_k": "64 heads", "v_o": "64 heads"}),
    ("LlamaForCausalLM", {"num_attention_heads": 3}, {"q_k": "another size", "v_o": "another size"}),
]


@pytest.mark.parametrize(("architecture", "config", "expected"), CONFIGS)
def test_a_config_that_rules_a_pair_out_is_named(
    make_family_model: MakeModel, architecture: str, config: dict[str, Any], expected: dict[str, str]
) -> None:
    model = read_model(make_family_model(architecture))
    changed_model = replace(model, config={**model.config, **config})
    for block in pairs_of(changed_model, family_of(model)):
        told = refusals(block)
        assert told.keys() == expected.keys()
        assert all(reason in told[kind] for kind, reason in expected.items())


@pytest.mark.parametrize("architecture", ["PhiForCausalLM", "LlamaForCausalLM"])
def test_of_a_family_that_is_not_known_nothing_is_scaled(make_family_model: MakeModel, architecture: str) -> None:
    model = read_model(make_family_model(architecture))
    family = replace(family_of(model), model_type="another")
    for block in pairs_of(model, family):
        assert not block.allowed
        assert refusals(block).keys() == {"attn_in", "q_k", "v_o", "mlp_in", "up_down"}
        assert all(f"how a block of {architecture} is wired is not known" in refusal.reason for refusal in block.refused)


def seen(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each linear in the blocks its weight and the norms of its inputs, in float64."""
    model, found = loaded(folder, torch.float64), {}

    def look(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found[name] = module.get_parameter("weight").detach(), args[0].flatten(0, -2).norm(dim=0)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda module, args, name=name: look(name, module, args))
    with torch.no_grad(), Float64():
        model(TOKENS)
    return found


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Phi3ForCausalLM", "OPTForCausalLM"])
def test_scales_change_what_magnitude_prunes_and_never_what_wanda_prunes(
    make_family_model: MakeModel, tmp_path: Path, architecture: str
) -> None:
    folder = make_family_model(architecture)
    before = seen(folder)
    after = seen(folded(folder, tmp_path / "folded", torch.float64, pairs_in(folder), shifted=False))
    for name, (weight, norms) in before.items():
        if "project_" in name:
            continue  # OPT's, outside the blocks
        changed_weight, changed_norms = after[name]

        def mask(scores: Tensor) -> Tensor:
            return removal_mask(scores, target(0.5), "row")

        assert torch.equal(mask(wanda_scores(weight, norms)), mask(wanda_scores(changed_weight, changed_norms))), name
        assert not torch.equal(mask(magnitude_scores(weight)), mask(magnitude_scores(changed_weight))), name


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_under_the_same_mask_the_scaled_model_is_still_the_same(
    make_family_model: MakeModel, tmp_path: Path, architecture: str
) -> None:
    folder = make_family_model(architecture)
    model = read_model(folder)
    modules = {f"{linear.module}.weight" for linear in linears_of(model, family_of(model))[0]}

    def masked(_: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(3)
        return {
            name: tensor * (torch.rand(tensor.shape, generator=generator) < 0.5) if name in modules else tensor
            for name, tensor in tensors.items()
        }

    scaled = folded(folder, tmp_path / "folded", torch.float64, pairs_in(folder), shifted=False)
    both = [changed(source, tmp_path / into, masked, torch.float64) for source, into in ((folder, "one"), (scaled, "other"))]
    assert difference(both[0], both[1], torch.float64) <= 1e-10
    assert difference(folder, both[0], torch.float64) > 0.1


def test_fewer_bits_are_rounded_once_and_the_rest_is_left_alone(make_family_model: MakeModel) -> None:
    """Two pairs that meet at a linear are multiplied before it is rounded, and what is given stays."""
    folder = make_family_model("LlamaForCausalLM")
    prefix, (block, *_) = "model.layers.0.", pairs_in(folder)
    tensors = {
        name.removeprefix(prefix): tensor.bfloat16()
        for name, tensor in load_file(folder / "model.safetensors").items()
        if name.startswith(prefix)
    }
    given = {name: tensor.clone() for name, tensor in tensors.items()}
    scales = {name: scale.float() for name, scale in scales_of(block.allowed).items()}
    done = fold(tensors, block.allowed, scales)
    wide = fold({name: tensor.float() for name, tensor in tensors.items()}, block.allowed, scales)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, given[name])
        assert torch.equal(done[name], wide[name].bfloat16())
    only = fold(tensors, block.allowed, {"v_o": scales["v_o"]})
    differs = {name for name, tensor in only.items() if not torch.equal(tensor, tensors[name])}
    assert differs == {"self_attn.v_proj.weight", "self_attn.o_proj.weight"}


def test_a_shift_that_a_pair_cannot_carry_is_an_error(make_family_model: MakeModel) -> None:
    (block, *_) = pairs_in(make_family_model("LlamaForCausalLM"))
    with pytest.raises(ValueError, match="the pair attn_in cannot carry a shift"):
        fold({}, block.allowed, {}, {"attn_in": torch.zeros(32)})
