"""What happened to a job, in order."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

EventType = Literal["status", "stage", "progress", "log"]
Level = Literal["info", "warning", "error"]


class Event(BaseModel):
    """One thing that happened. `data` holds the new `status` and the attempt, the new `stage`, or the progress."""

    model_config = ConfigDict(from_attributes=True)

    id: str
    object: Literal["event"] = "event"
    job_id: str
    seq: int = Field(description="Counts from 1 within a job, without gaps.")
    type: EventType
    level: Level
    message: str
    data: dict[str, Any]
    created_at: datetime


class EventList(BaseModel):
    """Some of a job's events, oldest first. The next ones come `after` the last `seq`."""

    data: list[Event]
    has_more: bool
