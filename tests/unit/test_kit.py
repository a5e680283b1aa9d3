"""The small parts of the service: ids, cursors, and what a database can keep."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.kit.db import storable
from app.kit.ids import new_id
from app.kit.keyring import load_keyring
from app.kit.logs import redact
from app.kit.pagination import Position, read_cursor, write_cursor
from secateur.problems import ProblemError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def test_ids_are_distinct_and_sort_by_the_time_they_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for milliseconds in (0, 1, 31, 32, 10**12, 2**48 - 1):
        monkeypatch.setattr("time.time_ns", lambda milliseconds=milliseconds: milliseconds * 1_000_000)
        made.append(new_id("job"))
    assert made == sorted(made)
    assert {len(id_) for id_ in made} == {30}
    monkeypatch.setattr("time.time_ns", lambda: 0)
    assert len({new_id("job") for _ in range(1000)}) == 1000


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(
    st.datetimes(datetime(1970, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001 (bounds are naive)
    st.text(st.characters(categories=["L", "N"]), min_size=1),
)
def test_a_cursor_is_read_as_it_was_written(tmp_path: Path, moment: datetime, id_: str) -> None:
    keyring = load_keyring(tmp_path / "keyring.json")
    assert read_cursor(write_cursor(Position(moment, id_), keyring), keyring) == Position(moment, id_)


def test_a_cursor_that_was_changed_is_refused(tmp_path: Path) -> None:
    keyring = load_keyring(tmp_path / "keyring.json")
    cursor = write_cursor(Position(datetime(2026, 1, 1, tzinfo=UTC), "job_1"), keyring)
    for place in range(len(cursor)):
        changed = cursor[:place] + chr(ord(cursor[place]) ^ 1) + cursor[place + 1 :]
        with pytest.raises(ProblemError):
            read_cursor(changed, keyring)


@given(JSON)
def test_what_is_storable_is_plain_json_without_nul(value: object) -> None:
    text = json.dumps(storable(value), ensure_ascii=False, allow_nan=False)
    assert "\\u0000" not in text.replace("\\\\", "")
    text.encode()
    assert storable(storable(value)) == storable(value)


def test_what_is_storable_already_stays_as_it_is() -> None:
    value = {"a": [1, 2.5, None, True, "é\n\\u0000"], "b": {"c": ""}}
    assert storable(value) == value


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("hub_token", "abc", "[hidden]"),
        ("Authorization", "Bearer abc", "[hidden]"),
        ("event", "asked with hf_Abc1 and sct_Abc2", "asked with [hidden] and [hidden]"),
        ("url", "redis://:pass@host/0", "redis://[hidden]@host/0"),
        ("event", "header Bearer abc", "header [hidden]"),
        ("path", "/v1/jobs/job_1", "/v1/jobs/job_1"),
        ("status", 200, 200),
    ],
)
def test_secrets_are_hidden_in_log_lines(key: str, value: object, shown: object) -> None:
    assert redact(None, "info", {key: value}) == {key: shown}
