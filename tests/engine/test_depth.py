"""Memory does not grow with a model's depth."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.memory import generate, rise


def test_a_model_five_times_as_deep_needs_no_more_memory(tmp_path: Path) -> None:
    shallow = generate(tmp_path / "shallow", layers=5, hidden=512, middle=1536)
    deep = generate(tmp_path / "deep", layers=25, hidden=512, middle=1536)
    needs = [
        rise(tmp_path / name, tmp_path / f"{name}-scratch", samples=4, length=64)["bytes"] for name in ("shallow", "deep")
    ]
    assert deep - shallow > 0.25 * needs[0]  # so that a model that is held would show
    assert needs[1] == pytest.approx(needs[0], rel=0.1)
