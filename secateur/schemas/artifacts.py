"""The files that a job made."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Artifact(BaseModel):
    """One file; its bytes are at `/v1/artifacts/{id}/content`."""

    model_config = ConfigDict(from_attributes=True)

    id: str
    object: Literal["artifact"] = "artifact"
    job_id: str
    name: str = Field(description="Path inside the model's folder.", examples=["model.safetensors"])
    size: int = Field(description="Bytes.")
    sha256: str
    created_at: datetime
    lost_at: datetime | None = Field(default=None, description="When its bytes were found missing, if they were.")


class ArtifactList(BaseModel):
    """All files of one job, by name."""

    data: list[Artifact]
