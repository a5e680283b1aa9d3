"""Turns what pydantic says about a request into faults: where (a JSON pointer, RFC 6901) and what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from secateur.problems import Fault

_PLAIN = {
    "extra_forbidden": "this field is not known",
    "missing": "this is required",
    "model_attributes_type": "an object is expected here",
    "model_type": "an object is expected here",
}
_UNION_ERRORS = frozenset({"union_tag_invalid", "union_tag_not_found"})


def fault_of(error: Mapping[str, Any], body: Any, discriminator: str | None = None) -> Fault:
    """The fault of one entry of `ValidationError.errors()`; `body` is the type that the request's body is read as, and
    `discriminator` the field that tells its members apart if that is a union.

    Pointers into the body begin at its root; `/query/…`, `/header/…` and `/path/…` name a parameter.
    """
    place, *rest = error["loc"]
    if place != "body":
        return Fault(_join([place, *rest]), _message(error))
    keys = _without_tags(rest, body, discriminator)
    if error["type"] in _UNION_ERRORS:
        keys.append(error["ctx"]["discriminator"].strip("'"))
    return Fault(_join(keys), _message(error))


def _without_tags(location: Sequence[str | int], body: Any, root: str | None) -> list[str | int]:
    """The keys that lead through the body: pydantic puts the chosen member of a union between them, which is no key."""
    keys: list[str | int] = []
    here, discriminator = body, root
    for item in location:
        if discriminator is not None:
            here, discriminator = _member(here, discriminator, item), None
            continue
        keys.append(item)
        if isinstance(item, int):
            here, discriminator = _element(here)
            continue
        field = _fields(here).get(item)
        here = field.annotation if field else None
        discriminator = field.discriminator if field and isinstance(field.discriminator, str) else None
    return keys


def _element(of: Any) -> tuple[Any, str | None]:
    """The type of a list's elements, and the discriminator if that is a union."""
    element = next(iter(get_args(of)), None)
    if get_origin(element) is not Annotated:
        return element, None
    inner, *facts = get_args(element)
    found = (fact.discriminator for fact in facts if isinstance(fact, FieldInfo))
    return inner, next((name for name in found if isinstance(name, str)), None)


def _member(union: Any, discriminator: str, tag: str | int) -> Any:
    """The class of the union whose discriminator may be `tag`."""
    members = (member for member in get_args(union) if tag in get_args(_fields(member)[discriminator].annotation))
    return next(members, None)


def _fields(type_: Any) -> Mapping[str, FieldInfo]:
    return type_.model_fields if isinstance(type_, type) and issubclass(type_, BaseModel) else {}


def _message(error: Mapping[str, Any]) -> str:
    if error["type"] == "union_tag_invalid":
        return f"{error['ctx']['tag']!r} is not one of {error['ctx']['expected_tags']}"
    if error["type"] == "union_tag_not_found":
        return _PLAIN["missing"]
    message: str = _PLAIN.get(error["type"], error["msg"])
    return message[:1].lower() + message[1:]


def _join(keys: Sequence[str | int]) -> str:
    return "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in keys)
