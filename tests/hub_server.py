"""A small real hub on loopback: the protocol of a Hugging Face hub, to read and to write, as `huggingface_hub` speaks it.

It keeps a list of what it was asked, with which token, and how many bytes it answered: a test can say what was fetched.
Large files are answered as the real hub does: by a redirect to another host, which must never be shown the token.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response

LARGE = (".safetensors", ".bin")


@dataclass
class Repository:
    """A model repository. `readers` are the tokens that may read it if it is private or gated."""

    files: dict[str, bytes]
    private: bool = False
    gated: bool = False
    readers: frozenset[str] = frozenset()
    branches: dict[str, str] = field(default_factory=dict)
    corrupted: set[str] = field(default_factory=set)
    """Files that are served with one byte changed."""
    claimed_sizes: dict[str, int] = field(default_factory=dict)
    """Sizes that the listing gives instead of the true ones."""

    @property
    def commit(self) -> str:
        digest = hashlib.sha1()
        for path, content in sorted(self.files.items()):
            digest.update(path.encode() + b"\0" + content)
        return digest.hexdigest()

    @classmethod
    def of_folder(cls, folder: Path, **more: Any) -> Repository:
        return cls(
            {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}, **more
        )

    def resolves(self, revision: str) -> bool:
        return revision in {"main", self.commit, *self.branches}


@dataclass(frozen=True)
class Asked:
    """A request as it came in."""

    method: str
    path: str
    host: str
    authorization: str | None
    range: str | None
    sent: int


@dataclass
class HubServer:
    """What is served, and what was asked."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    """Tokens that the hub knows; any other is refused."""
    writers: set[str] = field(default_factory=set)
    """Those of them that may write, to every repository."""
    failing: int | None = None
    """Answer everything with this status."""
    delay: float = 0
    """Seconds before each answer."""
    asked: list[Asked] = field(default_factory=list)

    def reset(self) -> None:
        """Forget everything but the address."""
        vars(self).update(vars(HubServer(url=self.url)))

    def fetched(self) -> set[str]:
        """The files of which bytes were sent."""
        return {entry.path.rsplit("/", 1)[-1] for entry in self.asked if entry.method == "GET" and "/files/" in entry.path}

    def bytes_sent(self) -> int:
        return sum(entry.sent for entry in self.asked if entry.method == "GET")


@contextmanager
def serve_hub() -> Iterator[HubServer]:
    """A hub on a free port of 127.0.0.1, for as long as the block lasts."""
    hub = HubServer()
    server = uvicorn.Server(uvicorn.Config(_app(hub), host="127.0.0.1", port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    hub.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield hub
    finally:
        server.should_exit = True
        thread.join(10)


def _app(hub: HubServer) -> FastAPI:
    app = FastAPI(openapi_url=None)

    @app.middleware("http")
    async def record(request: Request, proceed: Callable[[Request], Any]) -> Response:
        asked = hub.asked  # whoever puts another list there meanwhile does not want to hear of this one
        await asyncio.sleep(hub.delay)
        answer: Response = Response(status_code=hub.failing) if hub.failing else await proceed(request)
        asked.append(
            Asked(
                request.method,
                request.url.path,
                request.url.hostname or "",
                request.headers.get("authorization"),
                request.headers.get("range"),
                int(answer.headers.get("content-length", 0)),
            )
        )
        return answer

    @app.get("/api/models/{owner}/{name}")
    @app.get("/api/models/{owner}/{name}/revision/{revision:path}")
    async def info(request: Request, owner: str, name: str, revision: str = "main") -> Response:
        repository = _find(hub, request, f"{owner}/{name}", revision)
        return repository if isinstance(repository, Response) else _info(f"{owner}/{name}", repository)

    @app.get("/api/models/{owner}/{name}/tree/{revision}")
    async def tree(request: Request, owner: str, name: str, revision: str) -> Response:
        repository = _find(hub, request, f"{owner}/{name}", revision)
        return repository if isinstance(repository, Response) else _json(_entries(repository))

    @app.post("/api/models/{owner}/{name}/paths-info/{revision}")
    async def paths_info(request: Request, owner: str, name: str, revision: str) -> Response:
        repository = _find(hub, request, f"{owner}/{name}", revision)
        if isinstance(repository, Response):
            return repository
        wanted = (await request.json())["paths"]
        return _json([entry for entry in _entries(repository) if entry["path"] in wanted])

    @app.api_route("/{owner}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    async def resolve(request: Request, owner: str, name: str, revision: str, path: str) -> Response:
        repository = _find(hub, request, f"{owner}/{name}", revision, content=True)
        return repository if isinstance(repository, Response) else _redirect(request, f"{owner}/{name}", repository, path)

    @app.api_route("/files/{owner}/{name}/{path:path}", methods=["GET", "HEAD"])
    async def content(request: Request, owner: str, name: str, path: str) -> Response:
        return _content(request, hub.repositories[f"{owner}/{name}"], path)

    Writing(hub).mount(app)
    return app


class Writing:
    """What a push needs: make a repository, ask how files are to come, take large ones, commit. Without Xet."""

    def __init__(self, hub: HubServer) -> None:
        self.hub = hub
        self.uploaded: dict[str, bytes] = {}

    def mount(self, app: FastAPI) -> None:
        model = "/api/models/{owner}/{name}"
        app.post("/api/repos/create")(self.create)
        app.post("/api/validate-yaml")(self.validate)
        app.post(f"{model}/preupload/{{revision}}")(self.preupload)
        app.post("/{owner}/{name}.git/info/lfs/objects/batch")(self.batch)
        app.put("/lfs/{oid}")(self.take)
        app.post(f"{model}/commit/{{revision}}")(self.commit)

    def _refused(self, request: Request, name: str | None = None) -> Response | None:
        token = _token_of(request)
        if token not in self.hub.tokens:
            return _refusal(401, None, "Invalid credentials in Authorization header")
        if token not in self.hub.writers:
            return _refusal(403, None, "You do not have the required permissions")
        return _refusal(404, "RepoNotFound", "Repository not found") if name and name not in self.hub.repositories else None

    async def create(self, request: Request) -> Response:
        wanted = await request.json()
        name = f"{wanted['organization']}/{wanted['name']}"
        if (refusal := self._refused(request)) is not None:
            return refusal
        made = name not in self.hub.repositories
        if made:
            private = wanted.get("visibility") == "private"
            self.hub.repositories[name] = Repository({}, private=private, readers=frozenset({_token_of(request)}))
        return _json({"url": f"{self.hub.url}/{name}", "name": name}, 200 if made else 409)

    async def validate(self, request: Request) -> Response:
        content = (await request.json())["content"]
        whole = content.startswith("---\n") and "\n---\n" in content
        errors = [] if whole else [{"message": "there is no metadata"}]
        return _json({"errors": errors, "warnings": []}, 200 if whole else 400)

    async def preupload(self, request: Request, owner: str, name: str) -> Response:
        if (refusal := self._refused(request, f"{owner}/{name}")) is not None:
            return refusal
        there, wanted = self.hub.repositories[f"{owner}/{name}"].files, (await request.json())["files"]
        return _json({"files": [_way_of(file["path"], there.get(file["path"])) for file in wanted]})

    async def batch(self, request: Request, owner: str, name: str) -> Response:
        if (refusal := self._refused(request, f"{owner}/{name}")) is not None:
            return refusal
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}", "header": {}}}}
            for one in (await request.json())["objects"]
        ]
        return _json({"transfer": "basic", "objects": objects})

    async def take(self, request: Request, oid: str) -> Response:
        self.uploaded[oid] = await request.body()
        return Response(status_code=200 if hashlib.sha256(self.uploaded[oid]).hexdigest() == oid else 400)

    async def commit(self, request: Request, owner: str, name: str) -> Response:
        if (refusal := self._refused(request, f"{owner}/{name}")) is not None:
            return refusal
        repository = self.hub.repositories[f"{owner}/{name}"]
        for operation in map(json.loads, (await request.body()).splitlines()):
            value = operation["value"]
            if operation["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                repository.files[value["path"]] = self.uploaded[value["oid"]]
        oid = repository.commit
        return _json({"success": True, "commitUrl": f"{self.hub.url}/{owner}/{name}/commit/{oid}", "commitOid": oid})


def _way_of(path: str, there: bytes | None) -> dict[str, Any]:
    """How a file is to come, and the id of what is there already."""
    large = path.endswith(LARGE)
    oid = None if there is None else hashlib.sha256(there).hexdigest() if large else _git_oid(there)
    return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}


def _token_of(request: Request) -> str:
    return (request.headers.get("authorization") or "").removeprefix("Bearer ")


def _find(hub: HubServer, request: Request, name: str, revision: str, *, content: bool = False) -> Repository | Response:
    """The repository, or the refusal that the real hub would give. Of a gated one everybody may see what it holds."""
    token = _token_of(request)
    if token and token not in hub.tokens:
        return _refusal(401, None, "Invalid credentials in Authorization header")
    repository = hub.repositories.get(name)
    if repository is None or (repository.private and token not in repository.readers):
        return _refusal(404 if token else 401, "RepoNotFound", "Repository not found")
    if content and repository.gated and token not in repository.readers:
        return _refusal(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted")
    if not repository.resolves(revision):
        return _refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    return repository


def _refusal(status: int, code: str | None, message: str) -> Response:
    named = {"X-Error-Code": code} if code else {}
    return Response(status_code=status, headers={**named, "X-Error-Message": message})


def _info(name: str, repository: Repository) -> Response:
    siblings = [
        {"rfilename": entry["path"], "size": entry["size"], "blobId": entry["oid"], "lfs": _lfs_of_info(entry)}
        for entry in _entries(repository)
    ]
    return _json({
        "id": name, "modelId": name, "sha": repository.commit, "private": repository.private,
        "gated": "auto" if repository.gated else False, "disabled": False, "tags": [], "downloads": 0, "likes": 0,
        "lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z", "siblings": siblings,
    })  # fmt: skip


def _lfs_of_info(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    lfs = entry.get("lfs")
    return {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]} if lfs else None


def _entries(repository: Repository) -> list[dict[str, Any]]:
    entries = []
    for path, content in sorted(repository.files.items()):
        size = repository.claimed_sizes.get(path, len(content))
        entry: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": _git_oid(content)}
        if path.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 134}
        entries.append(entry)
    return entries


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _redirect(request: Request, name: str, repository: Repository, path: str) -> Response:
    """Where the file's bytes are: for a large one another host, otherwise this one."""
    content = repository.files.get(path)
    if content is None:
        return _refusal(404, "EntryNotFound", f"Entry not found: {path}")
    large = path.endswith(LARGE)
    etag = hashlib.sha256(content).hexdigest() if large else _git_oid(content)
    headers = {"X-Repo-Commit": repository.commit, "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
    if request.method == "HEAD" and not large:
        return Response(headers={**headers, "ETag": f'"{etag}"', "Content-Length": str(len(content))})
    host = f"http://localhost:{request.url.port}" if large else ""
    return Response(status_code=302, headers={**headers, "Location": f"{host}/files/{name}/{path}"})


def _content(request: Request, repository: Repository, path: str) -> Response:
    content = repository.files[path]
    if path in repository.corrupted:
        content = content[:-1] + bytes([content[-1] ^ 1])
    span = request.headers.get("range")
    if span is None:
        return Response(content, media_type="application/octet-stream")
    start, _, last = span.removeprefix("bytes=").partition("-")
    first, end = int(start), min(int(last) + 1 if last else len(content), len(content))
    described = {"Content-Range": f"bytes {first}-{end - 1}/{len(content)}"}
    return Response(content[first:end], status_code=206, headers=described, media_type="application/octet-stream")


def _json(document: Any, status: int = 200) -> Response:
    return Response(json.dumps(document), status_code=status, media_type="application/json")
