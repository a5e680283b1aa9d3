"""What a model folder says about itself: config.json and safetensors headers, read as hostile input.

Nothing of the weights is read and nothing of the model is run. The same checks serve a folder (`read_model`) and a hub
repository of which only the config and the headers were fetched (`header_lengths`, `parse_header`, `assemble`). What is
parsed is small enough that the process can bear the worst of it.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from secateur.problems import ProblemError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# What a user needs beside the weights and config.json.
COMPANIONS = (
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    TOKENIZER_CONFIG,
    "vocab.json",
    "vocab.txt",
)

# Bytes of an element, for the dtypes that a safetensors header may name.
ELEMENT_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
FLOATS = frozenset({"F16", "BF16", "F32"})

MAX_CONFIG_BYTES = 1_000_000
MAX_HEADERS_BYTES = 16_000_000  # of all files together, and of any other JSON that is parsed
MAX_COMPANION_BYTES = 64_000_000
MAX_TENSORS = 100_000
# Elements, members and containers of one JSON document; a tensor in a header has nine.
MAX_JSON_PARTS = 10 * MAX_TENSORS
MAX_RANK = 8
_SHARD = re.compile(r"[A-Za-z0-9][\w.\-]{0,200}\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor lies: `start` and `end` are byte offsets in `file`, counted from the file's beginning. A tensor without
    a file is all zeros."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class ModelHeaders:
    """A model as its config and headers describe it. Of a GGUF file (`format` "gguf") no tensor is known yet.

    `switched`: what of `config` is not what the file says.
    """

    format: Literal["safetensors", "gguf"]
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    gguf_file: str | None = None
    gguf_bytes: int = 0
    switched: Mapping[str, bool] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """The class that config.json names; empty for GGUF."""
        return str(self.config.get("architectures", [""])[0])

    @property
    def parameters(self) -> int:
        return sum(tensor.elements for tensor in self.tensors.values())

    @property
    def bytes(self) -> int:
        """Of the weights as they are stored."""
        return self.gguf_bytes or sum(tensor.end - tensor.start for tensor in self.tensors.values())

    @property
    def files(self) -> tuple[str, ...]:
        """The files that hold the weights, sorted."""
        if self.gguf_file:
            return (self.gguf_file,)
        return tuple(sorted({tensor.file for tensor in self.tensors.values() if tensor.file}))


def read_model(folder: Path) -> ModelHeaders:
    """Read the headers of the model in `folder`.

    Nothing in the folder may lead out of it: neither what is read here nor what a tokenizer reads later. Raises ProblemError
    `model_not_found`, `model_not_safetensors`, `model_file_corrupt`, `model_config_invalid` or `remote_code_refused`.
    """
    try:
        if not folder.is_dir():
            raise ProblemError("model_not_found", f"There is no model folder '{folder.name}'.")
        return _read_model(folder.resolve())
    except OSError as error:
        raise ProblemError("model_file_corrupt", f"The model's files cannot be read: {error.strerror}.") from error


def _read_model(root: Path) -> ModelHeaders:
    _refuse_ways_out(root)
    companions(root)
    names = sorted(entry.name for entry in root.iterdir())
    if SINGLE not in names and INDEX not in names:
        return _without_safetensors(root, names)
    config = _read_text_file(root / CONFIG, root, "model_config_invalid", MAX_CONFIG_BYTES)
    if TOKENIZER_CONFIG in names:
        tokenizer = _read_text_file(root / TOKENIZER_CONFIG, root, "model_config_invalid", MAX_HEADERS_BYTES)
        refuse_remote_code(parse_object(tokenizer, TOKENIZER_CONFIG, "model_config_invalid"), TOKENIZER_CONFIG)
    if SINGLE in names:
        return assemble(config, _read_headers([SINGLE], root))
    index = parse_index(_read_text_file(root / INDEX, root, "model_file_corrupt", MAX_HEADERS_BYTES))
    return assemble(config, _read_headers(sorted(set(index.values())), root), index)


def companions(folder: Path) -> list[Path]:
    """The files beside weights and config that a user needs, as far as they are there.

    Raises ProblemError `model_config_invalid` for one that is absurdly large, is no ordinary file, or is outside `folder`.
    """
    found = [folder / name for name in COMPANIONS if os.path.lexists(folder / name)]
    for path in found:
        real = _contained(path, folder.resolve(), "model_config_invalid")
        refuse_above(MAX_COMPANION_BYTES, real.stat().st_size, path.name, "model_config_invalid")
    return found


def _refuse_ways_out(root: Path) -> None:
    """A tokenizer opens files whose names are its own affair, so no link at all may lead out."""
    for place, folders, files in os.walk(root):
        for path in (Path(place, name) for name in [*folders, *files]):
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
                raise ProblemError("model_file_corrupt", f"{path.name} leads out of the model's folder.")


def _without_safetensors(root: Path, names: list[str]) -> ModelHeaders:
    ggufs = [name for name in names if name.endswith(".gguf")]
    if len(ggufs) == 1:
        size = _contained(root / ggufs[0], root, "model_file_corrupt").stat().st_size
        return ModelHeaders(format="gguf", config={}, gguf_file=ggufs[0], gguf_bytes=size)
    if ggufs:
        raise ProblemError(
            "model_not_safetensors",
            f"The folder has {len(ggufs)} GGUF files and no safetensors.",
            hint="Leave the one that is meant, or give the model's safetensors.",
        )
    pickles = [name for name in names if name.endswith(_PICKLES)]
    found = f"only {', '.join(pickles[:3])}, which may run code when loaded" if pickles else "no weights at all"
    raise ProblemError(
        "model_not_safetensors",
        f"Neither {SINGLE} nor {INDEX} is there: {found}.",
        hint="Save the model with save_pretrained(), which writes safetensors.",
    )


def _contained(path: Path, root: Path, code: str) -> Path:
    """`path` without links, if it is a regular file below `root`."""
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise ProblemError(code, f"{path.name} is missing or cannot be reached.") from error
    if not real.is_relative_to(root) or not stat.S_ISREG(real.stat().st_mode):
        raise ProblemError(code, f"{path.name} leads out of the model's folder or is no ordinary file.")
    return real


def _read_text_file(path: Path, root: Path, code: str, most: int) -> bytes:
    real = _contained(path, root, code)
    refuse_above(most, real.stat().st_size, path.name, code)
    return real.read_bytes()


def refuse_above(most: int, size: int, name: str, code: str) -> None:
    """Raise ProblemError `code` for a file of more than `most` bytes."""
    if size > most:
        raise ProblemError(code, f"{name} is larger than {most} bytes.")


def parse_object(raw: bytes, name: str, code: str) -> dict[str, Any]:
    """A JSON object without duplicate keys and of at most `MAX_JSON_PARTS`; ProblemError `code` otherwise."""
    # Counted before it is parsed: a megabyte of empty lists makes twenty of objects.
    if sum(map(raw.count, (b",", b"[", b"{"))) > MAX_JSON_PARTS:
        raise ProblemError(code, f"{name} has more than {MAX_JSON_PARTS} elements.")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        document = dict(pairs)
        if len(document) != len(pairs):
            raise ValueError("a key occurs twice")
        return document

    try:
        document = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ProblemError(code, f"{name} is not valid JSON: {error}.") from error
    if not isinstance(document, dict):
        raise ProblemError(code, f"{name} is not a JSON object.")
    return document


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file. Raises ProblemError `model_file_corrupt`."""
    return _read_headers([path.name], path.parent.resolve())[path.name]


