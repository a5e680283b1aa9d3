"""The published contract: it is that of the code, and it is whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from app.kit.errors import MEDIA_TYPE
from app.openapi import FILE, document


def test_the_committed_contract_is_that_of_the_code() -> None:
    assert FILE.read_text() == document(), "openapi.json has drifted: `python -m app.openapi` writes it"


def test_every_reference_leads_somewhere() -> None:
    contract = json.loads(document())

    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            node = list(node.values())
        for item in node if isinstance(node, list) else ():
            yield from references(item)

    for reference in references(contract):
        assert reference.removeprefix("#/components/schemas/") in contract["components"]["schemas"]


def test_every_operation_declares_its_problems_and_its_key() -> None:
    operations = [
        (path, operation) for path, methods in json.loads(document())["paths"].items() for operation in methods.values()
    ]
    assert len({operation["operationId"] for _, operation in operations}) == len(operations)
    for path, operation in operations:
        assert operation["summary"]
        assert operation["description"]
        for status, response in operation["responses"].items():
            assert (list(response.get("content", {})) == [MEDIA_TYPE]) is (int(status) >= 400)
        if path.startswith("/v1/"):
            assert operation["security"] == [{"api_key": []}]
            assert {"401", "403", "422", "500", "503"} <= set(operation["responses"])
