"""Model folders as hostile input: each way of being wrong has its problem, and none gets further than the headers."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.problems import ProblemError
from secateur.pruning.headers import assemble, parse_header, parse_object, read_model

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 1,
    "max_position_embeddings": 64,
}
ONE_TENSOR = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}


def shard(header: Any, data: bytes = b"\0" * 16) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound model of one tensor."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(shard(ONE_TENSOR))
    return folder


def code_of(act: Callable[[], object]) -> str:
    with pytest.raises(ProblemError) as caught:
        act()
    return caught.value.code


def test_a_sound_model_is_described(folder: Path) -> None:
    model = read_model(folder)
    assert model.architecture == "LlamaForCausalLM"
    assert (model.parameters, model.bytes, model.files) == (4, 16, ("model.safetensors",))
    start = model.tensors["a"].start
    assert (folder / "model.safetensors").read_bytes()[start:] == b"\0" * 16


def test_shards_are_found_through_the_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model-2.safetensors").write_bytes(shard({"b": {"dtype": "BF16", "shape": [8], "data_offsets": [0, 16]}}))
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_model(folder).parameters == 12

    (folder / "model-2.safetensors").unlink()
    assert code_of(lambda: read_model(folder)) == "model_file_corrupt"


@pytest.mark.parametrize(
    ("header", "data"),
    [
        pytest.param({"a": {**ONE_TENSOR["a"], "data_offsets": [0, 12]}}, b"\0" * 12, id="shorter than its shape"),
        pytest.param(ONE_TENSOR, b"\0" * 15, id="cut short"),
        pytest.param(ONE_TENSOR, b"\0" * 17, id="overlong"),
        pytest.param({**ONE_TENSOR, "b": ONE_TENSOR["a"]}, b"\0" * 16, id="two tensors overlap"),
        pytest.param({"a": {**ONE_TENSOR["a"], "data_offsets": [8, 24]}}, b"\0" * 24, id="a gap"),
        pytest.param({"a": {**ONE_TENSOR["a"], "dtype": "F42"}}, b"\0" * 16, id="unknown dtype"),
        pytest.param({"a": {**ONE_TENSOR["a"], "dtype": ["F32"]}}, b"\0" * 16, id="dtype of a wrong type"),
        pytest.param({"a": {**ONE_TENSOR["a"], "shape": [-2, -2]}}, b"\0" * 16, id="negative shape"),
        pytest.param({"a": {**ONE_TENSOR["a"], "shape": [2.0, 2]}}, b"\0" * 16, id="fractional shape"),
        pytest.param({"a": {**ONE_TENSOR["a"], "shape": [True, 4]}}, b"\0" * 16, id="boolean shape"),
        pytest.param({"a": {**ONE_TENSOR["a"], "shape": [2**40, 2**40]}}, b"\0" * 16, id="absurd shape"),
        pytest.param({"a": {**ONE_TENSOR["a"], "shape": [1] * 9}}, b"\0" * 4, id="absurd rank"),
        pytest.param({"a": [1, 2]}, b"\0" * 16, id="not an entry"),
        pytest.param({}, b"", id="no tensor"),
        pytest.param([], b"", id="not an object"),
        pytest.param(b"{", b"", id="not JSON"),
        pytest.param(b"[" * 100_000, b"", id="nested without end"),
        pytest.param(b'{"a": 1, "a": 1}', b"", id="a key twice"),
        pytest.param(b"\xff\xfe{}", b"", id="not UTF-8"),
    ],
)
def test_a_broken_safetensors_file_is_named(folder: Path, header: Any, data: bytes) -> None:
    (folder / "model.safetensors").write_bytes(shard(header, data))
    with pytest.raises(ProblemError, match=r"model\.safetensors") as caught:
        read_model(folder)
    assert caught.value.code == "model_file_corrupt"


@pytest.mark.parametrize(
    "content", [b"", b"\x01", (2**63).to_bytes(8, "little") + b"{}", (10).to_bytes(8, "little") + b"{}"]
)
def test_a_header_longer_than_its_file_is_refused_unread(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert code_of(lambda: read_model(folder)) == "model_file_corrupt"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_no_header_raises_anything_but_a_problem(entry: Any) -> None:
    assert (
        code_of(lambda: parse_header(json.dumps({"a": entry}).encode(), file="model.safetensors", file_size=8))
        == "model_file_corrupt"
    )


@pytest.mark.parametrize("place", ["../other.safetensors", "/etc/passwd", "sub/x.safetensors", ".hidden.safetensors", 7])
def test_an_index_cannot_lead_out_of_the_folder(folder: Path, place: Any) -> None:
    (folder / "model.safetensors").unlink()
    (folder.parent / "other.safetensors").write_bytes(shard(ONE_TENSOR))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": place}}))
    assert code_of(lambda: read_model(folder)) == "model_file_corrupt"


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "unheard_of.txt",
        "additional_chat_templates/x.jinja",
    ],
)
def test_a_link_cannot_lead_out_of_the_folder(folder: Path, name: str) -> None:
    """Whatever it is called: a tokenizer reads files that nothing here has heard of."""
    path, outside = folder / name, folder.parent / "secret"
    path.parent.mkdir(exist_ok=True)
    outside.write_bytes(path.read_bytes() if path.exists() else b"{}")
    path.unlink(missing_ok=True)
    path.symlink_to(outside)
    assert code_of(lambda: read_model(folder)) == "model_file_corrupt"
    path.unlink()
    path.symlink_to("inside")
    outside.rename(path.parent / "inside")
    assert read_model(folder).parameters == 4


def test_a_gguf_file_cannot_lie_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.gguf")
    (folder / "model.gguf").symlink_to("../model.gguf")
    assert code_of(lambda: read_model(folder)) == "model_file_corrupt"
    (folder / "model.gguf").unlink()
    (folder / "model.gguf").symlink_to("gone")
    assert code_of(lambda: read_model(folder)) == "model_file_corrupt"


def test_a_companion_is_an_ordinary_file_of_a_sane_size(folder: Path) -> None:
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(64_000_001)
    assert code_of(lambda: read_model(folder)) == "model_config_invalid"
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    assert code_of(lambda: read_model(folder)) == "model_config_invalid"


def test_what_cannot_be_read_is_a_problem(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions do not stop root, who may run the tests: the system's refusal is made up."""

    def refuse(_: Path) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ProblemError, match="Permission denied") as caught:
        read_model(folder)
    assert caught.value.code == "model_file_corrupt"


