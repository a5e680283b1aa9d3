"""Settings come from the environment, which also holds things that are not theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from app.settings import Settings


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SECATEUR_STATE", "SECATEUR_DATABASE_URL", "SECATEUR_BROKER_URL", "SECATEUR_STORE_URL"):
        monkeypatch.delenv(name, raising=False)


def test_everything_lies_in_the_state_folder_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_STATE", str(tmp_path))
    settings = Settings()
    assert settings.database_url == f"sqlite+aiosqlite:///{tmp_path}/secateur.sqlite"
    assert settings.store_url == f"file://{tmp_path}/artifacts"
    assert settings.models_root == tmp_path / "models"


def test_each_part_can_be_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_DATABASE_URL", "postgresql+psycopg://host/secateur")
    monkeypatch.setenv("SECATEUR_WORKER_LEASE_SECONDS", "7.5")
    monkeypatch.setenv("SECATEUR_WORKER_QUEUES", '["cpu"]')
    settings = Settings()
    assert settings.database_url == "postgresql+psycopg://host/secateur"
    assert (settings.worker.lease_seconds, settings.worker.queues) == (7.5, ("cpu",))


def test_variables_of_the_client_are_none_of_the_services(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_API_KEY", "sct_secret")
    monkeypatch.setenv("SECATEUR_URL", "http://127.0.0.1:8000")
    assert Settings().http.max_body_bytes == 1_000_000


def test_value_that_is_wrong_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_DATABASE_PORT", "p4ssw0rd")
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert "p4ssw0rd" not in str(caught.value)
    assert "port" in str(caught.value)
