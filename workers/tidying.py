"""What a machine keeps of jobs long gone: work folders, logs, downloaded models. Each goes when nobody needs it any more."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

from app.jobs.repository import finished_among
from app.kit.db import Database
from app.models import artifact
from app.models.fetch import alone
from app.settings import Settings


async def sweep(settings: Settings, database: Database) -> None:
    """Remove what is left of jobs that have ended (their worker was killed before it could), and models that are gone."""
    worked = await _folders(settings.work_folder, "job_*")
    models = await _folders(settings.cache_folder, "*/artifact/job_*")
    if not (worked or models):
        return
    async with database.read() as session:
        ended = await finished_among(session, list(worked))
        gone = await artifact.unneeded(session, list(models))
    for folder in [*(worked[job_id] for job_id in ended), *(models[job_id] for job_id in gone)]:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


async def _folders(root: Path, pattern: str) -> dict[str, Path]:
    return await asyncio.to_thread(lambda: {folder.name: folder for folder in root.glob(pattern)})


def tidy(settings: Settings, *, at: datetime) -> None:
    """Remove logs, and downloaded models and cached results that nobody has used, of longer ago than is kept."""
    keep = settings.retention
    old_logs, old_cache = (at - timedelta(days=days) for days in (keep.log_days, keep.cache_days))
    logs = settings.state_folder / "logs"
    cached = settings.cache_folder.glob("*/perplexity/*")
    for file, limit in [
        *((file, old_logs) for name in ("jobs", "integrations") for file in (logs / name).glob("*.log")),
        *((file, old_cache) for file in cached),
    ]:
        with suppress(FileNotFoundError):
            if file.is_file() and file.stat().st_mtime < limit.timestamp():
                file.unlink()
    for model in _models(settings.cache_folder):
        _forget_model(model, old_cache)


def _models(cache: Path) -> Iterator[Path]:
    """Folders of models, `tenant/source/name/revision`, whole or partial."""
    for source in ("hub", "mlflow"):
        yield from (folder for folder in cache.glob(f"*/{source}/*/*") if folder.is_dir())


def _forget_model(folder: Path, before: datetime) -> None:
    """A run that reads it has touched it when it began; a fetch holds the lock."""
    with alone(folder.with_name(f"{folder.name.removesuffix('.partial')}.lock")), suppress(FileNotFoundError):
        if folder.stat().st_mtime >= before.timestamp():
            return
        # All at once, so that nobody finds half of it.
        removed = folder.rename(folder.with_name(f".removed-{folder.name}"))
        shutil.rmtree(removed, ignore_errors=True)
