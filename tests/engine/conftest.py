"""Small random models of every family, made once a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from secateur.pruning import job
from secateur.pruning.datasets import read_text
from secateur.pruning.families import FAMILIES
from tests.tiny_models import make_family

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
        changes = {FAMILIES[architecture].count: layers, "tie_word_embeddings": tied}
        return make_family(tmp_path_factory.mktemp("model"), architecture, dtype=getattr(torch, dtype), **changes)

    return make


@pytest.fixture(scope="session")
def make_family_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """The small model of an architecture as `tiny_models.SMALL` has it, in float32; made once."""

    @cache
    def make(architecture: str) -> Path:
        return make_family(tmp_path_factory.mktemp("family"), architecture)

    return make


@pytest.fixture(scope="session")
def llama(make_model: MakeModel) -> Path:
    """A float32 Llama of three blocks with tied embeddings."""
    return make_model()


@pytest.fixture(autouse=True)
def _short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The beginning of each text: a megabyte of single-byte tokens would take most of the tests' time."""
    monkeypatch.setattr(job, "read_text", lambda *wanted: read_text(*wanted)[:40_000])
