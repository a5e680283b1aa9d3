"""When the client repeats a request, how long it waits, and what it makes of answers that are none of ours."""

from __future__ import annotations

import json

import pytest

from secateur._calls import get_job
from secateur._http import TRIES, Pause, Reply, Request, send
from secateur.errors import (
    ConflictError,
    NotFoundError,
    SecateurError,
    ServiceError,
    UnexpectedAnswerError,
    UnreachableError,
)
from secateur.problems import ProblemError

GET = Request("GET", "/v1/jobs/job_1")


def problem(code: str, **headers: str) -> Reply:
    document = ProblemError(code, "so it is").as_document()
    return Reply(document["status"], headers, json.dumps(document).encode())


def converse(request: Request, *outcomes: Reply | UnreachableError) -> tuple[list[float], Reply | SecateurError]:
    """The pauses between the tries that end with these outcomes, and what came of it."""
    call, pauses = send(request), []
    step = next(call)
    for outcome in outcomes:
        assert step == request
        try:
            step = call.send(outcome)
            while isinstance(step, Pause):
                pauses.append(step.seconds)
                step = next(call)
        except StopIteration as end:
            return pauses, end.value
        except SecateurError as error:
            return pauses, error
    raise AssertionError("it is not over yet")


@pytest.mark.parametrize("outcome", [problem("service_unavailable"), Reply(502, {}, b"<html>"), UnreachableError("gone")])
def test_what_passes_is_tried_again_after_growing_pauses(outcome: Reply | UnreachableError) -> None:
    good = Reply(200, {}, b"{}")
    pauses, result = converse(GET, outcome, outcome, good)
    assert result is good
    assert 0 < pauses[0] < pauses[1] < 1


def test_it_is_given_up_after_some_tries() -> None:
    pauses, result = converse(GET, *[problem("internal_error")] * TRIES)
    assert isinstance(result, ServiceError)
    assert len(pauses) == TRIES - 1


def test_what_stays_wrong_is_not_tried_again() -> None:
    for code, kind in (("not_found", NotFoundError), ("job_not_retryable", ConflictError), ("disk_full", ServiceError)):
        pauses, result = converse(GET, problem(code))
        assert isinstance(result, kind)
        assert pauses == []


def test_a_request_that_is_still_under_way_is_asked_for_again() -> None:
    good = Reply(202, {}, b"{}")
    assert converse(GET, problem("idempotency_key_in_flight"), good)[1] is good


def test_a_request_that_must_not_be_repeated_is_not() -> None:
    pauses, result = converse(Request("POST", "/v1/x", repeatable=False), UnreachableError("gone"))
    assert isinstance(result, UnreachableError)
    assert pauses == []


def test_the_service_says_how_long_to_wait_within_reason() -> None:
    patient = [problem("service_unavailable", **{"retry-after": seconds}) for seconds in ("2", "86400")]
    assert converse(GET, *patient, Reply(200, {}, b"{}"))[0] == [2.0, 30.0]


def test_an_answer_of_something_else_is_told_as_such() -> None:
    _, result = converse(GET, Reply(404, {}, b"<html>nginx</html>"))
    assert isinstance(result, NotFoundError)
    assert result.code == "unknown"
    assert "nginx" in str(result)


def test_a_good_answer_in_a_form_that_is_not_known_is_told_as_such() -> None:
    call = get_job("job_1")
    next(call)
    with pytest.raises(UnexpectedAnswerError, match="too old"):
        call.send(Reply(200, {}, b'{"id": "job_1"}'))