def _read_headers(files: Sequence[str], root: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of each of the safetensors `files` in `root`; no header is read before all lengths are known."""
    paths = {file: _contained(root / file, root, "model_file_corrupt") for file in files}
    sizes = {file: path.stat().st_size for file, path in paths.items()}
    lengths = header_lengths({file: _read_part(path, 0, 8) for file, path in paths.items()}, sizes)
    return {
        file: parse_header(_read_part(path, 8, lengths[file]), file=file, file_size=sizes[file])
        for file, path in paths.items()
    }


def _read_part(path: Path, start: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(length)


def header_lengths(beginnings: Mapping[str, bytes], sizes: Mapping[str, int]) -> dict[str, int]:
    """The length of each file's header in bytes, from the first eight bytes (or more) of each and the files' sizes.

    Raises ProblemError `model_file_corrupt` for a header longer than its file, and if all of them together are longer than
    `MAX_HEADERS_BYTES`.
    """
    lengths = {file: int.from_bytes(beginning[:8], "little") for file, beginning in beginnings.items()}
    for file, length in lengths.items():
        if len(beginnings[file]) < 8 or length > sizes[file] - 8:
            _corrupt(file, "is cut short or is no safetensors file")
    if sum(lengths.values()) > MAX_HEADERS_BYTES:
        longest = max(lengths, key=lengths.__getitem__)
        _corrupt(longest, f"has a header that is, with those of the other files, longer than {MAX_HEADERS_BYTES} bytes")
    return lengths


def parse_header(raw: bytes, *, file: str, file_size: int) -> dict[str, Tensor]:
    """The tensors that a safetensors header describes: `raw` is the JSON between the length field and the data.

    Raises ProblemError `model_file_corrupt` for wrong types, unknown dtypes, lengths that do not fit shapes, overlaps, gaps
    and truncation.
    """
    data_start = 8 + len(raw)
    document = parse_object(raw, f"The header of {file}", "model_file_corrupt")
    if not _SHARD.fullmatch(file):
        _corrupt(file, "is no name for a safetensors file")
    entries = {name: entry for name, entry in document.items() if name != "__metadata__"}
    if len(entries) > MAX_TENSORS:
        _corrupt(file, f"names more than {MAX_TENSORS} tensors")
    tensors = {name: _parse_tensor(name, entry, file, data_start) for name, entry in entries.items()}
    reached = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != reached:
            _corrupt(file, f"has a gap or an overlap before tensor '{_short(name)}'")
        reached = tensor.end
    if reached != file_size:
        _corrupt(file, f"has {file_size} bytes where its header describes {reached}: it is cut short or overlong")
    return tensors


def _parse_tensor(name: str, entry: Any, file: str, data_start: int) -> Tensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _corrupt(file, f"describes tensor '{_short(name)}' without dtype, shape and data_offsets, or with more")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
        _corrupt(file, f"gives tensor '{_short(name)}' a dtype that is not supported")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or len(shape) > MAX_RANK:
        _corrupt(file, f"gives tensor '{_short(name)}' a shape or offsets that are no lists of natural numbers")
    if offsets[1] - offsets[0] != math.prod(shape) * ELEMENT_BYTES[dtype]:
        _corrupt(file, f"gives tensor '{_short(name)}' another length than its shape and dtype have")
    return Tensor(dtype, tuple(shape), file, data_start + offsets[0], data_start + offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def parse_index(raw: bytes) -> dict[str, str]:
    """Tensor name -> shard of a `model.safetensors.index.json`. Raises ProblemError `model_file_corrupt`."""
    weights = parse_object(raw, INDEX, "model_file_corrupt").get("weight_map")
    if not isinstance(weights, dict) or not weights:
        _corrupt(INDEX, "has no weight_map")
    for file in weights.values():
        if not isinstance(file, str) or not _SHARD.fullmatch(file):
            _corrupt(INDEX, f"names a shard that is no file of this folder: '{_short(str(file))}'")
    return weights


def assemble(
    config: bytes, files: Mapping[str, Mapping[str, Tensor]], index: Mapping[str, str] | None = None
) -> ModelHeaders:
    """A model from the text of its config.json, the checked headers of its files and, if it is sharded, its index.

    Raises ProblemError `model_config_invalid`, `remote_code_refused` or `model_file_corrupt`.
    """
    document = parse_object(config, CONFIG, "model_config_invalid")
    refuse_remote_code(document, CONFIG)
    _check_config(document)
    tensors: dict[str, Tensor] = {}
    for file, found in sorted(files.items()):
        if doubled := tensors.keys() & found.keys():
            _corrupt(file, f"holds tensor '{_short(min(doubled))}' that another file holds too")
        tensors.update(found)
    for name, file in (index or {}).items():
        if name not in tensors or tensors[name].file != file:
            _corrupt(file, f"does not hold tensor '{_short(name)}', which the index places there")
    if not tensors:
        _corrupt(SINGLE, "holds no tensor")
    return ModelHeaders(format="safetensors", config=document, tensors=tensors)


def refuse_remote_code(document: Mapping[str, Any], name: str) -> None:
    """Raise ProblemError `remote_code_refused` if a config asks for Python code from the model's repository."""
    if document.get("auto_map"):
        raise ProblemError(
            "remote_code_refused",
            f"{name} has an auto_map: the model wants Python code of its own to be run, and no model may do that here.",
            hint="Use a model of an architecture that transformers has built in.",
        )


def _check_config(document: Mapping[str, Any]) -> None:
    architectures = document.get("architectures")
    if not (isinstance(architectures, list) and len(architectures) == 1 and isinstance(architectures[0], str)):
        raise ProblemError("model_config_invalid", f"{CONFIG} does not name one architecture in 'architectures'.")
    if not isinstance(document.get("model_type"), str):
        raise ProblemError("model_config_invalid", f"{CONFIG} has no 'model_type'.")


def _corrupt(file: str, what: str) -> NoReturn:
    raise ProblemError("model_file_corrupt", f"{_short(file)} {what}.", hint="Fetch or save the model again.")


def _short(name: str) -> str:
    return name if len(name) <= 120 else name[:117] + "..."
