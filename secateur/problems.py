"""Everything that can go wrong and that a user is told about, in one table.

A problem has the same shape wherever it is met (RFC 9457): as the body of an HTTP error, as the `error` of a failed job,
on the pipe between the process that prunes and the one that watches it, and as the exception that the client raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

TYPE_PREFIX = "https://secateur.dev/errors/"


@dataclass(frozen=True, slots=True)
class Kind:
    """One row of the table: what a code means, whatever the occasion."""

    code: str
    status: int
    title: str
    retryable: bool = False


_ROWS = (
    # The request
    Kind("bad_request", 400, "The request cannot be read"),
    Kind("unauthorized", 401, "No valid API key"),
    Kind("forbidden", 403, "The key does not allow this"),
    Kind("not_found", 404, "Not found"),
    Kind("method_not_allowed", 405, "The method is not allowed here"),
    Kind("body_too_large", 413, "The body is too large"),
    Kind("range_not_satisfiable", 416, "The range lies outside the file"),
    Kind("validation_error", 422, "The request is not valid"),
    Kind("idempotency_key_reused", 422, "The idempotency key was used for another request"),
    Kind("idempotency_key_in_flight", 409, "A request with this idempotency key is under way", retryable=True),
    Kind("too_many_streams", 429, "Too many event streams are open", retryable=True),
    Kind("internal_error", 500, "Something went wrong on our side", retryable=True),
    Kind("service_unavailable", 503, "A part of the service does not answer", retryable=True),
    # Jobs
    Kind("job_not_cancellable", 409, "The job has ended and cannot be cancelled"),
    Kind("job_not_retryable", 409, "Only a failed, cancelled or expired job can be retried"),
    Kind("job_not_finished", 409, "The job has not finished"),
    Kind("max_runtime_exceeded", 422, "The job has run for as long as it may"),
    Kind("start_deadline_missed", 503, "The job was not begun in time", retryable=True),
    Kind("artifact_lost", 410, "The bytes of the file are lost"),
    Kind("worker_lost", 500, "The worker was lost, again and again", retryable=True),
    Kind("sweep_not_finished", 409, "The sweep has jobs that have not ended"),
    # Webhooks and integrations
    Kind("webhook_endpoint_disabled", 409, "The webhook endpoint is disabled"),
    Kind("too_many_webhook_endpoints", 409, "There are as many webhook endpoints as there may be"),
    Kind("integration_unavailable", 422, "The integration cannot be used here"),
    Kind("integration_refused", 422, "The other side refused what was asked of it"),
    Kind("integration_failed", 502, "The other side failed or did not answer", retryable=True),
    # Models
    Kind("model_not_found", 404, "The model was not found"),
    Kind("model_gone", 410, "The model's files are no longer kept"),
    Kind("model_gated", 403, "The model is gated and the hub token does not open it"),
    Kind("hub_token_refused", 403, "The hub refused the token"),
    Kind("hub_unavailable", 503, "The hub does not answer", retryable=True),
    Kind("mlflow_token_refused", 403, "The MLflow server refused the token"),
    Kind("mlflow_unavailable", 503, "The MLflow server does not answer", retryable=True),
    Kind("model_not_safetensors", 422, "The model has no safetensors files"),
    Kind("model_file_corrupt", 422, "A model file is broken"),
    Kind("model_config_invalid", 422, "The model's config.json is not valid"),
    Kind("remote_code_refused", 422, "The model asks for code of its own to be run"),
    Kind("unsupported_architecture", 422, "The architecture is not supported"),
    Kind("model_not_elastic", 422, "The model is not elastic"),
    Kind("model_quantized", 422, "The model is quantised already"),
    Kind("model_too_large_for_disk", 507, "The model does not fit on the disk"),
    Kind("too_large_for_workers", 507, "No worker has enough memory for the job"),
    # The recipe against the model
    Kind("pattern_does_not_divide", 422, "The pattern does not divide a linear's inputs"),
    Kind("allocation_impossible", 422, "The allocation does not fit the model"),
    Kind("sequence_too_long", 422, "The sequence is longer than the model's positions"),
    Kind("calibration_text_too_short", 422, "The text is too short for what was asked of it"),
    Kind("compensation_unavailable", 422, "The model cannot take this compensation"),
    Kind("induction_unavailable", 422, "The model cannot take this induction"),
    Kind("calibration_too_small", 422, "There are too few calibration samples for what was asked"),
    Kind("dataset_unavailable", 422, "The dataset cannot be had"),
    # The run
    Kind("nonfinite_activation", 422, "An activation is not finite"),
    Kind("verification_failed", 500, "The written model is not what was asked for"),
    Kind("disk_almost_full", 507, "The disk is almost full", retryable=True),
    Kind("disk_full", 507, "The disk is full", retryable=True),
    Kind("out_of_memory", 507, "Not enough memory", retryable=True),
    Kind("runner_crashed", 500, "The process that prunes ended without a result", retryable=True),
)

KINDS: Mapping[str, Kind] = {kind.code: kind for kind in _ROWS}


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong in a body: where (a JSON pointer, RFC 6901) and what."""

    pointer: str
    detail: str


class ProblemError(Exception):
    """A problem on its way to the user.

    `code` names a row of `KINDS`; `detail` says what was wrong and where, in a sentence; `hint` what to do about it;
    `faults` point into the request's body. Raises KeyError for a code that the table does not have.
    """

    def __init__(self, code: str, detail: str, *, hint: str | None = None, faults: Iterable[Fault] = ()) -> None:
        super().__init__(detail)
        self.kind = KINDS[code]
        self.detail = detail
        self.hint = hint
        self.faults = tuple(faults)

    @property
    def code(self) -> str:
        return self.kind.code

    def as_document(self) -> dict[str, Any]:
        """The problem as JSON: type, title, status, detail, code, retryable, and hint and errors if there are any."""
        document: dict[str, Any] = {
            "type": TYPE_PREFIX + self.kind.code.replace("_", "-"),
            "title": self.kind.title,
            "status": self.kind.status,
            "detail": self.detail,
            "code": self.kind.code,
            "retryable": self.kind.retryable,
        }
        if self.hint:
            document["hint"] = self.hint
        if self.faults:
            document["errors"] = [{"pointer": fault.pointer, "detail": fault.detail} for fault in self.faults]
        return document


def at(pointer: str, code: str, detail: str, *, hint: str | None = None) -> ProblemError:
    """A problem with one fault, at `pointer` in the request's body."""
    return ProblemError(code, detail, hint=hint, faults=[Fault(pointer, detail)])
