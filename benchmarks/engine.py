"""Secateur's engine beside llm-compressor's, on the demo model, in one run: `make bench-engine`.

Every run is a process of its own, the two in turn. Both prune with the same 32 x 512 tokens to 50 % in bfloat16 on the CPU,
with the same environment variables; both results are evaluated by Secateur. Each round draws its tokens with another seed,
since another set moves a perplexity by a hundredth, as much as the engines differ by. After each round the medians are
printed and, with all runs, written to results/engine.json. Which draws decide whether the perplexities are within a
hundredth of each other, and how, docs/decisions/0005 says.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

ROOT = Path(__file__).parents[1]
MODEL = ROOT / ".secateur" / "models" / "smollm2-135m"
RESULTS = ROOT / "benchmarks" / "results" / "engine.json"
PEER = ["torch==2.13.0", "llmcompressor==0.14.*"]
METHODS = ("wanda", "sparsegpt")
# Secateur sets for itself that waiting threads sleep; llm-compressor, which does not, is given it too.
ENVIRONMENT = os.environ | {"OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}

Run = dict[str, Any]


def peer_python(venv: Path) -> Path:
    """The interpreter of llm-compressor's environment, which is made if it is not there, by the pip that made ours.

    How pip wrote torch's libraries to the disk decides how much of them a process maps, and so its resident memory: what
    llm-compressor imports is 443 MB by Python's own pip 23, some 530 MB by pip 26, of which 314 are its own both times.
    """
    python, made_by = venv / "bin" / "python", venv / "pip-version"
    if not made_by.exists() or made_by.read_text() != version("pip"):
        print(f"Installing {' '.join(PEER)} into {venv.name}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
        for wanted in ([f"pip=={version('pip')}"], PEER):
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=True)
        made_by.write_text(version("pip"))
    return python


def answer(command: list[str], scratch: Path) -> Any:
    """Run a command and read the last line that it prints, which is JSON."""
    done = subprocess.run(command, cwd=scratch, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def one_round(seed: int, peer: Path, scratch: Path, runs: dict[str, list[Run]]) -> None:
    """Each method once by each engine, on tokens drawn with `seed`; then the perplexity of what they made."""
    tokens = scratch / "tokens.json"
    protocol = [sys.executable, "-m", "benchmarks.protocol"]
    tokens.write_text(json.dumps(answer([*protocol, "tokens", str(MODEL), str(seed)], scratch)))
    for method in METHODS:
        ours, theirs = (str(scratch / f"{method}-{who}-{seed}") for who in ("ours", "theirs"))
        mine = answer([sys.executable, "-m", "benchmarks.ours", str(MODEL), method, ours, str(seed)], scratch)
        script = str(ROOT / "benchmarks" / "theirs.py")
        other = answer([str(peer), script, str(MODEL), method, str(tokens), theirs], scratch)
        for who, run, folder in (("ours", mine, ours), ("theirs", other, theirs)):
            (measured,) = answer([*protocol, "perplexity", folder], scratch)
            runs[f"{method} {who}"].append(run | {"perplexity": measured})


def summary(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Medians and spreads; multiples of the dense forward are taken run by run, ratios to the peer round by round."""
    facts: dict[str, Any] = {}
    for method in METHODS:
        ours, theirs = runs[f"{method} ours"], runs[f"{method} theirs"]
        dense, walker = ([sum(run[f"{who}_forward_seconds"]) / 2 for run in ours] for who in ("dense", "walker"))
        facts |= spread(f"{method}_seconds", [run["seconds"] for run in ours])
        facts |= spread(f"{method}_llmcompressor_seconds", [run["seconds"] for run in theirs])
        facts |= spread(f"{method}_dense_forward_seconds", dense)
        facts |= spread(f"{method}_walker_forward_seconds", walker)
        facts |= spread(f"{method}_forwards", [run["seconds"] / one for run, one in zip(ours, dense, strict=True)])
        facts |= spread(f"{method}_walker_forwards", [run["seconds"] / one for run, one in zip(ours, walker, strict=True)])
        facts |= spread(
            f"{method}_llmcompressor_forwards", [run["seconds"] / one for run, one in zip(theirs, dense, strict=True)]
        )
        facts |= spread(
            f"{method}_speedup_vs_llmcompressor",
            [other["seconds"] / run["seconds"] for run, other in zip(ours, theirs, strict=True)],
        )
        for key, name in (("peak_memory_bytes", "memory"), ("perplexity", "perplexity")):
            facts |= spread(f"{method}_{key}", [run[key] for run in ours])
            facts |= spread(f"{method}_llmcompressor_{key}", [run[key] for run in theirs])
            share = [run[key] / other[key] for run, other in zip(ours, theirs, strict=True)]
            facts |= spread(f"{method}_{name}_vs_llmcompressor", share)
        facts |= average(f"{method}_perplexity_vs_llmcompressor", share)
    return facts | {"memory_vs_llmcompressor": max(facts[f"{method}_memory_vs_llmcompressor"] for method in METHODS)}


