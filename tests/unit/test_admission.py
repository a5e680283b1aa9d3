"""What is refused before a job is queued, and where the problem points."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from secateur.problems import ProblemError
from secateur.pruning.admission import check
from secateur.pruning.families import FAMILIES
from secateur.pruning.headers import ModelHeaders, Tensor
from secateur.recipes import PruneRecipe

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


def model(*, without: str | None = None, replaced: dict[str, Tensor] | None = None, **changes: Any) -> ModelHeaders:
    """A Llama of two blocks, 24 wide."""
    family = FAMILIES["LlamaForCausalLM"]
    inside = [(block, name) for block in ("model.layers.0", "model.layers.1") for name in (*family.linears, *family.norms)]
    matrices = [family.embedding, *(f"{block}.{name}.weight" for block, name in inside if name in family.linears)]
    vectors = ["model.norm.weight", *(f"{block}.{name}.weight" for block, name in inside if name in family.norms)]
    tensors = {name: Tensor("BF16", (24, 24), "model.safetensors", 0, 1152) for name in matrices}
    tensors |= {name: Tensor("BF16", (24,), "model.safetensors", 0, 48) for name in vectors}
    kept = {name: tensor for name, tensor in tensors.items() if name != without}
    return ModelHeaders("safetensors", CONFIG | changes, kept | (replaced or {}))


def recipe(**changes: Any) -> PruneRecipe:
    return PruneRecipe.model_validate(
        {
            "kind": "prune",
            "model": {"source": "local", "id": "tiny"},
            "method": {"name": "wanda"},
            "sparsity": {"target": 0.5},
            "calibration": {"samples": 8, "sequence_length": 512},
        }
        | changes
    )


def test_what_fits_is_let_through() -> None:
    check(recipe(), model())
    check(recipe(sparsity={"pattern": "5:24"}), model())
    check(recipe(evaluation={"perplexity": {"dataset": "sotu-sample", "sequence_length": 1024}}), model())


@pytest.mark.parametrize(
    ("changes", "code", "pointer"),
    [
        ({"sparsity": {"pattern": "2:5"}}, "pattern_does_not_divide", "/sparsity/pattern"),
        ({"calibration": {"samples": 1, "sequence_length": 1025}}, "sequence_too_long", "/calibration/sequence_length"),
        (
            {"evaluation": {"perplexity": {"sequence_length": 2048}}},
            "sequence_too_long",
            "/evaluation/perplexity/sequence_length",
        ),
        ({"calibration": {"samples": 4096, "sequence_length": 512}}, "calibration_text_too_short", "/calibration/samples"),
        ({"calibration": {"dataset": "sotu-sample", "samples": 1}}, "dataset_unavailable", "/calibration/dataset"),
    ],
)
def test_a_recipe_that_does_not_fit_is_pointed_at(changes: dict[str, Any], code: str, pointer: str) -> None:
    with pytest.raises(ProblemError) as caught:
        check(recipe(**changes), model())
    assert caught.value.code == code
    assert [fault.pointer for fault in caught.value.faults] == [pointer]


def test_a_pattern_that_does_not_divide_names_the_linear() -> None:
    odd = {"model.layers.1.mlp.down_proj.weight": Tensor("BF16", (24, 30), "model.safetensors", 0, 1440)}
    with pytest.raises(ProblemError, match=r"model\.layers\.1\.mlp\.down_proj\.weight.* 30 inputs"):
        check(recipe(sparsity={"pattern": "2:4"}), model(replaced=odd))


def test_magnitude_asks_nothing_of_the_calibration_text() -> None:
    endless = {"samples": 4096, "sequence_length": 32768}
    check(recipe(method={"name": "magnitude"}, calibration=endless), model())


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["MambaForCausalLM"], "model_type": "mamba"},
        {"model_type": "mamba"},
        {"architectures": ["MambaLlamaForCausalLM"], "model_type": "mamballama"},
        {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "num_hidden_layers": 3},
        {"architectures": ["LlamaForSequenceClassification"], "model_type": "mamba"},
    ],
    ids=["another architecture", "one that the config does not mean", "no architecture", "another count", "another task"],
)
def test_an_unknown_architecture_is_named_beside_the_known(changes: dict[str, Any]) -> None:
    mixer = {"model.layers.0.mixer.x_proj.weight": Tensor("BF16", (24, 24), "model.safetensors", 0, 1152)}
    with pytest.raises(ProblemError, match="mamba") as caught:
        check(recipe(), model(replaced=mixer, **changes))
    assert caught.value.code == "unsupported_architecture"
    assert caught.value.hint is not None
    assert "Qwen2ForCausalLM" in caught.value.hint
    assert [fault.pointer for fault in caught.value.faults] == ["/model/id"]


def test_a_quantised_model_is_refused() -> None:
    with pytest.raises(ProblemError) as caught:
        check(recipe(), model(quantization_config={"quant_method": "awq"}))
    assert caught.value.code == "model_quantized"


@pytest.mark.parametrize(
    "broken",
    [
        model(without="model.layers.1.self_attn.k_proj.weight"),
        model(without="model.embed_tokens.weight"),
        model(without="model.norm.weight"),
        model(without="model.layers.1.input_layernorm.weight"),
        model(tie_word_embeddings=False),
        model(num_hidden_layers=2**30),
        model(replaced={"model.layers.0.mlp.up_proj.weight": Tensor("I8", (24, 24), "model.safetensors", 0, 576)}),
        model(replaced={"model.layers.0.mlp.up_proj.weight": Tensor("BF16", (24,), "model.safetensors", 0, 48)}),
    ],
    ids=[
        "a linear missing",
        "no embedding",
        "no last norm",
        "a norm missing",
        "no head",
        "a billion blocks",
        "integers",
        "a vector",
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused(broken: ModelHeaders) -> None:
    with pytest.raises(ProblemError) as caught:
        check(recipe(), broken)
    assert caught.value.code == "model_file_corrupt"


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 0},
        {"num_hidden_layers": "2"},
        {"num_hidden_layers": True},
        {"max_position_embeddings": 2**80},
        {"max_position_embeddings": None},
    ],
)
def test_a_config_without_what_its_family_needs_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ProblemError, match=next(iter(change))) as caught:
        check(recipe(), model(**change))
    assert caught.value.code == "model_config_invalid"


def test_a_matrix_that_the_family_does_not_have_is_refused() -> None:
    """It would be left as it is, and nobody would know."""
    more = {"model.layers.1.mlp.other_proj.weight": Tensor("BF16", (24, 24), "model.safetensors", 0, 1152)}
    with pytest.raises(ProblemError, match=r"layers\.1\.mlp\.other_proj.*LlamaForCausalLM") as caught:
        check(recipe(), model(replaced=more))
    assert caught.value.code == "model_file_corrupt"


@pytest.mark.parametrize("block", ["2", "5", "00", "-1", "x", "1e0", "9" * 30])
def test_blocks_that_the_config_does_not_count_are_refused(block: str) -> None:
    beyond = {f"model.layers.{block}.self_attn.q_proj.weight": Tensor("BF16", (24, 24), "model.safetensors", 0, 1152)}
    with pytest.raises(ProblemError, match=f"layers.{block}") as caught:
        check(recipe(), model(replaced=beyond))
    assert caught.value.code == "model_config_invalid"


def test_a_gguf_model_is_judged_by_its_texts_alone() -> None:
    gguf = ModelHeaders("gguf", {}, gguf_file="model.gguf")
    check(recipe(sparsity={"pattern": "2:5"}), gguf)
    with pytest.raises(ProblemError):
        check(recipe(calibration={"samples": 4096, "sequence_length": 512}), gguf)


def test_the_page_about_families_lists_those_of_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    assert re.findall(r"^\| `(\w+)`", page, re.MULTILINE)[1:] == list(FAMILIES)


@pytest.mark.parametrize("lost", ["experts.1.w2", "experts.0.w1"])
def test_an_expert_that_lacks_a_matrix_is_refused(lost: str) -> None:
    family = FAMILIES["MixtralForCausalLM"]
    experts = [f"block_sparse_moe.experts.{expert}.{name}" for expert in range(2) for name in ("w1", "w2", "w3")]
    named = [*family.linears, "block_sparse_moe.gate", *(name for name in experts if not name.endswith(lost))]
    blocks = {f"model.layers.{block}.{name}.weight": (24, 24) for block in range(2) for name in named}
    norms = {f"model.layers.{block}.{name}.weight": (24,) for block in range(2) for name in family.norms}
    shapes = blocks | norms | {family.embedding: (24, 24), "model.norm.weight": (24,)}
    tensors = {name: Tensor("BF16", shape, "model.safetensors", 0, 0) for name, shape in shapes.items()}
    config = CONFIG | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    with pytest.raises(ProblemError, match="Expert") as caught:
        check(recipe(), ModelHeaders("safetensors", config, tensors))
    assert caught.value.code == "model_file_corrupt"


def test_a_family_that_is_in_no_table_is_taken_if_its_blocks_are_like_theirs() -> None:
    check(recipe(), model(architectures=["GraniteForCausalLM"], model_type="granite"))


@pytest.mark.parametrize(
    ("tensor", "told"),
    [
        ("model.layers.0.mixer.x_proj.weight", "mixer.x_proj"),
        ("model.layers.1.mlp.experts.gate_up_proj", "experts.gate_up_proj"),
        ("vision.layers.1.mlp.up_proj.weight", "2 lists"),
    ],
)
def test_what_is_not_known_of_a_family_in_no_table_is_named(tensor: str, told: str) -> None:
    more = {tensor: Tensor("BF16", (24, 24), "model.safetensors", 0, 1152)}
    more |= {tensor.replace(".1.", ".0."): more[tensor]}
    with pytest.raises(ProblemError, match=told) as caught:
        check(recipe(), model(replaced=more, architectures=["GraniteForCausalLM"], model_type="granite"))
    assert caught.value.code == "unsupported_architecture"
