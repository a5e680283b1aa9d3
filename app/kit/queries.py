"""Query parameters: one that a route does not know is an error and not ignored, for a misspelt filter shows too much."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import Request
from fastapi.dependencies.models import Dependant
from pydantic import AfterValidator, AwareDatetime

from secateur.problems import Fault, ProblemError

METADATA_KEY = re.compile(r"metadata\[(.+)\]", re.DOTALL)
METADATA_PARAMETER: dict[str, Any] = {
    "name": "metadata",
    "in": "query",
    "style": "deepObject",
    "explode": True,
    "description": "`metadata[key]=value`: only jobs with this value; several must all be there.",
    "schema": {"type": "object", "additionalProperties": {"type": "string"}},
}


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("in UTC it lies before the year 1 or after 9999") from None


# A time with its zone, as UTC: an end of the calendar may lie beyond it in another zone.
Moment = Annotated[AwareDatetime, AfterValidator(_in_utc)]


async def refuse_unknown_parameters(request: Request) -> None:
    """A dependency of every route. Raises `validation_error` at `/query/{name}`."""
    route = request.scope["route"]
    known = set(_names(route.dependant))
    takes_metadata = METADATA_PARAMETER in (route.openapi_extra or {}).get("parameters", [])
    unknown = [
        name for name in request.query_params if name not in known and not (takes_metadata and METADATA_KEY.fullmatch(name))
    ]
    if unknown:
        faults = [Fault(f"/query/{name}", f"there is no such parameter; there are {sorted(known)}") for name in unknown]
        raise ProblemError("validation_error", f"{faults[0].pointer}: {faults[0].detail}", faults=faults)


def _names(dependant: Dependant) -> Iterator[str]:
    yield from (parameter.alias for parameter in dependant.query_params)
    for inner in dependant.dependencies:
        yield from _names(inner)
