"""`/v1/artifacts`: the files of succeeded jobs, and their bytes in whole or in part (RFC 9110, section 14)."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.accounts.auth import ArtifactsReader, AuthenticatedRoute
from app.artifacts.models import Artifact as ArtifactRow
from app.artifacts.ranges import Span, UnsatisfiableError, is_unchanged, wanted_span
from app.artifacts.store import Store
from app.kit import errors
from app.kit.errors import declare
from app.parts import PartsDep
from secateur.problems import ProblemError
from secateur.schemas.artifacts import Artifact

router = APIRouter(prefix="/artifacts", tags=["artifacts"], route_class=AuthenticatedRoute)

_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"description": "The whole file", "content": _BINARY},
    206: {"description": "The bytes that `Range` asks for", "content": _BINARY},
    304: {"description": "The client has it already (`If-None-Match`)"},
    **declare("not_found", "range_not_satisfiable", "artifact_lost"),
}


@router.get("/{artifact_id}", responses=declare("not_found"))
async def get_artifact(artifact_id: str, parts: PartsDep, caller: ArtifactsReader) -> Artifact:
    """One file: its name, size and digest."""
    async with parts.database.read() as session:
        return Artifact.model_validate(await _found(session, caller.tenant.id, artifact_id))


@router.head("/{artifact_id}/content", response_class=Response, responses=_CONTENT, operation_id="head_artifact_content")
@router.get("/{artifact_id}/content", response_class=Response, responses=_CONTENT)
async def get_artifact_content(artifact_id: str, request: Request, parts: PartsDep, caller: ArtifactsReader) -> Response:
    """The file's bytes. `ETag` is its sha256, so a download can be resumed (`Range` with `If-Range`) and verified."""
    async with parts.database.read() as session:
        artifact = await _found(session, caller.tenant.id, artifact_id)
    if artifact.lost_at is not None:
        told = f"the bytes of {artifact.name} were lost from the store"
        raise ProblemError("artifact_lost", told, hint="Retry or repeat the job: the same recipe makes the same bytes.")
    headers = _headers(artifact)
    if is_unchanged(request.headers.get("if-none-match"), artifact.sha256):
        return Response(status_code=304, headers=headers)
    try:
        span = wanted_span(request.headers, size=artifact.size, sha256=artifact.sha256)
    except UnsatisfiableError as error:
        problem = ProblemError("range_not_satisfiable", f"{artifact.name} has {artifact.size} bytes; {error}")
        return errors.respond(request.scope, problem, {"Content-Range": f"bytes */{artifact.size}"})
    return await _send(parts.store, artifact, span, headers, body=request.method == "GET")


async def _send(store: Store, artifact: ArtifactRow, span: Span | None, headers: dict[str, str], *, body: bool) -> Response:
    start, end = span or (0, artifact.size)
    headers |= {"Content-Length": str(end - start), "Content-Type": "application/octet-stream"}
    if span:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{artifact.size}"
    status = 206 if span else 200
    if not body or start == end:
        return Response(status_code=status, headers=headers)
    pieces = store.read(artifact.tenant_id, artifact.sha256, start, end)
    # The first piece is read before anything is sent: a blob that is not there must not look like a broken download.
    first = await anext(pieces)
    return StreamingResponse(_joined(first, pieces), status_code=status, headers=headers)


async def _joined(first: bytes, rest: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    yield first
    async for piece in rest:
        yield piece


def _headers(artifact: ArtifactRow) -> dict[str, str]:
    digest = b64encode(bytes.fromhex(artifact.sha256)).decode()
    return {
        "ETag": f'"{artifact.sha256}"',
        "Repr-Digest": f"sha-256=:{digest}:",
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=31536000, immutable",
        "Content-Disposition": _disposition(PurePosixPath(artifact.name).name),
        "X-Content-Type-Options": "nosniff",
    }


def _disposition(name: str) -> str:
    """`attachment` with a plain name for old clients and the exact one for the others (RFC 6266)."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._- ") else "_" for c in name)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"


async def _found(session: AsyncSession, tenant_id: str, artifact_id: str) -> ArtifactRow:
    mine = (ArtifactRow.id == artifact_id, ArtifactRow.tenant_id == tenant_id)
    artifact = await session.scalar(select(ArtifactRow).where(*mine))
    if artifact is None:
        raise ProblemError("not_found", f"there is no artifact {artifact_id}")
    return artifact
