"""What an integration is: one class, in one file, that takes a finished model somewhere.

It runs in a process of its own, with the network and at most one secret of the tenant, and may take its time. It is called
again after it has failed, so it must find what an earlier try has left behind and go on from there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from app.accounts.secrets import SecretName
from app.settings import Settings
from secateur.recipes import ModelRecipe


class Options(BaseModel):
    """What a recipe may say beside an integration's name. A subclass gives every field a default or a description."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Wanted = TypeVar("Wanted", bound=Options)


@dataclass(frozen=True, slots=True)
class Product:
    """A job that has succeeded. `folder` holds its files, as a hub or `from_pretrained` wants them."""

    job_id: str
    repository: str
    recipe: ModelRecipe
    metrics: Mapping[str, Any]
    report: Mapping[str, Any]
    started_at: datetime
    finished_at: datetime
    folder: Path


class Integration(ABC, Generic[Wanted]):
    """A place where finished models are taken."""

    name: ClassVar[str]
    summary: ClassVar[str]
    secret: ClassVar[SecretName | None] = None
    """The tenant's secret that it is handed."""
    options: type[Wanted]

    def unavailable(self, settings: Settings) -> str | None:
        """Why it cannot be used in this installation; None if it can."""
        del settings
        return None

    @abstractmethod
    def deliver(self, product: Product, options: Wanted, settings: Settings, secret: str | None) -> str:
        """Take the model there, and return the address where a person finds it.

        Raises ProblemError: one whose kind is retryable is tried again on a schedule, any other ends it.
        """
