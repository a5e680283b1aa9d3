"""Puts a finished model into a repository of a Hugging Face hub, with the tenant's own token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from pydantic import Field, StringConstraints

from app.accounts.secrets import SecretName
from app.integrations.protocol import Integration, Options, Product
from app.settings import Settings
from secateur.problems import ProblemError

_PART = r"[A-Za-z0-9_]([.\-]?[A-Za-z0-9_])*"
_TOKEN_HINT = "Store a token of the hub that may write to this repository, then have the integration tried again."  # noqa: S105
_REFUSALS = frozenset({400, 401, 403, 404, 409, 413, 422})


class HubPushOptions(Options):
    repository: Annotated[str, StringConstraints(max_length=193, pattern=rf"^{_PART}/{_PART}$")] = Field(
        description="`owner/name`; it is made if it is not there."
    )
    private: bool = Field(default=True, description="Of a repository that is made.")
    branch: Annotated[str, StringConstraints(max_length=100, pattern=r"^[A-Za-z0-9][\w.\-]*$")] = "main"


class HubPush(Integration[HubPushOptions]):
    name = "hub_push"
    summary = "Put the files and the model card into a repository of the Hugging Face Hub."
    secret = SecretName.HUB_TOKEN
    options = HubPushOptions

    def deliver(self, product: Product, options: HubPushOptions, settings: Settings, secret: str | None) -> str:
        """One commit with every file; nothing is done for files that are there already."""
        if secret is None:
            raise ProblemError("integration_refused", "There is no hub token to push with.", hint=_TOKEN_HINT)
        hub = HfApi(endpoint=settings.hub.endpoint, token=secret)
        with _hub_problems(options.repository):
            hub.create_repo(options.repository, private=options.private, exist_ok=True)
            if options.branch != "main":
                hub.create_branch(options.repository, branch=options.branch, exist_ok=True)
            commit = hub.upload_folder(
                repo_id=options.repository,
                folder_path=product.folder,
                revision=options.branch,
                commit_message=f"{product.recipe.name}, job {product.job_id}",
            )
        return f"{settings.hub.endpoint}/{options.repository}/tree/{commit.oid}"


@contextmanager
def _hub_problems(repository: str) -> Iterator[None]:
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in {401, 403}:
            told = f"The hub refused the token for '{repository}' (status {status})."
            raise ProblemError("integration_refused", told, hint=_TOKEN_HINT) from None
        if status in _REFUSALS:
            raise ProblemError("integration_refused", f"The hub refused '{repository}' (status {status}).") from None
        raise ProblemError("integration_failed", f"The hub answered with status {status}.") from None
    except (HFValidationError, ValueError) as error:
        told = f"The hub does not take what would be put into '{repository}': {str(error)[:300]}"
        raise ProblemError("integration_refused", told) from None
    except (httpx2.HTTPError, OSError) as error:
        raise ProblemError("integration_failed", f"The hub does not answer ({type(error).__name__}).") from None
