"""What a machine keeps of jobs long gone."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.settings import RetentionSettings, Settings
from workers.tidying import tidy

NOW = datetime(2026, 6, 1, tzinfo=UTC)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(state=tmp_path, retention=RetentionSettings(log_days=7, cache_days=30))


def aged(path: Path, days: float) -> Path:
    then = (NOW - timedelta(days=days)).timestamp()
    os.utime(path, (then, then))
    return path


def file(path: Path, days: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    return aged(path, days)


def test_old_logs_go(settings: Settings) -> None:
    logs = settings.state_folder / "logs"
    old, new = file(logs / "jobs" / "job_1-1.log", 8), file(logs / "integrations" / "job_2-0-1.log", 6)
    worker = file(logs / "worker.log", 100)  # that of a program that runs
    tidy(settings, at=NOW)
    assert (old.exists(), new.exists(), worker.exists()) == (False, True, True)


def test_models_and_results_that_nobody_has_used_for_long_go(settings: Settings) -> None:
    models = settings.cache_folder / "ten_1" / "hub" / "acme--tiny"
    for name in ("a" * 40, "b" * 40, "c" * 40 + ".partial"):
        file(models / name / "model.safetensors", 100)
    unused, used, partial = aged(models / ("a" * 40), 31), aged(models / ("b" * 40), 29), models / ("c" * 40 + ".partial")
    aged(partial, 31)
    texts = file(settings.cache_folder / "ten_1" / "huggingface" / "hub" / "text", 100)
    result = file(settings.cache_folder / "ten_1" / "perplexity" / "x.json", 31)
    tidy(settings, at=NOW)
    assert (unused.exists(), used.exists(), partial.exists(), result.exists()) == (False, True, False, False)
    assert (used / "model.safetensors").exists()
    assert texts.exists()
    assert not [path for path in models.iterdir() if path.name.startswith(".removed")]
