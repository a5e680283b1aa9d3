"""The texts that models are calibrated and evaluated on. A name and a role never mean two different texts.

The samples ship with the package. The others come from the hub: `fetch_texts` runs where there is a network and leaves
text files in a folder, `read_text` reads them where there is none. Torch-free.
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Literal

from secateur.problems import at
from secateur.pruning.registry import calibration_of
from secateur.recipes import Recipe

Role = Literal["calibration", "evaluation"]
POINTERS: dict[Role, str] = {"calibration": "/calibration/dataset", "evaluation": "/evaluation/perplexity/dataset"}

SAMPLES = frozenset({"wikitext2-sample", "sotu-sample"})
EVALUATION_ONLY = frozenset({"sotu-sample"})
EVALUATION_EVERY = 3  # of the sample's articles, every third is for evaluation

_TITLE = re.compile(r"(?m)^(?= = [^=\n](?:[^\n]*[^=\n])? = $)")


def articles(text: str) -> list[str]:
    """WikiText's articles: each begins with a line ` = Title = `."""
    return [article for article in _TITLE.split(text) if article.strip()]


@lru_cache(maxsize=4)
def _sample(dataset: str, role: Role) -> str:
    packed = resources.files("secateur.pruning").joinpath("data", f"{dataset}.txt.xz").read_bytes()
    text = lzma.decompress(packed).decode()
    if dataset in EVALUATION_ONLY:
        return text
    everything = articles(text)
    evaluated = everything[EVALUATION_EVERY - 1 :: EVALUATION_EVERY]
    return "".join(evaluated if role == "evaluation" else [article for article in everything if article not in evaluated])


def check_role(dataset: str, role: Role) -> None:
    """Raise ProblemError `dataset_unavailable`, with a pointer, for a set that is not for calibration."""
    if role == "calibration" and dataset in EVALUATION_ONLY:
        raise at(
            POINTERS[role],
            "dataset_unavailable",
            f"'{dataset}' is for evaluation only.",
            hint="Calibrate on 'wikitext2-sample', 'wikitext2' or 'c4'.",
        )


def known_bytes(dataset: str, role: Role) -> int | None:
    """Length of a sample's text in bytes; None for a set that comes from the hub."""
    check_role(dataset, role)
    return len(_sample(dataset, role).encode()) if dataset in SAMPLES else None


def wanted_texts(recipe: Recipe) -> list[tuple[str, Role]]:
    """The texts that a run of `recipe` reads."""
    wanted: list[tuple[str, Role]] = []
    if calibration := calibration_of(recipe):
        wanted.append((calibration.dataset, "calibration"))
    if recipe.evaluation.perplexity:
        wanted.append((recipe.evaluation.perplexity.dataset, "evaluation"))
    return wanted


def read_text(dataset: str, role: Role, texts: Path | None = None) -> str:
    """The text of a set: a sample from the package, any other from the folder that `fetch_texts` filled.

    Raises ProblemError `dataset_unavailable`.
    """
    check_role(dataset, role)
    if dataset in SAMPLES:
        return _sample(dataset, role)
    file = _file(texts, dataset, role) if texts else None
    if file is None or not file.is_file():
        raise at(POINTERS[role], "dataset_unavailable", f"The text of '{dataset}' for {role} was not fetched.")
    return file.read_text(encoding="utf-8")


def fetch_texts(recipe: Recipe, into: Path, *, token: str | None = None, endpoint: str | None = None) -> None:
    """Fetch the texts that `recipe` wants from the hub (at `endpoint` if it is given) into the folder `into`.

    Raises ProblemError `dataset_unavailable`.
    """
    for dataset, role in wanted_texts(recipe):
        check_role(dataset, role)
        if dataset in SAMPLES:
            continue
        try:
            text = _HUB_TEXTS[dataset, role].fetch(token, endpoint)
        except Exception as error:  # whatever `datasets` and the network raise, the user is told the same
            raise at(
                POINTERS[role],
                "dataset_unavailable",
                f"'{dataset}' cannot be had from the hub: {type(error).__name__}.",
                hint="Try again later, or use 'wikitext2-sample', which needs no network.",
            ) from error
        into.mkdir(parents=True, exist_ok=True)
        _file(into, dataset, role).write_text(text, encoding="utf-8")


def _file(folder: Path, dataset: str, role: Role) -> Path:
    return folder / f"{dataset}.{role}.txt"


@dataclass(frozen=True, slots=True)
class _HubText:
    """A file of a dataset repository and how it becomes a text: its first documents (all if None), joined."""

    repository: str
    file: str
    reader: str
    documents: int | None
    joint: str

    def fetch(self, token: str | None, endpoint: str | None) -> str:
        # these pull in pandas and pyarrow, which only the process that fetches needs
        from datasets import load_dataset  # noqa: PLC0415
        from huggingface_hub import hf_hub_download  # noqa: PLC0415

        # the file is fetched here and not by load_dataset(), which knows no endpoint but that of its environment
        path = hf_hub_download(self.repository, self.file, repo_type="dataset", token=token or False, endpoint=endpoint)
        rows = load_dataset(self.reader, data_files=path, split="train", streaming=True)
        return self.joint.join(row["text"] for row in islice(rows, self.documents))


# The files, and the ways to join them, that published perplexities use; C4 has no end, and its beginning is the set.
_HUB_TEXTS: Mapping[tuple[str, Role], _HubText] = {
    ("wikitext2", "calibration"): _HubText(
        "Salesforce/wikitext", "wikitext-2-raw-v1/train-00000-of-00001.parquet", "parquet", None, "\n\n"
    ),
    ("wikitext2", "evaluation"): _HubText(
        "Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet", "parquet", None, "\n\n"
    ),
    ("c4", "calibration"): _HubText("allenai/c4", "en/c4-train.00000-of-01024.json.gz", "json", 8192, "\n\n"),
    ("c4", "evaluation"): _HubText("allenai/c4", "en/c4-validation.00000-of-00008.json.gz", "json", 1100, " "),
}
