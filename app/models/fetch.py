"""Bring a model to this machine. Runs in a process of its own, which has the network and the tenant's token."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from huggingface_hub import hf_hub_download

from app.accounts.secrets import SecretName
from app.models import artifact, hub, local
from app.models.hub import Hub, HubFile, Snapshot, hub_problems, room_problems
from app.models.mlflow import Mlflow
from app.settings import Settings
from secateur.problems import at
from secateur.recipes import Model

_CHUNK_BYTES = 1 << 20

Tokens = Mapping[SecretName, str | None]


def fetch_model(model: Model, *, tenant_id: str, tokens: Tokens, settings: Settings) -> Path:
    """The folder of a model that was admitted: a local one as it is, another whole and checked in the tenant's cache.

    Of a hub model exactly the commit is fetched, and of it only weights, config and tokenizer. The folder appears when it is
    complete; two processes that fetch the same share the work. Raises the problems of `app.models.hub` and
    `app.models.mlflow`, `model_file_corrupt` if a file is not what its source says it is, and `disk_full`.
    """
    if model.source == "local":
        return local.folder_of(model.id, settings.models_root)
    folder = _folder_of(model, tenant_id, settings)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():
            if model.source == "mlflow":
                _fetch_mlflow(model, tokens.get(SecretName.MLFLOW_TOKEN), settings, folder)
            else:
                _fetch_hub(model, tokens.get(SecretName.HUB_TOKEN), settings, folder)
        os.utime(folder)  # used now: what was not for long is removed
    return folder


def cached(model: Model, *, tenant_id: str, settings: Settings) -> bool:
    """Whether the tenant has this commit of the model already."""
    return _folder_of(model, tenant_id, settings).is_dir()


def _folder_of(model: Model, tenant_id: str, settings: Settings) -> Path:
    if model.source == "artifact":
        return artifact.folder_of(str(model.revision), tenant_id=tenant_id, settings=settings)
    if model.revision is None or not hub.is_commit(model.revision):
        raise at("/model/revision", "model_not_found", "The revision was not resolved to a commit.")
    return settings.cache_folder / tenant_id / model.source / model.id.replace("/", "--").replace(":", "") / model.revision


def _fetch_hub(model: Model, token: str | None, settings: Settings, folder: Path) -> None:
    reader = Hub(settings.hub.endpoint, token, settings.hub.timeout_seconds)
    snapshot = reader.snapshot(model)
    weights, _ = hub.weights_of(reader, snapshot)
    partial = folder.with_name(f"{folder.name}.partial")  # what an earlier try finished is kept and used
    for file in hub.selected(snapshot, weights):
        with hub_problems(model, with_token=token is not None):
            hf_hub_download(
                snapshot.repository,
                file.path,
                revision=snapshot.commit,
                local_dir=partial,
                token=token or False,
                endpoint=settings.hub.endpoint,
                etag_timeout=settings.hub.timeout_seconds,
            )
        _check(partial / file.path, file, snapshot)
    shutil.rmtree(partial / ".cache", ignore_errors=True)  # the client's own notes
    partial.rename(folder)


def _fetch_mlflow(model: Model, token: str | None, settings: Settings, folder: Path) -> None:
    """MLflow gives no digests: the sizes are compared, and the run checks the headers."""
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(exist_ok=True)
    with closing(Mlflow(settings, token, settings.mlflow.timeout_seconds)) as reader, room_problems():
        snapshot = reader.snapshot(model)
        weights, _ = hub.weights_of(reader, snapshot)
        for file in hub.selected(snapshot, weights):
            with (partial / file.path).open("wb") as target:
                for piece in reader.stream(file.path):
                    target.write(piece)
                    if target.tell() > file.size:
                        break
            if (partial / file.path).stat().st_size != file.size:
                raise at("/model/id", "model_file_corrupt", f"{file.path} arrived with another size than was listed.")
    partial.rename(folder)


def _check(path: Path, file: HubFile, snapshot: Snapshot) -> None:
    """Compare a file with the digest in the hub's listing; a wrong one is removed, so that the next try fetches it again."""
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as content:
        while piece := content.read(_CHUNK_BYTES):
            digest.update(piece)
    if digest.hexdigest() != (file.sha256 or file.git_oid):
        path.unlink()
        raise at(
            "/model/id",
            "model_file_corrupt",
            f"{file.path} of '{snapshot.repository}' arrived with another digest than the hub gives.",
            hint="Retry the job.",
        )


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Hold the lock file; whoever dies lets go of it."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
