"""Datasets of the hub, fetched from a small server on loopback that speaks enough of the hub's protocol."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from datasets import Dataset

from secateur.problems import ProblemError
from secateur.pruning.datasets import fetch_texts, read_text
from tests.engine.runs import recipe


def parquet(texts: list[str]) -> bytes:
    buffer = io.BytesIO()
    Dataset.from_dict({"text": texts}).to_parquet(buffer)
    return buffer.getvalue()


def json_lines(texts: list[str]) -> bytes:
    return gzip.compress("".join(json.dumps({"text": text, "url": "u", "timestamp": "t"}) + "\n" for text in texts).encode())


FILES = {
    "Salesforce/wikitext/resolve/main/wikitext-2-raw-v1/train-00000-of-00001.parquet": parquet(["", " = A = \n", " a \n"]),
    "Salesforce/wikitext/resolve/main/wikitext-2-raw-v1/test-00000-of-00001.parquet": parquet([" = T = \n"]),
    "allenai/c4/resolve/main/en/c4-train.00000-of-01024.json.gz": json_lines([f"document {i}" for i in range(9000)]),
    "allenai/c4/resolve/main/en/c4-validation.00000-of-00008.json.gz": json_lines([f"{i}" for i in range(2000)]),
}


class Hub(BaseHTTPRequestHandler):
    tokens: list[str | None] = []  # noqa: RUF012 - http.server makes a handler per request

    def do_HEAD(self) -> None:
        content = FILES.get(self.path.removeprefix("/datasets/"))
        self.tokens.append(self.headers["Authorization"])
        self.send_response(404 if content is None else 200)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(FILES.get(self.path.removeprefix("/datasets/"), b""))

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    Hub.tokens.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_texts_are_fetched_and_read(hub: str, tmp_path: Path) -> None:
    into = tmp_path / "texts"
    for calibration, evaluation in (("wikitext2", "c4"), ("c4", "wikitext2")):
        wanted = recipe(calibration={"dataset": calibration}, evaluation={"perplexity": {"dataset": evaluation}})
        fetch_texts(wanted, into, token="hf_secret", endpoint=hub)
    assert read_text("wikitext2", "calibration", into) == "\n\n = A = \n\n\n a \n"
    assert read_text("wikitext2", "evaluation", into) == " = T = \n"
    assert read_text("c4", "calibration", into).split("\n\n") == [f"document {i}" for i in range(8192)]
    assert read_text("c4", "evaluation", into).split(" ") == [f"{i}" for i in range(1100)]
    assert set(Hub.tokens) == {"Bearer hf_secret"}


def test_a_hub_that_does_not_have_it_is_a_problem(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FILES, "allenai/c4/resolve/main/en/c4-train.00000-of-01024.json.gz", b"not gzip")
    with pytest.raises(ProblemError) as caught:
        fetch_texts(recipe(calibration={"dataset": "c4"}), tmp_path, endpoint=hub)
    assert caught.value.code == "dataset_unavailable"
    assert [fault.pointer for fault in caught.value.faults] == ["/calibration/dataset"]
    assert not list(tmp_path.glob("*.txt"))


def test_an_address_that_is_no_hub_is_a_problem(hub: str, tmp_path: Path) -> None:
    wanted = recipe(evaluation={"perplexity": {"dataset": "wikitext2"}})
    with pytest.raises(ProblemError, match="wikitext2") as caught:
        fetch_texts(wanted, tmp_path, endpoint=f"{hub}/nowhere")
    assert [fault.pointer for fault in caught.value.faults] == ["/evaluation/perplexity/dataset"]
