"""`/v1/methods` says what a recipe may say."""

from __future__ import annotations

from tests.api.conftest import Service
from tests.api.jobs import body


async def test_every_listed_method_is_accepted_with_its_listed_parameters(service: Service) -> None:
    methods = (await service.client.get("/v1/methods")).json()["data"]
    assert {"magnitude", "wanda", "sparsegpt", "epts"} <= {method["name"] for method in methods}
    for method in methods:
        assert method["summary"]
        assert method["cost"]
        assert method["patterns"][0] == "unstructured"
        properties = method["parameters"]["properties"]
        assert "name" not in properties
        parameters = {name: schema["default"] for name, schema in properties.items()}
        wanted = body(kind=method["kind"], method={"name": method["name"], **parameters})
        if method["kind"] == "elastic":
            del wanted["sparsity"]
        response = await service.client.post("/v1/jobs", json=wanted)
        assert response.json()["recipe"]["method"] == {"name": method["name"], **parameters}
