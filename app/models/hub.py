"""Models on a Hugging Face hub: what a repository holds, read with one tenant's token and without its weights.

The client is `huggingface_hub`. It would use a token that it finds on the machine; it is always told which token to use
instead, or to use none, so that a tenant never reads with the operator's rights.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import httpx2
from huggingface_hub import HfApi, get_session, hf_hub_url, hf_raise_for_status
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from app.models import parsing
from secateur.problems import ProblemError, at
from secateur.pruning import headers
from secateur.pruning.headers import COMPANIONS, CONFIG, INDEX, SINGLE, TOKENIZER_CONFIG, ModelHeaders
from secateur.pruning.provenance import CARD
from secateur.recipes import Model

# What is fetched beside the weights. Everything else stays on the hub: pickles, Python, other weights, pictures.
FETCHED = frozenset({CONFIG, CARD, *COMPANIONS})
MAX_SHARDS = 1_000
_FIRST_BYTES = 256 << 10  # holds nearly every header, so that one request is enough
_PARALLEL = 8

_ACCEPT_TERMS = "Accept the model's terms on the hub, and store a token of that account as the tenant's hub token."
_PRIVATE = "A private repository needs the tenant's hub token, of an account that may read it."
_NEW_TOKEN = "Store a hub token that is valid and may read this repository."  # noqa: S105 (a sentence about one)
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository. The hub gives a large file's `sha256`, and of a small one the git blob's id."""

    path: str
    size: int
    sha256: str | None
    git_oid: str | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A repository at one commit: the files of its top folder, by name."""

    repository: str
    commit: str
    files: Mapping[str, HubFile]


class Reader(Protocol):
    """Whatever can read the files of a snapshot."""

    def read(self, snapshot: Snapshot, path: str, start: int, end: int) -> bytes:
        """The bytes `start <= i < end` of a file, fewer if it ends before."""
        ...


class Hub:
    """A hub as one tenant sees it, for as long as `seconds` last.

    Every method raises ProblemError: `model_not_found`, `model_gated`, `hub_token_refused`, or `hub_unavailable` if the
    hub fails or the time is over.
    """

    def __init__(self, endpoint: str, token: str | None, seconds: float) -> None:
        self.endpoint = endpoint
        self._token: str | bool = token or False
        self._deadline = time.monotonic() + seconds

    def snapshot(self, model: Model) -> Snapshot:
        """The repository at `model.revision` (by default its main branch), resolved to a commit."""
        with hub_problems(model, with_token=bool(self._token)):
            info = HfApi(endpoint=self.endpoint, token=self._token).model_info(
                model.id, revision=model.revision, files_metadata=True, timeout=self._remaining(), token=self._token
            )
        if info.sha is None or not is_commit(info.sha):
            raise unavailable("did not name a commit")
        files = [
            HubFile(entry.rfilename, entry.size or 0, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
            for entry in info.siblings or []
            if "/" not in entry.rfilename
        ]
        return Snapshot(model.id, info.sha, {file.path: file for file in files})

    def read(self, snapshot: Snapshot, path: str, start: int, end: int) -> bytes:
        """The bytes `start <= i < end` of a file, fewer if it ends before; never more are taken, whatever the hub sends."""
        model = Model(source="hub", id=snapshot.repository, revision=snapshot.commit)
        url = hf_hub_url(snapshot.repository, path, revision=snapshot.commit, endpoint=self.endpoint)
        request = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        if self._token:
            request["Authorization"] = f"Bearer {self._token}"
        received = bytearray()
        with (
            hub_problems(model, with_token=bool(self._token)),
            get_session().stream("GET", url, headers=request, timeout=self._remaining()) as answer,
        ):
            if answer.is_error:
                answer.read()
            hf_raise_for_status(answer)
            skip = 0 if answer.status_code == httpx2.codes.PARTIAL_CONTENT else start
            for piece in answer.iter_raw(64 << 10):
                received += piece
                if len(received) >= skip + end - start:
                    break
                self._remaining()
        return bytes(received[skip : skip + end - start])

    def _remaining(self) -> float:
        seconds = self._deadline - time.monotonic()
        if seconds <= 0:
            raise unavailable("did not answer in time")
        return seconds


def is_commit(revision: str) -> bool:
    """Whether a revision names a commit, and so the same files for ever."""
    return _COMMIT.fullmatch(revision) is not None


@dataclass(frozen=True, slots=True)
class Description:
    """What a model says of itself, unparsed: its small files and, by file, its safetensors headers."""

    config: bytes
    tokenizer_config: bytes | None
    index: bytes | None
    headers: Mapping[str, bytes]


def describe(hub: Reader, snapshot: Snapshot) -> Description:
    """Fetch the description, by range reads. Raises the problems of `Hub` and `weights_of`, and `model_config_invalid`."""
    weights, index = weights_of(hub, snapshot)
    config = read_whole(hub, snapshot, CONFIG, "model_config_invalid", headers.MAX_CONFIG_BYTES)
    tokenizer_config = None
    if TOKENIZER_CONFIG in snapshot.files:
        tokenizer_config = read_whole(hub, snapshot, TOKENIZER_CONFIG, "model_config_invalid", headers.MAX_HEADERS_BYTES)
    return Description(config, tokenizer_config, index, _read_headers(hub, snapshot, weights))


def headers_of(description: Description, snapshot: Snapshot) -> ModelHeaders:
    """The description, parsed and checked. Raises the problems of `secateur.pruning.headers`."""
    if (raw := description.tokenizer_config) is not None:
        headers.refuse_remote_code(headers.parse_object(raw, TOKENIZER_CONFIG, "model_config_invalid"), TOKENIZER_CONFIG)
    tensors = {
        path: headers.parse_header(raw, file=path, file_size=snapshot.files[path].size)
        for path, raw in description.headers.items()
    }
    index = headers.parse_index(description.index) if description.index is not None else None
    return headers.assemble(description.config, tensors, index)


def weights_of(hub: Reader, snapshot: Snapshot) -> tuple[list[str], bytes | None]:
    """The safetensors files that make up the model, sorted, and its index if it has several.

    Raises `model_not_safetensors` if there are none, `model_file_corrupt` if the index names others than there are.
    """
    if SINGLE in snapshot.files:
        return [SINGLE], None
    if INDEX not in snapshot.files:
        raise ProblemError(
            "model_not_safetensors",
            f"'{snapshot.repository}' has neither {SINGLE} nor {INDEX}, and nothing else is read.",
            hint="Choose a repository or a revision with safetensors files.",
        )
    index = read_whole(hub, snapshot, INDEX, "model_file_corrupt", headers.MAX_HEADERS_BYTES)
    with parsing.one_at_a_time:
        shards = sorted(set(headers.parse_index(index).values()))
    if absent := [name for name in shards if name not in snapshot.files]:
        raise ProblemError("model_file_corrupt", f"{INDEX} names '{absent[0]}', which the repository does not have.")
    if len(shards) > MAX_SHARDS:
        raise ProblemError("model_file_corrupt", f"{INDEX} names {len(shards)} files; at most {MAX_SHARDS} are read.")
    return shards, index


def selected(snapshot: Snapshot, weights: list[str]) -> list[HubFile]:
    """The files to fetch: weights, config and tokenizer, by name. Raises `model_file_corrupt` for an outsized companion."""
    names = [*weights, *FETCHED] if weights == [SINGLE] else [*weights, INDEX, *FETCHED]
    files = [snapshot.files[name] for name in sorted(names) if name in snapshot.files]
    for file in files:
        if file.path not in weights:
            headers.refuse_above(headers.MAX_COMPANION_BYTES, file.size, file.path, "model_file_corrupt")
    return files


def read_whole(hub: Reader, snapshot: Snapshot, path: str, code: str, most: int) -> bytes:
    """A file of at most `most` bytes. Raises `code` if it is missing or too large."""
    file = snapshot.files.get(path)
    if file is None:
        raise ProblemError(code, f"'{snapshot.repository}' has no {path}.")
    headers.refuse_above(most, file.size, path, code)
    return hub.read(snapshot, path, 0, file.size) if file.size else b""


def _read_headers(hub: Reader, snapshot: Snapshot, paths: list[str]) -> dict[str, bytes]:
    """The header of each file, as it is: no more than a share of each before the lengths of all are known."""
    sizes = {path: snapshot.files[path].size for path in paths}
    share = min(_FIRST_BYTES, headers.MAX_HEADERS_BYTES // len(paths))

    def read(path: str, start: int, end: int) -> bytes:
        return hub.read(snapshot, path, start, end) if end > start else b""

    with ThreadPoolExecutor(_PARALLEL) as pool:
        firsts = dict(zip(paths, pool.map(lambda path: read(path, 0, min(sizes[path], share)), paths), strict=True))
        lengths = headers.header_lengths(firsts, sizes)
        rests = pool.map(lambda path: read(path, len(firsts[path]), 8 + lengths[path]), paths)
        return {path: (firsts[path] + rest)[8 : 8 + lengths[path]] for path, rest in zip(paths, rests, strict=True)}


def unavailable(what: str) -> ProblemError:
    """The problem of a hub that fails."""
    return at("/model/id", "hub_unavailable", f"The hub {what}.", hint="Try again in a while.")


@contextmanager
def hub_problems(model: Model, *, with_token: bool) -> Iterator[None]:
    """Turn what `huggingface_hub` raises about `model` into problems. Nothing of the request, and so no token, is kept."""
    try:
        yield
    except HfHubHTTPError as error:
        raise _refusal(error, model, with_token=with_token) from None
    except HFValidationError:
        raise at("/model/id", "model_not_found", f"'{model.id}' is no repository: it is 'owner/name' on a hub.") from None
    except OSError as error:
        if error.errno in _FULL:
            raise _no_room() from None
        raise unavailable(f"does not answer ({type(error).__name__})") from None
    except (httpx2.HTTPError, ValueError) as error:
        raise unavailable(f"does not answer ({type(error).__name__})") from None


@contextmanager
def room_problems() -> Iterator[None]:
    """Turn a full disk into a problem, and nothing else."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise _no_room() from None
        raise


def _no_room() -> ProblemError:
    return ProblemError("disk_full", "The disk has no room for the model.", hint="Free some space, then retry.")


def _refusal(error: HfHubHTTPError, model: Model, *, with_token: bool) -> ProblemError:
    status = error.response.status_code
    if isinstance(error, RevisionNotFoundError):
        return at("/model/revision", "model_not_found", f"'{model.id}' has no revision '{model.revision or 'main'}'.")
    if isinstance(error, GatedRepoError):
        return at("/model/id", "model_gated", f"'{model.id}' is gated, and {_key(with_token)}.", hint=_ACCEPT_TERMS)
    if isinstance(error, RepositoryNotFoundError):
        return at("/model/id", "model_not_found", f"The hub has no repository '{model.id}', or hides it.", hint=_PRIVATE)
    if isinstance(error, EntryNotFoundError):
        return at("/model/id", "model_file_corrupt", f"The hub lists a file of '{model.id}' that it does not have.")
    if with_token and status in {401, 403}:
        return at("/model/id", "hub_token_refused", "The hub refused the token.", hint=_NEW_TOKEN)
    return unavailable(f"answered with status {status}")


def _key(with_token: bool) -> str:
    return "the hub token does not open it" if with_token else "there is no hub token to open it"