def spread(name: str, values: list[float]) -> dict[str, Any]:
    return {name: median(values), f"{name}_spread": [min(values), max(values)]}


def average(name: str, values: list[float]) -> dict[str, Any]:
    """The mean of independent draws and its standard error, which one draw does not have."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {f"{name}_mean": mean(values), f"{name}_standard_error": error}


def machine() -> dict[str, Any]:
    """What a reader needs to know to compare."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    amx = any("amx_bf16" in line for line in _lines("/proc/cpuinfo"))
    return {"cpu": cpu, "cores": os.cpu_count(), "amx_bf16": amx, "system": platform.system(), "load": os.getloadavg()}


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines() if Path(file).exists() else []


def table(facts: dict[str, Any]) -> str:
    rows = [f"{'':38}{'Secateur':>14}{'llm-compressor':>16}"]
    for method in METHODS:
        for label, ours, theirs, scale, unit in (
            ("seconds of pruning", "seconds", "llmcompressor_seconds", 1, "s"),
            ("dense forwards", "forwards", "llmcompressor_forwards", 1, "x"),
            ("peak memory", "peak_memory_bytes", "llmcompressor_peak_memory_bytes", 1e6, "MB"),
            ("perplexity", "perplexity", "llmcompressor_perplexity", 1, ""),
        ):
            mine, other = (facts[f"{method}_{name}"] / scale for name in (ours, theirs))
            rows.append(f"{method + ': ' + label:38}{mine:11.2f} {unit:2}{other:13.2f} {unit}")
        for name in ("speedup", "memory", "perplexity"):
            share = facts[f"{method}_{name}_vs_llmcompressor"]
            least, most = facts[f"{method}_{name}_vs_llmcompressor_spread"]
            rows.append(f"{f'{method}: {name} against the peer':38}{share:11.3f} x   {least:.3f} to {most:.3f}")
        middle, error = (facts[f"{method}_perplexity_vs_llmcompressor_{name}"] for name in ("mean", "standard_error"))
        rows.append(f"{f'{method}: mean of perplexity':38}{middle:11.4f} x   standard error {error or math.nan:.4f}")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the first round; the next rounds have the next ones")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--peer", type=Path, default=ROOT / ".venv-llmcompressor", help="environment of llm-compressor")
    options = parser.parse_args()
    if not MODEL.is_dir():
        sys.exit(f"{MODEL} is not there: `make demo` makes it.")
    peer = peer_python(options.peer)
    runs: dict[str, list[Run]] = {f"{method} {who}": [] for method in METHODS for who in ("ours", "theirs")}
    seeds = range(options.seed, options.seed + options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for done, seed in enumerate(seeds, start=1):
            one_round(seed, peer, scratch, runs)
            facts = summary(runs)
            print(f"After round {done} of {options.rounds}, medians:\n{table(facts)}\n", flush=True)
            write(facts | {"runs": runs}, seeds[:done], peer, options.results)


def write(facts: dict[str, Any], seeds: range, peer: Path, results: Path) -> None:
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    listed = subprocess.check_output([str(peer), "-m", "pip", "list", "--format=json"], text=True)
    versions = {each["name"]: each["version"] for each in json.loads(listed)}
    document = facts | {
        "protocol": {
            "model": MODEL.name,
            "tokens": "32 x 512 of wikitext2-sample's calibration articles, another seed each round",
            "seeds": list(seeds),
            "sparsity": 0.5,
            "dtype": "bfloat16",
            "rounds": len(seeds),
            "figures": "medians of the rounds; spreads are [least, most]",
            "dense_forward": "as many tokens through transformers' own decoder, no head, twice after each of our runs",
            "walker_forward": "as many tokens through the dense blocks by Secateur's walker, twice after each of our runs",
            "perplexity": "all of wikitext2-sample's evaluation articles, 76 windows of 1024 tokens, by Secateur",
            "environment": {"OMP_WAIT_POLICY": ENVIRONMENT["OMP_WAIT_POLICY"]},
        },
        "versions": {name: versions.get(name) for name in ("llmcompressor", "torch", "transformers")},
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
