"""Models in the registry of the installation's MLflow server: `models:/name/version` or `models:/name@alias`.

Only the server that the operator has set is asked, by its REST API, and only for artifacts that it serves itself: a version
may name any address as its source, and none of those is followed.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, urlsplit

import httpx2

from app.models.hub import HubFile, Snapshot
from app.settings import Settings
from secateur.problems import ProblemError, at
from secateur.recipes import Model

_API = "/api/2.0/mlflow"
_ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"
# Where the files of a model lie in what is logged: as they are, or as the transformers flavour lays them out.
_FOLDERS = ("", "model", "components/tokenizer")
_MAX_JSON_BYTES = 16_000_000
_TOKEN_HINT = "Store a token of that server as the secret mlflow_token."  # noqa: S105 (a sentence about one)


class Mlflow:
    """The server as one tenant sees it, for as long as `seconds` last.

    Every method raises ProblemError: `model_not_found`, `mlflow_token_refused`, or `mlflow_unavailable` if the server
    fails or the time is over.
    """

    def __init__(self, settings: Settings, token: str | None, seconds: float) -> None:
        if not settings.mlflow.url:
            raise at("/model/source", "integration_unavailable", "This installation has no MLflow server.")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        # Proxies and passwords of the environment are the operator's.
        self._http = httpx2.Client(base_url=settings.mlflow.url.rstrip("/"), headers=headers, trust_env=False)
        self._deadline = time.monotonic() + seconds
        self._paths: dict[str, str] = {}

    def close(self) -> None:
        self._http.close()

    def snapshot(self, model: Model) -> Snapshot:
        """The files of a version. Its `repository` names the exact version, its `commit` tells it from any other.

        Raises `model_not_found` if `model.revision` is given and is another.
        """
        version = self._version(model)
        found = self._json(f"{_API}/model-versions/get-download-uri", name=version["name"], version=version["version"])
        root = self._served(str(found.get("artifact_uri")))
        files: dict[str, HubFile] = {}
        for folder in _FOLDERS:
            for entry in self._listing(f"{root}/{folder}".rstrip("/")):
                name = str(entry["path"]).rsplit("/", 1)[-1]
                if not entry.get("is_dir") and name not in files:
                    files[name] = HubFile(name, int(entry.get("file_size") or 0), None, None)
                    self._paths[name] = f"{root}/{folder}/{name}" if folder else f"{root}/{name}"
        told = (str(self._http.base_url), version["name"], version["version"], str(version["creation_timestamp"]), root)
        commit = hashlib.sha256("\0".join(told).encode()).hexdigest()[:40]
        if model.revision not in {None, commit}:
            raise at("/model/revision", "model_not_found", f"'{model.id}' is not the version that it was any more.")
        return Snapshot(f"models:/{version['name']}/{version['version']}", commit, files)

    def read(self, snapshot: Snapshot, path: str, start: int, end: int) -> bytes:
        """The bytes `start <= i < end` of a file of the snapshot, fewer if it ends before; no more are taken than needed."""
        del snapshot
        received, skip = bytearray(), 0
        for piece, skip in self._pieces(path, {"Range": f"bytes={start}-{end - 1}"}, start):
            received += piece
            if len(received) >= skip + end - start:
                break
            self._remaining()
        return bytes(received[skip : skip + end - start])

    def stream(self, path: str) -> Iterator[bytes]:
        """All bytes of a file of the snapshot."""
        for piece, _ in self._pieces(path, {}, 0):
            yield piece

    def _pieces(self, path: str, headers: Mapping[str, str], start: int) -> Iterator[tuple[bytes, int]]:
        """The pieces of an answer, each with how many bytes of the whole are to be skipped: a server may not know ranges."""
        url = f"{_ARTIFACTS}/{quote(self._paths[path])}"
        with (
            _mlflow_problems(),
            self._http.stream("GET", url, headers={"Accept-Encoding": "identity", **headers}, timeout=30) as answer,
        ):
            answer.raise_for_status()
            skip = 0 if answer.status_code == httpx2.codes.PARTIAL_CONTENT else start
            for piece in answer.iter_raw(256 << 10):
                yield piece, skip

    def _version(self, model: Model) -> dict[str, Any]:
        named = model.id.removeprefix("models:/")
        name, at_sign, alias = named.partition("@")
        if at_sign:
            found = self._json(f"{_API}/registered-models/alias", name=name, alias=alias)
        else:
            name, _, number = named.rpartition("/")
            found = self._json(f"{_API}/model-versions/get", name=name, version=number)
        version: dict[str, Any] = found["model_version"]
        return version

    def _served(self, uri: str) -> str:
        """The path of artifacts that the server serves. Raises `model_not_found` for those that lie anywhere else."""
        parts = urlsplit(uri)
        path = parts.path.strip("/")
        if parts.scheme != "mlflow-artifacts" or parts.netloc not in {"", self._http.base_url.netloc.decode()}:
            raise at(
                "/model/id",
                "model_not_found",
                "The version's files are not served by the MLflow server itself, and nothing else is read.",
                hint="Log the model to a server that runs with --serve-artifacts.",
            )
        if any(part in {"", ".", ".."} for part in path.split("/")):
            raise at("/model/id", "model_not_found", "The version names a place that no artifact has.")
        return path

    def _listing(self, path: str) -> list[dict[str, Any]]:
        listed = self._json(_ARTIFACTS, path=path).get("files", [])
        return [entry for entry in listed if isinstance(entry, dict) and "path" in entry]

    def _json(self, address: str, **parameters: str) -> dict[str, Any]:
        with _mlflow_problems(), self._http.stream("GET", address, params=parameters, timeout=self._remaining()) as answer:
            answer.raise_for_status()
            raw = bytearray()
            for piece in answer.iter_bytes(64 << 10):
                raw += piece
                if len(raw) > _MAX_JSON_BYTES:
                    raise unavailable("answers without end")
        document = _parsed(bytes(raw))
        if not isinstance(document, dict):
            raise unavailable("answers something else than was asked")
        return document

    def _remaining(self) -> float:
        seconds = self._deadline - time.monotonic()
        if seconds <= 0:
            raise unavailable("did not answer in time")
        return seconds


def _parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise unavailable("answers something else than was asked") from None


def unavailable(what: str) -> ProblemError:
    """The problem of a server that fails."""
    return at("/model/id", "mlflow_unavailable", f"The MLflow server {what}.", hint="Try again in a while.")


@contextmanager
def _mlflow_problems() -> Iterator[None]:
    try:
        yield
    except httpx2.HTTPStatusError as error:
        status = error.response.status_code
        if status in {401, 403}:
            told = f"The MLflow server refused the request (status {status})."
            raise at("/model/id", "mlflow_token_refused", told, hint=_TOKEN_HINT) from None
        if status in {400, 404}:
            raise at("/model/id", "model_not_found", "The MLflow server has no such model, version or file.") from None
        raise unavailable(f"answered with status {status}") from None
    except (httpx2.HTTPError, OSError) as error:
        raise unavailable(f"does not answer ({type(error).__name__})") from None
