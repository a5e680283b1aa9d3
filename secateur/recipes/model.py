"""Which model a job takes."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from secateur.recipes.part import Part

# A hub repository's name: no '--' and no '..', neither '-' nor '.' at an end (huggingface_hub's own rule).
RepositoryName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]([.\-]?[A-Za-z0-9_])*$", max_length=96)]


_MODEL_ID = r"^([A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)*|models:/[A-Za-z0-9][\w.\-]*(/[1-9][0-9]*|@[A-Za-z][\w\-]*))$"


class Model(Part):
    """A job's model: a folder under the models root (`local`), a repository of the hub (`hub`), a version in the registry of
    the installation's MLflow server (`mlflow`), or what an earlier job made (`artifact`)."""

    source: Literal["local", "hub", "mlflow", "artifact"]
    id: Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=_MODEL_ID)] = Field(
        description="A folder below the models root; `owner/name`; `models:/name/version` or `models:/name@alias`; the id "
        "of a job that made a model, or that model's `repository`.",
        examples=["smollm2-135m"],
    )
    revision: Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=r"^[\w.\-/]+$")] | None = Field(
        default=None,
        description="Hub: a branch, tag or commit, resolved to a commit when the job is accepted. Artifact: the job that "
        "made it, by default the repository's newest. MLflow: filled in.",
    )

    @model_validator(mode="after")
    def _fits_its_source(self) -> Self:
        if self.source == "local" and self.revision is not None:
            raise PydanticCustomError("model_revision", "a local model has no revision; leave it out")
        if self.source == "artifact" and "/" not in self.id and self.revision is not None:
            raise PydanticCustomError("model_revision", "a model that is named by its job has no revision; leave it out")
        if (self.source == "mlflow") != self.id.startswith("models:/"):
            raise PydanticCustomError("model_id", "a model of mlflow, and no other, is 'models:/name/version'")
        return self


def shortened(model: Model, suffix: str) -> str:
    """The model's name with `suffix`, such as `smollm2-135m-wanda-50`, short enough for a repository."""
    # `models:/smollm2/3` is called by its name, and so is `models:/smollm2@champion`.
    last = re.sub(r"^models:/([^/@]+).*", r"\1", model.id).rsplit("/", 1)[-1]
    base = re.sub(r"[.\-]{2,}", "-", last)
    return base[: 96 - len(suffix)].rstrip("-.") + suffix
