"""`make demo`: a real language model through the real service.

Starts the service, submits three jobs over HTTP, shows their progress, downloads each pruned model (the client checks every
sha256), loads it with transformers and lets it speak; prints a table, writes it to `.secateur/demo.json`, stops the service.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from scripts import demo_model
from secateur import Client
from secateur.recipes import PruneRecipe
from secateur.schemas.jobs import Job

STATE = demo_model.ROOT / ".secateur"
PROMPT = "To keep a rose bush healthy, a gardener should"

METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("wanda", {"target": 0.5}),
    ("sparsegpt", {"target": 0.5}),
    ("sparsegpt", {"pattern": "2:4"}),
)
CALIBRATION = {"dataset": "wikitext2-sample", "samples": 32, "sequence_length": 512}
EVALUATION = {"perplexity": {"dataset": "wikitext2-sample", "sequence_length": 1024, "max_windows": 32}}

console = Console()


def main() -> None:
    console.print("[bold]1[/bold] The demo model: SmolLM2-135M-Instruct")
    dense = demo_model.ensure()
    console.print("[bold]2[/bold] The service: broker, API, worker, scheduler")
    with service() as address, Client(address["url"], api_key=Path(address["key_file"]).read_text().strip()) as client:
        console.print(f"  up at {address['url']}\n[bold]3[/bold] Three jobs over HTTP")
        jobs = [client.jobs.create(recipe(method, sparsity)) for method, sparsity in METHODS]
        finished = [follow(client, job) for job in jobs]
        console.print("[bold]4[/bold] Download, check, load, generate")
        folders = [client.jobs.download(job.id, STATE / "downloads" / job.id) for job in finished]
        report = [summary(job, speak(folder)) for job, folder in zip(finished, folders, strict=True)]
    console.print(table(report))
    console.print(protocol_of(finished[0]), highlight=False)
    console.print(f"\n[bold]Dense[/bold]   {speak(dense)}")
    for entry in report:
        console.print(f"[bold]{entry['method']} {entry['pattern']}[/bold]   {entry['generated']}", highlight=False)
    (STATE / "demo.json").write_text(json.dumps({"jobs": report}, indent=2) + "\n")
    console.print(f"\nWritten to {STATE / 'demo.json'}")


@contextmanager
def service() -> Iterator[dict[str, str]]:
    """The service on the demo's state folder, up inside the block; its address."""
    folders = ["--state", str(STATE), "--models", str(demo_model.MODELS)]
    command = [sys.executable, "-m", "secateur.cli", "up", *folders, "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                sys.exit("the service did not start")
            yield json.loads(line)
        finally:
            process.terminate()
            process.wait(timeout=60)


def recipe(method: str, sparsity: dict[str, Any]) -> dict[str, Any]:
    """The body of `POST /v1/jobs`."""
    return {
        "kind": "prune",
        "model": {"source": "local", "id": demo_model.NAME},
        "method": {"name": method},
        "sparsity": sparsity,
        "calibration": CALIBRATION,
        "evaluation": EVALUATION,
    }


def follow(client: Client, job: Job) -> Job:
    """Show the job's progress until it ends; the finished job. Leaves with its problem if it did not succeed."""
    columns = (
        TextColumn("  {task.description:<36}"),
        BarColumn(),
        TextColumn("{task.fields[stage]:<12}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(job.repository or job.id, total=None, stage="queued")
        for state in client.jobs.watch(job.id):
            at = state.progress
            progress.update(
                bar, stage=state.stage or state.status, completed=at.done if at else 0, total=at.total if at else None
            )
        progress.update(bar, stage=state.status, completed=1, total=1)
    if state.status != "succeeded":
        sys.exit(f"job {state.id} {state.status}: {state.error}")
    return state


def speak(folder: Path) -> str:
    """What the model of `folder` says after PROMPT: one sentence or 30 tokens, greedily, no four tokens twice."""
    import torch  # noqa: PLC0415 (after the service's work: two torches at once would be unkind to a small machine)
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415
    from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415

    disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        tokens = tokenizer(PROMPT, return_tensors="pt")
        output = model.generate(**tokens, max_new_tokens=30, do_sample=False, no_repeat_ngram_size=4)
    continuation = str(tokenizer.decode(output[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True))
    return PROMPT + re.split(r"[.\n]", continuation, maxsplit=1)[0] + "."


def summary(job: Job, generated: str) -> dict[str, Any]:
    """One entry of `demo.json`."""
    metrics, recipe = job.metrics, job.recipe
    assert isinstance(recipe, PruneRecipe)
    assert metrics is not None
    assert metrics.perplexity is not None
    assert metrics.seconds is not None
    (weights,) = (artifact for artifact in job.artifacts if artifact.name.endswith(".safetensors"))
    return {
        "id": job.id,
        "method": recipe.method.name,
        "pattern": recipe.sparsity.pattern,
        "sparsity": metrics.sparsity,
        "perplexity_dense": metrics.perplexity.dense,
        "perplexity_pruned": metrics.perplexity.pruned,
        "seconds_prune": metrics.seconds.prune,
        "peak_memory_bytes": metrics.peak_memory_bytes,
        "sha256": weights.sha256,
        "generated": generated,
    }


def protocol_of(job: Job) -> str:
    """How the perplexities of a job were measured, in a sentence."""
    assert job.metrics is not None
    assert job.metrics.perplexity is not None
    facts = job.metrics.perplexity.protocol or {}
    return "Perplexity: " + ", ".join(f"{name} {value}" for name, value in facts.items() if name != "token_sha256")


def table(report: list[dict[str, Any]]) -> Table:
    """The report as a person reads it."""
    out = Table(title="Perplexity before and after, sparsity counted in the file, seconds of pruning, peak memory")
    for heading in ("method", "pattern", "dense", "pruned", "sparsity", "seconds", "memory"):
        out.add_column(heading, no_wrap=True, justify="left" if heading in {"method", "pattern"} else "right")
    for entry in report:
        perplexities = (f"{entry['perplexity_dense']:.2f}", f"{entry['perplexity_pruned']:.2f}")
        cost = (f"{entry['seconds_prune']:.1f}", f"{entry['peak_memory_bytes'] / 2**20:.0f} MiB")
        out.add_row(entry["method"], entry["pattern"], *perplexities, f"{entry['sparsity']:.4f}", *cost)
    return out


if __name__ == "__main__":
    main()
