"""Small random models of every family, made once a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from secateur.pruning import job
from secateur.pruning.datasets import read_text
from secateur.pruning.families import FAMILIES
from tests.tiny_models import byte_tokenizer

MakeModel = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """The models are so small that a second thread only costs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Make a folder with a model of an architecture; the same arguments give the same weights."""

    def make(architecture: str = "LlamaForCausalLM", *, dtype: str = "float32", tied: bool = True, layers: int = 3) -> Path:
        torch.manual_seed(0)
        tokenizer = byte_tokenizer()
        config = AutoConfig.for_model(
            FAMILIES[architecture].model_type,
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=128,
            tie_word_embeddings=tied,
            bos_token_id=256,
            eos_token_id=256,
            pad_token_id=None,
        )
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.data.mul_(8)  # large enough that blocks, and so what is pruned in them, matter
        folder = tmp_path_factory.mktemp("model")
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def llama(make_model: MakeModel) -> Path:
    """A float32 Llama of three blocks with tied embeddings."""
    return make_model()


@pytest.fixture(autouse=True)
def _short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The beginning of each text: a megabyte of single-byte tokens would take most of the tests' time."""
    monkeypatch.setattr(job, "read_text", lambda *wanted: read_text(*wanted)[:40_000])
