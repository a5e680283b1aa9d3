"""Make the virtual environment of the Makefile, or bring it up to date. Needs nothing but Python.

An install is repeatable: every version comes from `constraints.txt`. torch, of gigabytes, gets special care: one that is
installed already is kept, a CPU build that pip can see (by PIP_FIND_LINKS, say) wins over PyPI's CUDA build, and
TORCH_INDEX_URL names an index to take it from. pip's own variables (PIP_INDEX_URL and the like) work as always.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
EXTRAS = "worker,s3,mlflow"


def main(folder: Path) -> None:
    stamp = folder / "installed"
    wanted = _fingerprint()
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    if not (folder / "bin" / "python").exists():
        print(f"Making {folder} ...", flush=True)
        venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    constraints = _constraints(folder)
    print("Installing (a minute or two) ...", flush=True)
    _run([*pip, "install", "-q", "-c", str(constraints), "pip"])
    index = os.environ.get("TORCH_INDEX_URL")
    _run([*pip, "install", "-q", "-c", str(constraints), *(["--index-url", index] if index else []), "torch"])
    wanted_by_us = ["-e", f"{ROOT}[{EXTRAS}]", "--group", f"{ROOT / 'pyproject.toml'}:dev"]
    _run([*pip, "install", "-q", "-c", str(constraints), *wanted_by_us])
    stamp.write_text(wanted)


def _fingerprint() -> str:
    """Changes when another install is due."""
    digest = hashlib.sha256(sys.version.encode() + str(ROOT).encode())
    for file in (ROOT / "pyproject.toml", CONSTRAINTS):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _constraints(folder: Path) -> Path:
    """The constraints, with torch's pin moved to the release that is installed in `folder`, if one is."""
    found = subprocess.run(
        [folder / "bin" / "python", "-c", "from importlib.metadata import version; print(version('torch'))"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if found.returncode != 0:
        return CONSTRAINTS
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("torch==")]
    kept = folder / "constraints.txt"
    kept.write_text("\n".join([*lines, f"torch=={found.stdout.strip()}", ""]))
    return kept


def _run(command: list[str]) -> None:
    if subprocess.run(command, check=False).returncode != 0:
        sys.exit(f"This failed: {' '.join(command)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