def test_a_header_that_would_take_too_much_is_refused_by_its_length(folder: Path) -> None:
    """By the length field: the file has holes where the header should be, and nobody reads them."""
    with (folder / "model.safetensors").open("wb") as file:
        file.write((16_000_001).to_bytes(8, "little"))
        file.truncate(20_000_000)
    with pytest.raises(ProblemError, match="16000000") as caught:
        read_model(folder)
    assert caught.value.code == "model_file_corrupt"


def test_the_headers_of_all_shards_together_have_a_limit(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    names = [f"model-{number}.safetensors" for number in range(3)]
    for name in names:
        with (folder / name).open("wb") as file:
            file.write((6_000_000).to_bytes(8, "little"))
            file.truncate(7_000_000)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: name for name in names}}))
    with pytest.raises(ProblemError, match="16000000"):
        read_model(folder)


def test_a_config_has_a_limit(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | {"padding": "x" * 1_000_000}))
    assert code_of(lambda: read_model(folder)) == "model_config_invalid"


@pytest.mark.parametrize("element", [b"[]", b"{}", b"1", b'""'])
def test_a_document_of_many_small_parts_is_not_parsed(element: bytes) -> None:
    raw = b'{"a": [' + b",".join([element] * 2_500_000) + b"]}"
    tracemalloc.start()
    assert code_of(lambda: parse_object(raw, "x.json", "model_config_invalid")) == "model_config_invalid"
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_a_pipe_is_refused_and_not_waited_for(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    assert code_of(lambda: read_model(folder)) == "model_file_corrupt"


def test_pickles_are_not_opened(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ProblemError, match=r"pytorch_model\.bin") as caught:
        read_model(folder)
    assert caught.value.code == "model_not_safetensors"


def test_a_gguf_file_alone_is_accepted_unread(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.Q4_1.gguf")
    model = read_model(folder)
    assert (model.format, model.gguf_file, model.files) == ("gguf", "model.Q4_1.gguf", ("model.Q4_1.gguf",))
    assert model.bytes == (folder / "model.Q4_1.gguf").stat().st_size
    (folder / "second.gguf").touch()
    assert code_of(lambda: read_model(folder)) == "model_not_safetensors"


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_of_the_models_own_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text(json.dumps({**CONFIG, "auto_map": {"AutoModel": "evil.Model"}}))
    assert code_of(lambda: read_model(folder)) == "remote_code_refused"


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": None},
        {"architectures": []},
        {"architectures": [1]},
        {"architectures": ["A", "B"]},
        {"model_type": 3},
    ],
)
def test_a_config_without_what_is_needed_is_refused(change: dict[str, Any]) -> None:
    config = json.dumps(CONFIG | change).encode()
    assert code_of(lambda: assemble(config, {})) == "model_config_invalid"


def test_a_missing_folder_and_an_unreadable_config_have_their_own_problems(folder: Path) -> None:
    assert code_of(lambda: read_model(folder / "nowhere")) == "model_not_found"
    (folder / "config.json").write_text("{'single': 'quotes'}")
    assert code_of(lambda: read_model(folder)) == "model_config_invalid"
    (folder / "config.json").unlink()
    assert code_of(lambda: read_model(folder)) == "model_config_invalid"
