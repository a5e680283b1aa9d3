"""What the client raises. Everything is a `SecateurError`; what the service refused is a `ProblemResponseError`."""

from __future__ import annotations

from collections.abc import Mapping

from secateur.schemas.problems import FaultBody, Problem


class SecateurError(Exception):
    """The root. Its text is a sentence for people; `hint`, if there is one, says what to do."""

    hint: str | None = None


class NotConfiguredError(SecateurError):
    """The client was not told where the service is, or with which key to speak to it."""


class UnreachableError(SecateurError):
    """The service did not answer, or broke off, as often as it was tried."""


class UnexpectedAnswerError(SecateurError):
    """The service answered in a form that this version of the client does not know."""


class CorruptDownloadError(SecateurError):
    """A file arrived with another digest than its job recorded."""


class JobNotSucceededError(SecateurError):
    """Something was asked of a job that only a job that succeeded has."""


class WaitTimeoutError(SecateurError, TimeoutError):
    """The job did not end in the time that was given."""


class ProblemResponseError(SecateurError):
    """The service refused: `problem` says what was wrong, where, and what to do (RFC 9457)."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem
        self.hint = problem.hint

    @property
    def code(self) -> str:
        """The stable name of the kind of problem, such as `model_not_found`."""
        return self.problem.code

    @property
    def status(self) -> int:
        return self.problem.status

    @property
    def faults(self) -> list[FaultBody]:
        """What is wrong in the request's body, each with a JSON pointer."""
        return self.problem.errors

    @property
    def request_id(self) -> str | None:
        """What names the request in the service's log."""
        return self.problem.request_id


class InvalidRequestError(ProblemResponseError):
    """400, 413, 422: the request cannot be right, however often it is sent."""


class UnauthorizedError(ProblemResponseError):
    """401: the key is missing, unknown, revoked or expired."""


class ForbiddenError(ProblemResponseError):
    """403: the key, or the hub token, does not allow this."""


class NotFoundError(ProblemResponseError):
    """404: there is no such job, file or model."""


class ConflictError(ProblemResponseError):
    """409: the job's state does not allow this."""


class ServiceError(ProblemResponseError):
    """5xx: the service failed."""


_BY_STATUS: Mapping[int, type[ProblemResponseError]] = {
    400: InvalidRequestError,
    401: UnauthorizedError,
    403: ForbiddenError,
    404: NotFoundError,
    409: ConflictError,
    413: InvalidRequestError,
    422: InvalidRequestError,
}


def error_of(problem: Problem) -> ProblemResponseError:
    """The problem as the exception of its status."""
    return _BY_STATUS.get(problem.status, ServiceError if problem.status >= 500 else ProblemResponseError)(problem)
