"""Webhooks: what is sent, how it is signed and repeated, and where it is never sent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from ipaddress import ip_network
from typing import Any

import pytest
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from app.accounts.keys import Scope
from app.kit import clock
from app.kit.retries import next_try, retry_after
from app.settings import Settings, WebhooksSettings
from app.webhooks import endpoints
from app.webhooks.delivery import deliver_due, spread
from app.webhooks.models import WebhookEndpoint
from tests.api.conftest import Service
from tests.api.jobs import body, make_key, make_tenant
from tests.receiver import Receiver, serve_receiver

LOOPBACK = (ip_network("127.0.0.0/8"),)
OPEN = WebhooksSettings(allow_http=True, allow_networks=LOOPBACK, retry_seconds=(0, 0, 0), timeout_seconds=5)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"webhooks": OPEN})


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with serve_receiver() as receiver:
        yield receiver


async def make_endpoint(service: Service, url: str, **more: Any) -> dict[str, Any]:
    response = await service.client.post("/v1/webhook-endpoints", json={"url": url, **more})
    assert response.status_code == 201, response.text
    document: dict[str, Any] = response.json()
    return document


async def tell(service: Service, rounds: int = 1, settings: WebhooksSettings = OPEN) -> int:
    """So many rounds of the scheduler; how many tries there were."""
    tries = 0
    for _ in range(rounds):
        await spread(service.database, at=clock.now())
        tries += await deliver_due(service.database, service.keyring, settings)
    return tries


async def deliveries(service: Service, endpoint: dict[str, Any]) -> list[dict[str, Any]]:
    response = await service.client.get(f"/v1/webhook-endpoints/{endpoint['id']}/deliveries")
    data: list[dict[str, Any]] = response.json()["data"]
    return data


async def test_a_message_is_thin_and_its_signature_is_one_that_the_standards_own_library_verifies(
    service: Service, receiver: Receiver
) -> None:
    endpoint = await make_endpoint(service, receiver.url, types=["job.queued", "job.cancelled"])
    job = (await service.client.post("/v1/jobs", json=body())).json()
    await service.client.post(f"/v1/jobs/{job['id']}/cancel")
    assert await tell(service) == 2
    payloads = [Webhook(endpoint["secret"]).verify(sent.body, sent.headers) for sent in receiver.received]
    assert {payload["type"] for payload in payloads} == {"job.queued", "job.cancelled"}
    assert [payload["data"] for payload in payloads] == [{"object": "job", "id": job["id"]}] * 2
    assert all(set(payload) == {"type", "timestamp", "data"} for payload in payloads)
    sent = receiver.received[0]
    with pytest.raises(WebhookVerificationError):
        Webhook(endpoint["secret"]).verify(sent.body.replace(b"job_", b"jab_"), sent.headers)
    assert [one["status"] for one in await deliveries(service, endpoint)] == ["delivered"] * 2


async def test_only_the_types_that_were_asked_for_and_only_to_the_tenant(service: Service, receiver: Receiver) -> None:
    await make_endpoint(service, receiver.url, types=["job.failed"])
    stranger = await make_tenant(service.database, "stranger")
    key = await make_key(service.database, stranger, service.keyring)
    async with service.client_with(key) as client:
        theirs = await client.post("/v1/webhook-endpoints", json={"url": receiver.url})
        assert (await service.client.get(f"/v1/webhook-endpoints/{theirs.json()['id']}")).status_code == 404
    await service.client.post("/v1/jobs", json=body())
    assert await tell(service) == 0
    assert receiver.received == []


async def test_a_new_endpoint_is_not_told_what_happened_before_it(service: Service, receiver: Receiver) -> None:
    before = (await service.client.post("/v1/jobs", json=body())).json()
    endpoint = await make_endpoint(service, receiver.url)
    after = (await service.client.post("/v1/jobs", json=body())).json()
    assert before["id"] != after["id"]
    assert await tell(service) == 1
    (sent,) = receiver.received
    assert json.loads(sent.body)["data"]["id"] == after["id"]
    assert len(await deliveries(service, endpoint)) == 1


async def test_a_receiver_that_fails_twice_gets_the_same_id_three_times(service: Service, receiver: Receiver) -> None:
    endpoint = await make_endpoint(service, receiver.url)
    receiver.answers = [(500, {}), (302, {"Location": "http://127.0.0.1:1/"}), (200, {})]
    await service.client.post("/v1/jobs", json=body())
    assert await tell(service, rounds=4) == 3
    assert len({(sent.id, sent.body) for sent in receiver.received}) == 1
    assert len(receiver.received) == 3
    (delivery,) = await deliveries(service, endpoint)
    assert delivery["status"] == "delivered"
    assert delivery["message_id"] == receiver.received[0].id
    assert [each["status"] for each in delivery["tries"]] == [500, 302, 200]


async def test_after_the_last_try_it_has_failed_and_can_be_sent_again(service: Service, receiver: Receiver) -> None:
    endpoint = await make_endpoint(service, receiver.url)
    receiver.answers = [(503, {})]
    await service.client.post("/v1/jobs", json=body())
    assert await tell(service, rounds=6) == 4
    (failed,) = await deliveries(service, endpoint)
    assert (failed["status"], failed["next_try_at"]) == ("failed", None)
    receiver.answers = [(200, {})]
    path = f"/v1/webhook-endpoints/{endpoint['id']}/deliveries/{failed['id']}/resend"
    assert (await service.client.post(path)).status_code == 202
    assert await tell(service) == 1
    assert {sent.id for sent in receiver.received} == {failed["message_id"]}
    (again,) = await deliveries(service, endpoint)
    assert again["status"] == "delivered"
    assert (await service.client.post(path.replace("whd_", "whd_0"))).status_code == 404


async def test_retry_after_is_honoured(service: Service, receiver: Receiver) -> None:
    endpoint = await make_endpoint(service, receiver.url)
    receiver.answers = [(429, {"Retry-After": "3600"})]
    before = clock.now()
    await service.client.post("/v1/jobs", json=body())
    assert await tell(service, rounds=2) == 1
    (waiting,) = await deliveries(service, endpoint)
    assert waiting["next_try_at"] > (before + timedelta(minutes=59)).isoformat()


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("7", 7), ("Sun, 06 Nov 1994 08:49:37 GMT", None), ("soon", None), (None, None)],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(value: str | None, seconds: int | None) -> None:
    at = clock.now()
    found = retry_after(value, at=at)
    if value and value.startswith("Sun"):
        assert found is not None
        assert found.year == 1994
    else:
        assert found == (at + timedelta(seconds=seconds) if seconds else None)


def test_pauses_grow_have_some_chance_in_them_and_end() -> None:
    at, pauses = clock.now(), WebhooksSettings().retry_seconds
    waits = [{next_try(failures, pauses, at=at) for _ in range(20)} for failures in range(1, len(pauses) + 1)]
    for chosen, pause in zip(waits, pauses, strict=True):
        assert len(chosen) > 1
        assert all(one and 1 <= (one - at).total_seconds() / pause <= 1.2 for one in chosen)
    assert next_try(len(pauses) + 1, pauses, at=at) is None
    assert list(pauses[:6]) == [5, 300, 1800, 7200, 18000, 36000]


async def test_410_disables_an_endpoint_until_its_owner_enables_it(service: Service, receiver: Receiver) -> None:
    endpoint = await make_endpoint(service, receiver.url)
    path = f"/v1/webhook-endpoints/{endpoint['id']}"
    receiver.answers = [(410, {})]
    await service.client.post("/v1/jobs", json=body())
    await tell(service, rounds=3)
    assert len(receiver.received) == 1
    found = (await service.client.get(path)).json()
    assert (found["enabled"], "410" in found["disabled_because"]) == (False, True)
    refused = await service.client.post(f"{path}/ping")
    assert (refused.status_code, refused.json()["code"]) == (409, "webhook_endpoint_disabled")
    assert (await service.client.patch(path, json={"enabled": True})).json()["enabled"] is True
    receiver.answers = [(200, {})]
    assert (await service.client.post(f"{path}/ping")).status_code == 202
    await tell(service)
    assert json.loads(receiver.received[-1].body)["type"] == "webhook.ping"


async def test_an_endpoint_that_fails_for_days_is_disabled(service: Service, receiver: Receiver) -> None:
    endpoint = await make_endpoint(service, receiver.url)
    receiver.answers = [(500, {})]
    await service.client.post("/v1/jobs", json=body())
    await tell(service)
    async with service.database.write() as session:
        row = await session.get_one(WebhookEndpoint, endpoint["id"])
        assert row.failing_since is not None
        row.failing_since -= timedelta(days=5)
    await tell(service)
    found = (await service.client.get(f"/v1/webhook-endpoints/{endpoint['id']}")).json()
    assert found["enabled"] is False
    assert [one["status"] for one in await deliveries(service, endpoint)] == ["failed"]


async def test_while_a_secret_is_rotated_both_verify_and_neither_lies_open(service: Service, receiver: Receiver) -> None:
    endpoint = await make_endpoint(service, receiver.url)
    path = f"/v1/webhook-endpoints/{endpoint['id']}"
    rotated = (await service.client.post(f"{path}/rotate-secret")).json()["secret"]
    assert rotated.startswith("whsec_")
    assert rotated != endpoint["secret"]
    await service.client.post(f"{path}/ping")
    await tell(service)
    sent = receiver.received[-1]
    for secret in (endpoint["secret"], rotated):
        Webhook(secret).verify(sent.body, sent.headers)
    assert (await service.client.get(path)).json()["secret"] is None
    async with service.database.write() as session:
        row = await session.get_one(WebhookEndpoint, endpoint["id"])
        assert rotated.encode() not in row.secret
        row.old_secret_until = clock.now()
    await service.client.post(f"{path}/ping")
    await tell(service)
    sent = receiver.received[-1]
    Webhook(rotated).verify(sent.body, sent.headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(endpoint["secret"]).verify(sent.body, sent.headers)


async def test_a_repeated_request_makes_one_endpoint_and_shows_its_secret_once(service: Service) -> None:
    headers = {"Idempotency-Key": "once"}
    asked = {"url": "https://example.com/hooks"}
    first, second = [
        (await service.client.post("/v1/webhook-endpoints", json=asked, headers=headers)).json() for _ in range(2)
    ]
    assert first["secret"].startswith("whsec_")
    assert second == first | {"secret": None}
    assert len((await service.client.get("/v1/webhook-endpoints")).json()["data"]) == 1


async def test_an_endpoint_is_changed_and_deleted(service: Service, receiver: Receiver) -> None:
    endpoint = await make_endpoint(service, receiver.url, description="old")
    path = f"/v1/webhook-endpoints/{endpoint['id']}"
    changed = (await service.client.patch(path, json={"description": "new", "types": ["job.failed"]})).json()
    assert (changed["description"], changed["types"], changed["url"]) == ("new", ["job.failed"], receiver.url)
    refused = await service.client.patch(path, json={"url": "https://10.0.0.1/"})
    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "/url")
    await service.client.post(f"{path}/ping")
    assert (await service.client.delete(path)).status_code == 204
    assert (await service.client.get(path)).status_code == 404
    assert await tell(service) == 0


async def test_a_tenant_has_so_many_endpoints_and_no_more(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "MAX_ENDPOINTS", 1)
    await make_endpoint(service, "https://example.com/")
    refused = await service.client.post("/v1/webhook-endpoints", json={"url": "https://example.com/"})
    assert (refused.status_code, refused.json()["code"]) == (409, "too_many_webhook_endpoints")


async def test_a_key_without_the_scope_sees_nothing(service: Service) -> None:
    key = await make_key(service.database, service.tenant, service.keyring, [Scope.JOBS_WRITE, Scope.JOBS_READ])
    async with service.client_with(key) as client:
        assert (await client.get("/v1/webhook-endpoints")).status_code == 403


# Where nothing is sent: more in test_webhook_targets.py


async def test_a_target_inside_is_refused_with_a_problem(service: Service) -> None:
    for target in ("https://169.254.169.254/latest/meta-data/", "https://[::1]:8000/"):
        response = await service.client.post("/v1/webhook-endpoints", json={"url": target})
        assert (response.status_code, response.json()["errors"][0]["pointer"]) == (422, "/url")


async def test_a_delivery_to_a_name_inside_fails_and_says_why(service: Service) -> None:
    endpoint = await make_endpoint(service, "http://localhost:8009/")
    await service.client.post("/v1/jobs", json=body())
    strict = OPEN.model_copy(update={"allow_networks": ()})
    await tell(service, settings=strict)
    (delivery,) = await deliveries(service, endpoint)
    assert "not a public address" in delivery["tries"][0]["error"]
    await tell(service, settings=strict.model_copy(update={"allow_http": False}))
    (delivery,) = await deliveries(service, endpoint)
    assert "https" in delivery["tries"][1]["error"]


async def test_one_secret_that_cannot_be_read_is_not_in_the_way_of_the_others(service: Service, receiver: Receiver) -> None:
    broken, whole = [await make_endpoint(service, receiver.url) for _ in range(2)]
    async with service.database.write() as session:
        (await session.get_one(WebhookEndpoint, broken["id"])).secret = b"of another keyring"
    await service.client.post("/v1/jobs", json=body())
    await tell(service)
    assert [one["status"] for one in await deliveries(service, whole)] == ["delivered"]
    (failed,) = await deliveries(service, broken)
    assert (failed["status"], "keyring" in failed["tries"][0]["error"]) == ("failed", True)
