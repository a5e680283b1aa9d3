"""What a run will cost: exact where headers say so, in the right proportion where they do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from secateur.pruning.estimate import Estimate, estimate, measured_pace, pace_of, pruning_work, shape_of
from secateur.pruning.headers import ModelHeaders, Tensor, read_model
from secateur.recipes import PruneRecipe, read_recipe
from tests.api.models import write_model

EVALUATION = {"perplexity": {"sequence_length": 64, "max_windows": 8}}


@pytest.fixture
def model(tmp_path: Path) -> ModelHeaders:
    return read_model(write_model(tmp_path / "tiny"))


def wide(hidden: int, middle: int, blocks: int = 4, *, experts: int = 0) -> ModelHeaders:
    """A Llama (or, with experts, a Mixtral) of which there are only headers."""
    linears = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    if experts:
        moe = {"w1": (middle, hidden), "w3": (middle, hidden), "w2": (hidden, middle)}
        linears |= {f"block_sparse_moe.experts.{i}.{name}": shape for i in range(experts) for name, shape in moe.items()}
        linears["block_sparse_moe.gate"] = (experts, hidden)
    else:
        linears |= {"mlp.gate_proj": (middle, hidden), "mlp.up_proj": (middle, hidden), "mlp.down_proj": (hidden, middle)}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (1000, hidden),
        "lm_head.weight": (1000, hidden),
        "model.norm.weight": (hidden,),
    }
    for index in range(blocks):
        block = f"model.layers.{index}"
        shapes |= {f"{block}.{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{block}.{name}.weight": shape for name, shape in linears.items()}
    tensors = {name: Tensor("BF16", shape, "model.safetensors", 0, 0) for name, shape in shapes.items()}
    architecture, model_type = ("MixtralForCausalLM", "mixtral") if experts else ("LlamaForCausalLM", "llama")
    config = {
        "architectures": [architecture],
        "model_type": model_type,
        "num_hidden_layers": blocks,
        "max_position_embeddings": 4096,
        "num_experts_per_tok": 2,
        "num_local_experts": experts,
    }
    return ModelHeaders("safetensors", config, tensors)


def of(model: ModelHeaders, method: str = "wanda", **changes: Any) -> Estimate:
    return estimate(recipe(method, **changes), model, lanes=2)


def recipe(method: str = "wanda", **changes: Any) -> PruneRecipe:
    document = {
        "kind": "prune",
        "model": {"source": "local", "id": "m"},
        "method": {"name": method},
        "sparsity": {"target": 0.5},
        "calibration": {"samples": 16, "sequence_length": 1024},
    }
    found = read_recipe(document | changes)
    assert isinstance(found, PruneRecipe)
    return found


def test_what_the_headers_say_is_exact(model: ModelHeaders) -> None:
    told = of(model, evaluation=EVALUATION, calibration={"samples": 2, "sequence_length": 16})
    assert told.parameters == model.parameters
    assert told.pruned_parameters == 4 * 8 * 8 + 3 * 8 * 12
    assert (told.calibration_tokens, told.evaluation_tokens) == (32, 512)
    assert told.disk_bytes == 3 * 2 * model.parameters


def test_a_forward_has_two_operations_a_weight_and_token_and_its_attention() -> None:
    told = of(wide(512, 1024), "magnitude", evaluation={"perplexity": {"sequence_length": 256, "max_windows": 4}})
    tokens, weights = 1024, 4 * (4 * 512 * 512 + 3 * 512 * 1024)
    attention, head = 2 * 256 * 512 * 4, 2 * 512 * 1000
    assert told.operations == 2 * tokens * (2 * weights + attention + head)  # the dense model, and the pruned one


def test_methods_cost_what_they_do() -> None:
    costs = [of(wide(1024, 4096), method) for method in ("magnitude", "wanda", "sparsegpt", "alps")]
    assert [cost.work for cost in costs] == sorted(cost.work for cost in costs)
    assert costs[0].operations == 0
    assert costs[2].memory_bytes > costs[1].memory_bytes  # the Gram
    again = of(wide(1024, 4096), "wanda", propagate="block")
    assert again.operations == 2 * costs[1].operations
    assert of(wide(1024, 4096), "wanda", sparsity={"target": 0.5, "allocation": {"name": "owl"}}).work > costs[1].work


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
def test_depth_costs_time_and_no_memory(method: str) -> None:
    shallow, deep = of(wide(256, 512, 4), method), of(wide(256, 512, 16), method)
    assert deep.work == pytest.approx(4 * shallow.work)
    assert deep.memory_bytes == shallow.memory_bytes


def test_tokens_cost_time_and_memory() -> None:
    few, many = (of(wide(256, 512), calibration={"samples": n, "sequence_length": 1024}) for n in (64, 256))
    assert 3 < many.work / few.work < 4
    assert many.memory_bytes > few.memory_bytes


def test_an_expert_sees_its_share_of_the_tokens() -> None:
    dense, routed = of(wide(256, 512)), of(wide(256, 512, experts=8))
    assert routed.pruned_parameters > 5 * dense.pruned_parameters
    attention, mlp = 4 * 4 * 256 * 256, 4 * 3 * 256 * 512
    extra = 2 * routed.calibration_tokens * mlp  # two experts a token, where the dense model has one
    assert routed.operations == pytest.approx(dense.operations + extra)
    assert attention < mlp


def test_linears_with_one_input_have_one_gram() -> None:
    groups = [sorted(linear.module for linear in group) for group in shape_of(wide(64, 128, 1)).groups]
    assert sorted(groups) == [
        ["mlp.down_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
    ]


def test_an_evaluation_writes_nothing(model: ModelHeaders) -> None:
    asked = {"kind": "evaluate", "model": {"source": "local", "id": "m"}, "evaluation": EVALUATION}
    alone, with_pruning = estimate(read_recipe(asked), model), of(model, "magnitude", evaluation=EVALUATION)
    assert (alone.disk_bytes, alone.calibration_tokens) == (0, 0)
    assert 2 * alone.operations == with_pruning.operations


def test_a_gguf_file_is_guessed_and_says_so() -> None:
    told = of(ModelHeaders("gguf", {}, gguf_file="m.gguf", gguf_bytes=4_000_000_000))
    assert told.memory_bytes > 8e9
    assert told.pruned_parameters == pytest.approx(4e9, rel=0.01)
    assert "GGUF" in told.warnings[0]


def test_the_pace_that_a_run_had_gives_its_seconds_back() -> None:
    model, wanted = wide(512, 1024), recipe("sparsegpt", evaluation=EVALUATION)
    protocol = {"windows": 8, "sequence_length": 64}
    metrics = {"seconds": {"prune": 30.0, "evaluate": 10.0, "total": 60.0}, "perplexity": {"protocol": protocol}}
    pace = measured_pace(wanted, model, metrics)
    assert pace is not None
    evaluation = estimate(read_recipe({"kind": "evaluate", "model": wanted.model, "evaluation": EVALUATION}), model).work
    assert (pruning_work(wanted, shape_of(model)).total + evaluation) / pace == pytest.approx(40)
    assert measured_pace(wanted, model, {"seconds": {}, "perplexity": None}) is None


def test_a_pace_is_the_median_of_what_was_measured_or_a_default() -> None:
    assert pace_of([1.0, 100.0, 3.0], "cpu") == (3.0, True)
    assert pace_of([], "cpu") < pace_of([], "gpu")
    told = replace(of(wide(64, 128)), work=1e12, disk_bytes=0)
    low, high = told.seconds(1e10, spread=2)
    assert high == pytest.approx(4 * low)
    assert low < 100 < high
