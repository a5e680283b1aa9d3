"""The integrations that there are, and a recipe's wishes checked against them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from app.integrations.hub_push import HubPush
from app.integrations.mlflow import MlflowLog
from app.integrations.protocol import Integration
from app.settings import Settings
from secateur.problems import Fault, ProblemError, at
from secateur.recipes import Integration as Wish
from secateur.recipes import ModelRecipe, Recipe

INTEGRATIONS: Mapping[str, Integration[Any]] = {one.name: one for one in (MlflowLog(), HubPush())}


def settle(recipe: Recipe, settings: Settings) -> Recipe:
    """The recipe with the installation's integrations if it names none, and with the defaults of all their options; one that
    writes no model as it is.

    Raises `validation_error` for an unknown integration or option, `integration_unavailable` for one not to be used here.
    """
    if not isinstance(recipe, ModelRecipe):
        return recipe
    wishes = recipe.integrations
    if wishes is None:
        if not settings.integrations.default:
            return recipe
        wishes = [Wish.model_validate(wish) for wish in settings.integrations.default]
    settled = [_settled(index, wish, settings) for index, wish in enumerate(wishes)]
    return recipe.model_copy(update={"integrations": settled})


def _settled(index: int, wish: Wish, settings: Settings) -> Wish:
    integration = INTEGRATIONS.get(wish.name)
    if integration is None:
        known = ", ".join(sorted(INTEGRATIONS))
        raise at(f"/integrations/{index}/name", "validation_error", f"{wish.name!r} is not one of {known}")
    if (reason := integration.unavailable(settings)) is not None:
        raise at(f"/integrations/{index}/name", "integration_unavailable", f"{wish.name} cannot be used: {reason}")
    try:
        options = integration.options.model_validate(wish.options)
    except ValidationError as error:
        faults = [
            Fault("/".join((f"/integrations/{index}", *map(str, entry["loc"]))), entry["msg"]) for entry in error.errors()
        ]
        raise ProblemError("validation_error", f"{faults[0].pointer}: {faults[0].detail}", faults=faults) from None
    return Wish.model_validate({"name": wish.name, **options.model_dump(mode="json")})
