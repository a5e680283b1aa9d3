"""A page of a list."""

from __future__ import annotations

from typing import Generic, TypeVar

from pydantic import BaseModel, Field

Item = TypeVar("Item")


class Page(BaseModel, Generic[Item]):
    """Some items of a list, and where the next ones are."""

    data: list[Item]
    has_more: bool
    next_cursor: str | None = Field(description="Give it as `cursor` to get the next page; null on the last one.")
